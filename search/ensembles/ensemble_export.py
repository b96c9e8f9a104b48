"""What goes with an exported ensemble: its lineage, a short model card, and the space's source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from search.definition.problem import Problem
from search.ensembles.ensemble_words import conclusion
from search.record.journal import Journal
from search.shown.report import number
from search.study import Study


def write(
    study: Study,
    journal: Journal,
    record: Mapping[str, Any],
    prepared: Mapping[str, Any],
    folder: Path,
    batch_size: int,
) -> dict[str, Any]:
    """Write everything that goes with the model file; the lineage.

    Args:
        record: The ensemble, as recorded in the journal.
        prepared: Of the members' module text.
        batch_size: Rows per batch that its predictions were made with.
    """
    problem, meta = Problem(**prepared["problem"]), journal.get("study")
    trials = {trial.number: trial for trial in journal.history()}
    members = [
        {
            "trial": one["trial"],
            "weight": one["weight"],
            "params": dict(trials[one["trial"]].params),
            "seed": trials[one["trial"]].seed,
            "best_epoch": trials[one["trial"]].best_epoch,
            "validation": one["validation"],
        }
        for one in record["members"]
    ]
    test = record["test"] if record["test"] is not None and record["test"]["opened"] else None
    lineage = {
        "study": study.name,
        "study_id": meta["study_id"],
        "ensemble": {"size": record["size"], "candidates": record["candidates"], "members": members},
        "weights": record["model"]["size"],
        "space": {"name": problem.name, "digest": problem.digest},
        "data": meta["data"],
        "versions": meta["versions"],
        "custom_objects": record["model"]["custom"],
        "objective": record["objective"],
        "cross_fitted": record["cross_fitted"],
        "test": test,
        "batch_size": batch_size,
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "format": "keras",
    }
    (folder / "space.py").write_text(problem.source)
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=2, sort_keys=True) + "\n")
    (folder / "MODEL_CARD.md").write_text(card(lineage, conclusion(record, study.name)))
    return lineage


def card(lineage: Mapping[str, Any], believe: str) -> str:
    """A short model card in Markdown."""
    custom, judged, test = lineage["custom_objects"], lineage["cross_fitted"], lineage["test"]
    first = "import space  # registers " + ", ".join(c["class"] for c in custom) + "\n" if custom else ""
    scores = [("guard, cross-fitted", judged["scores"]["ensemble"])] if judged else []
    scores += [("test", test["ensemble"]["score"])] if test else []
    table = [f"| rows | {str(lineage['objective']).removeprefix('val_')} |", "|---|---|"]
    table += [f"| {tier} | {number(score)} |" for tier, score in scores]
    return "\n".join(
        [
            f"# {lineage['space']['name']}: ensemble of study {lineage['study']}",
            "",
            believe,
            "",
            *([*table, ""] if scores else []),
            "## Use",
            "",
            "```python",
            f"import keras\n{first}",
            'model = keras.models.load_model("model.keras")',
            f"predictions = model.predict(x, batch_size={lineage['batch_size']})  # x: raw features, "
            "preprocessing is inside",
            "```",
            "",
            "## What it is",
            "",
            f"An average of {len(lineage['ensemble']['members'])} models, picked by greedy selection with replacement "
            "on guard rows (Caruana et al. 2004).",
            "",
            *(_member(one) for one in lineage["ensemble"]["members"]),
            f"- {lineage['weights']} weights in all",
            f"- space digest `{lineage['space']['digest'][:16]}`, data digest `{lineage['data']['digest'][:16]}`",
            f"- versions: {', '.join(f'{name} {version}' for name, version in lineage['versions'].items())}",
            "",
        ]
    )


def _member(one: Mapping[str, Any]) -> str:
    params = ", ".join(f"`{key}` = {number(value)}" for key, value in one["params"].items())
    trained = f"trial {one['trial']}, seed {one['seed']}, epoch {one['best_epoch']}"
    return f"- weight {one['weight']:.3g}: {trained}; {params}"
