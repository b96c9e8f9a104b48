"""What a trial reads and writes, taken from its payload, as a node that does not see these files is sent it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search.cluster import mirror
from search.definition import assets, packing
from search.definition.problem import Problem

Spec = dict[str, Any]


class Sources:
    """The driver's files, packed once and sent by reference.

    Rows are taken from ``rows/DIGEST``, never from ``sealed/``: no label of guard or test rows can be among them.

    Args:
        put: Stores bytes where nodes can get them, and returns a reference.
        folder: The study's; workspace: the one that it is in.
        problem: The module that trials run.
        apart: Treats nodes as if they saw none of our files.
    """

    def __init__(
        self, put: Callable[[bytes], Any], folder: Path, workspace: Path, problem: Problem, apart: bool = False
    ) -> None:
        self._put, self._folder, self._problem, self._apart = put, folder, problem, apart
        self.workspace = workspace
        self._packed: dict[str, Spec] = {}
        self._modules: dict[str, list[str]] = {}  # by the digest of a module's text, the files that it needs
        self._token: tuple[str, str] | None = None

    def setup(self) -> dict[str, Any]:
        """What an agent finds out by whether it sees our files: a file with a word that nobody else has."""
        if self._token is None:
            word = uuid.uuid4().hex
            file = self._folder / ".seen"
            file.write_text(word)
            self._token = str(file), word
        module = {key: value for key, value in self._module(self._problem).items() if key != "parts"}
        return {"apart": self._apart, "token": self._token, "workspace": str(self.workspace), "module": module}

    def close(self) -> None:
        """Remove what was written for ``setup``."""
        if self._token is not None:
            Path(self._token[0]).unlink(missing_ok=True)

    def inputs(self, payload: Mapping[str, Any], sees: bool, module: bool) -> list[Spec]:
        """What the trial reads; see ``Agent`` for what is in a spec.

        Args:
            sees, module: What the agent's ``begin`` said.
        """
        given = [asset["path"] for asset in payload.get("assets") or ()]
        problem = Problem(**payload["problem"]) if "problem" in payload else self._problem
        cache = str(assets.cache_root())
        folder = str(Path(problem.path).parent)
        # A module finds an asset again that is sent where it lies beside the module, or in the cache folder.
        beside = [path for path in given if path.startswith(f"{folder}/") and not path.startswith(f"{cache}/")]
        specs = [] if module and not beside else [self._with_parts(self._module(problem, beside))]
        if cached := [path for path in given if path.startswith(f"{cache}/")]:
            specs.append(self._with_parts(self._group(cache, cached)))
        if sees or "folder" not in payload:
            return specs
        folder = payload["folder"]
        parts = payload.get("folds") or (payload.get("part") or {}).get("folds") or {}
        for path in (payload.get("rows"), payload.get("preprocess"), parts.get("folder")):
            if path is not None and not path.startswith(f"{folder}/") and os.path.exists(path):
                specs.append(self._whole(path))
        own = self._spec(folder, mirror.listed(Path(folder)), own=True)
        return [*specs, self._with_parts(own)]

    def must_be_seen(self, payload: Mapping[str, Any]) -> bool:
        """Whether rows are files, which are too many to travel: nodes read them where they lie."""
        if "rows" not in payload:
            return False
        manifest = json.loads((Path(payload["rows"]) / "manifest.json").read_text())
        return any(manifest["x"].get("files") or ())

    def outputs(self, payload: Mapping[str, Any]) -> list[str]:
        """Folders that the trial writes to."""
        return [payload[key] for key in ("folder", "events") if payload.get(key)]

    def cache(self, payload: Mapping[str, Any]) -> str | None:
        """Where ``cache_folder`` is here, if an asset lies in it."""
        root = str(assets.cache_root()) if payload.get("assets") else ""
        return root if any(asset["path"].startswith(f"{root}/") for asset in payload.get("assets") or ()) else None

    def _module(self, problem: Problem, beside: Sequence[str] = ()) -> Spec:
        folder = Path(problem.path).parent
        if problem.digest not in self._modules:  # each trial asks, and trees of syntax are slow to read
            packed = packing.pack(problem)
            files = [folder / name for name in (packed.module, *packed.files)]
            self._modules[problem.digest] = [str(file) for file in files if file.is_file()]
        return self._group(str(folder), [*self._modules[problem.digest], *beside], problem.digest)

    def _group(self, root: str, paths: Sequence[str], key: str = "") -> Spec:
        """Several files and folders below one root, which are used where they are if a node has all of them."""
        name = "\0".join((key, root, *paths))
        if name not in self._packed:
            files = []
            for path in map(Path, paths):
                under = path.relative_to(root)
                files += [[(under / name).as_posix(), size, at] for name, size, at in mirror.listed(path)]
            self._packed[name] = self._spec(root, files, digests=True)
        return self._packed[name]

    def _whole(self, path: str) -> Spec:
        if path not in self._packed:
            self._packed[path] = self._with_parts(self._spec(path, mirror.listed(Path(path))))
        return self._packed[path]

    def _spec(self, root: str, files: Sequence[mirror.Entry], digests: bool = False, own: bool = False) -> Spec:
        known = {name: mirror.digest(mirror.at(Path(root), name)) for name, _, _ in files} if digests else None
        return {"root": root, "files": files, "digests": known, "own": own, "apart": self._apart}

    def _with_parts(self, spec: Spec) -> Spec:
        if "parts" not in spec:
            spec["parts"] = [self._put(part) for part in mirror.chunks(Path(spec["root"]), spec["files"])]
        return spec
