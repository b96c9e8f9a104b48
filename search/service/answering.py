"""What a cluster's head says of its Python: its version, Heldout's, and which of some modules it lacks.

Sent there as text and run by whatever Python is there, with or without Heldout: it imports the standard library alone.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys


def answer(names: list[str]) -> dict[str, object]:
    """``python``, ``heldout`` (a version, or None) and ``missing`` of these top-level names; none of them is imported.

    The distribution may be missing where Heldout runs from a checkout, so ``search`` is asked for among the names.
    """
    try:
        heldout = importlib.metadata.version("heldout")
    except importlib.metadata.PackageNotFoundError:
        heldout = None
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "heldout": heldout, "missing": missing}


if __name__ == "__main__":
    os.write(1, (json.dumps(answer(sys.argv[1:])) + "\n").encode())
