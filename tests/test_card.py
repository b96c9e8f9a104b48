"""The model card, read as somebody would who was handed the folder."""

from __future__ import annotations

from typing import Any

from search.exports.card import card

TESTED = {"score": 0.9, "interval": [0.85, 0.95], "level": 0.9696, "rows": 359, "opening": 1, "method": "Wilson"}
LINEAGE: dict[str, Any] = {
    "study": "cells-1",
    "trial": 7,
    "about": "Two kinds of cells, told apart by twelve measurements.",
    "params": {"units": 32, "kind": "a|b"},
    "seed": 5,
    "epochs": 20,
    "best_epoch": 12,
    "weights": 450,
    "flops": 832,
    "space": {"name": "cells", "digest": "5" * 64},
    "data": {"digest": "d" * 64, "rows": 1000, "tiers": {"train": 600, "validation": 100, "guard": 100, "test": 200}},
    "versions": {"keras": "3.15.1"},
    "custom_objects": [],
    "objective": "val_accuracy",
    "direction": "max",
    "searched": {
        "trials": {"complete": 28, "pruned": 0, "failed": 2},
        "confirmations": 12,
        "sampler": "gp",
        "parameters": {
            "units": ["int 8..128", 32],
            "kind": ["{'a|b', 'c'}", "c"],
            "dropout": ["float 0.1..0.5", 0.1],
        },
    },
    "against_baseline": {
        "score": 0.85,
        "gain": {"gain": 0.05, "interval": [0.01, 0.09]},
        "verdicts": ["NO_GAP_SHOWN"],
    },
    "inputs": [["x", [12], "float32"]],
    "outputs": [{"name": "dense", "from_logits": True, "shape": [2]}],
    "architecture": "architecture.png",
    "checked": {"model.keras": {"rows": 32, "largest_difference": 0.0}},
    "tolerance": 1e-4,
    "scores": {"validation": {"score": 0.99}, "test": TESTED},
    "batch_size": 1024,
    "format": "keras",
}


def test_what_to_believe_comes_first_and_the_search_after_it() -> None:
    text = card(LINEAGE)
    order = ["Believe the test score: 0.9", "better than the space's defaults by 0.05", "NO_GAP_SHOWN: corrected"]
    order += ["## Use", "goes in: float32, 12 a row", "comes out: 2 a row, logits", "predicts what the model predicted"]
    order += ["## What was searched", "28 complete, 2 failed trials, and 12 trainings that confirm", "train 600"]
    order += ["| `units` | int 8..128 | 32 | 32 |", "## What it is", "450 weights, 832 floating-point operations"]
    at = [text.index(part) for part in [LINEAGE["about"], *order, "![The layers](architecture.png)"]]
    assert at == sorted(at)


def test_a_table_stays_a_table_whatever_a_choice_is_called() -> None:
    text = card(LINEAGE)
    assert "| `kind` | {'a\\|b', 'c'} | c | a\\|b |" in text
    assert "| `dropout` | float 0.1..0.5 | 0.1 | not there |" in text  # of another branch


def test_what_is_not_known_is_not_said() -> None:
    plain = LINEAGE | {"against_baseline": None, "flops": None, "architecture": None, "about": "", "checked": {}}
    text = card(plain | {"scores": {"validation": {"score": 0.99}}})
    assert "was not tested on held-out rows" in text and "helped to choose the model, so it flatters" in text
    for word in ("floating-point", "layers", "defaults by", "None", "\n\n\n"):
        assert word not in text


def test_several_ends_are_named_and_custom_layers_imported() -> None:
    several = LINEAGE | {
        "inputs": [["a", [], "text"], ["b", [None, 3], "int64"]],
        "outputs": [{"name": name, "from_logits": False, "shape": [1]} for name in ("one", "two")],
        "custom_objects": [{"class": "Scale", "module": "cells", "registered": "cells>Scale"}],
        "architecture": "architecture.txt",
    }
    text = card(several)
    assert "goes in `a`: text, one value a row" in text and "goes in `b`: int64, any number × 3 a row" in text
    assert "comes out `one`: 1 a row\n" in text and "import space  # registers Scale" in text
    assert "[architecture.txt](architecture.txt)" in text
