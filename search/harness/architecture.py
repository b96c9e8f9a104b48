"""A drawing of a model's architecture: boxes and arrows where graphviz is installed, else a table of its layers."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

DRAWINGS = PICTURE, TABLE = "architecture.png", "architecture.txt"
_DOTS_PER_INCH = 96
_WIDTH = 100


def draw(model: Any, folder: Path) -> str:
    """Draw a built model; nested models are drawn open.

    Args:
        folder: Gets the drawing, and loses an older one.

    Returns:
        The file's name, ``PICTURE`` or ``TABLE``.
    """
    for old in (PICTURE, TABLE):
        (folder / old).unlink(missing_ok=True)
    if importlib.util.find_spec("pydot") is not None and shutil.which("dot") is not None:
        try:
            return _pictured(model, folder)
        except Exception as error:  # graphviz gives up on some graphs, and its programs may be broken
            note = f"graphviz could not draw it ({type(error).__name__})\n\n"
    else:
        note = ""
    lines: list[str] = []
    model.summary(line_length=_WIDTH, expand_nested=True, print_fn=lambda line, **_: lines.append(line))
    (folder / TABLE).write_text(note + "\n".join(lines) + "\n")
    return TABLE


def _pictured(model: Any, folder: Path) -> str:
    import keras

    draft = folder / f".{Path(PICTURE).stem}-{os.getpid()}.png"
    try:
        keras.utils.plot_model(
            model, str(draft), show_shapes=True, show_layer_names=True, expand_nested=True, dpi=_DOTS_PER_INCH
        )
        os.replace(draft, folder / PICTURE)
    finally:
        draft.unlink(missing_ok=True)
    return PICTURE
