"""Small space modules for tests, written to files as a user would write them."""

from __future__ import annotations

from pathlib import Path

PARTS = {
    "imports": "import keras\nimport numpy as np\n\nfrom search import Dataset",
    "objective": 'objective = "val_accuracy"\nepochs = 2',
    "load": (
        "def load():\n"
        "    rng = np.random.default_rng(0)\n"
        "    x = rng.normal(size=(200, 4)).astype('float32')\n"
        "    return Dataset(x, (x[:, 0] + x[:, 1] > 0).astype('int64'))"
    ),
    "build": (
        "def build(hp):\n"
        "    model = keras.Sequential([keras.Input((4,))])\n"
        "    for i in range(hp.Int('layers', 1, 2)):\n"
        "        model.add(keras.layers.Dense(hp.Int(f'units_{i}', 2, 16), activation='relu'))\n"
        "    model.add(keras.layers.Dense(2, activation='softmax'))\n"
        "    rate = hp.Float('rate', 1e-3, 1e-1, sampling='log', default=1e-2)\n"
        "    model.compile(keras.optimizers.Adam(rate), 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
        "    return model"
    ),
    "rest": "",
}


def write_space(folder: Path, name: str = "tiny", **parts: str) -> str:
    """Write a space module, with parts of it replaced or (by "") left out; its path."""
    path = folder / f"{name}.py"
    path.write_text("\n\n\n".join(text for text in (PARTS | parts).values() if text) + "\n")
    return str(path)
