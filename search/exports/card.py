"""The model card: what was searched, what was found, and what to believe of it, in Markdown from a lineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from search.definition import assets
from search.guard import verdicts
from search.shown.report import number

_DRAWINGS = (".png",)


def card(lineage: Mapping[str, Any]) -> str:
    """A model card; its first paragraph is what to believe."""
    lines = [
        f"# {lineage['space']['name']}: trial {lineage['trial']} of study {lineage['study']}",
        "",
        *([lineage["about"], ""] if lineage["about"] else []),
        *_believe(lineage),
        *_found(lineage),
        "",
        "## Use",
        "",
        *_use(lineage),
        "",
        "## What was searched",
        "",
        *_searched(lineage),
        "",
        "## What it is",
        "",
        *_model(lineage),
        "",
    ]
    return "\n".join(lines)


def _use(lineage: Mapping[str, Any]) -> Iterator[str]:
    custom = lineage["custom_objects"]
    yield "```python"
    yield "import keras"
    if custom:
        yield "import space  # registers " + ", ".join(one["class"] for one in custom)
    yield ""
    yield 'model = keras.models.load_model("model.keras")'
    yield f"predictions = model.predict(x, batch_size={lineage['batch_size']})"
    yield "```"
    yield ""
    # Decoding is no part of the model.
    made = "`decode(path)`" if lineage.get("decoded") else "`load()`"
    yield f"`x` are raw rows, as from {made} in `space.py`: preprocessing is inside the model. Rows of"
    yield "another kind than those that it was trained on get predictions too, which nothing here speaks for."
    yield from assets.lines(lineage.get("assets") or ())
    yield ""
    for name, shape, dtype in lineage["inputs"]:
        called = f" `{name}`" if len(lineage["inputs"]) > 1 else ""
        yield f"- goes in{called}: {dtype}, {_shape(shape)}"
    for output in lineage["outputs"]:
        called = f" `{output['name']}`" if len(lineage["outputs"]) > 1 else ""
        raw = ", logits, not probabilities" if output["from_logits"] else ""
        yield f"- comes out{called}: {_shape(output['shape'])}{raw}"
    for name, found in lineage["checked"].items():
        yield (
            f"- `{name}` was read again and run on {found['rows']} rows: it predicts what the model predicted, to "
            f"{number(found['largest_difference'])}"
        )


def _shape(sizes: list[int | None]) -> str:
    """Of one row."""
    if not sizes:
        return "one value a row"
    return " × ".join("any number" if size is None else str(size) for size in sizes) + " a row"


def _searched(lineage: Mapping[str, Any]) -> Iterator[str]:
    found, objective = lineage["searched"], lineage["objective"]
    better = "higher" if lineage["direction"] == "max" else "lower"
    counts = found["trials"]
    ended = [f"{counts[state]} {state}" for state in ("complete", "pruned", "failed") if counts[state]]
    tiers = ", ".join(f"{name} {count}" for name, count in lineage["data"]["tiers"].items())
    again = f", and {found['confirmations']} trainings that confirm" if found["confirmations"] else ""
    yield f"- for `{objective}` ({better} is better), by {', '.join(ended)} trials{again}; sampler `{found['sampler']}`"
    yield f"- {lineage['data']['rows']} rows: {tiers}"
    yield f"- this model: {_trained(lineage)}, seed {lineage['seed']}"
    yield ""
    yield "| parameter | searched | default | this model |"
    yield "|---|---|---|---|"
    for key, (domain, default) in found["parameters"].items():
        mine = lineage["params"].get(key)
        yield f"| `{key}` | {_cell(domain)} | {_cell(default)} | {'not there' if mine is None else _cell(mine)} |"


def _cell(value: Any) -> str:
    """A table's cell: a bar would end it."""
    return number(value).replace("|", "\\|")


def _model(lineage: Mapping[str, Any]) -> Iterator[str]:
    flops = lineage["flops"]
    operations = "" if flops is None else f", {flops} floating-point operations for a row (without preprocessing)"
    yield f"- {lineage['weights']} weights{operations}"
    drawn = lineage["architecture"]
    if drawn is not None and not drawn.endswith(_DRAWINGS):
        yield f"- its layers are listed in [{drawn}]({drawn})"
    yield f"- space digest `{lineage['space']['digest'][:16]}`, data digest `{lineage['data']['digest'][:16]}`"
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in lineage['versions'].items())}"
    yield "- all of this, and more, is in [lineage.json](lineage.json); the space is [space.py](space.py)"
    if drawn is not None and drawn.endswith(_DRAWINGS):
        yield ""
        yield f"![The layers]({drawn})"


def _trained(lineage: Mapping[str, Any]) -> str:
    if lineage.get("final") is None:
        return f"epoch {lineage['best_epoch']} of {lineage['epochs']}"
    return (
        f"the last of {lineage['epochs']} epochs on {lineage['rows']} rows (the median of the best epochs of this "
        "configuration's runs, since no validation rows were left to choose by)"
    )


def _believe(lineage: Mapping[str, Any]) -> list[str]:
    """What is known of the model's worth, and what to believe of it."""
    if lineage.get("final") == "all":
        others = lineage["refitted_from"]["scores"]
        return [
            f"**No score applies to this model.** It was trained on all {lineage['rows']} rows, test rows included, so "
            "none are left that could test it.",
            "",
            f"Trial {lineage['trial']} of the search had these parameters, and these scores. They describe another "
            "model, which was trained on fewer rows.",
            "",
            *_table(lineage, others),
        ]
    scores = lineage["scores"]
    tested, retrained = scores.get("test"), lineage.get("final") == "retrain"
    if retrained:
        chosen = (
            f"It was trained anew on {lineage['rows']} rows, those of validation and guard among them, so scores on "
            "these would say nothing and are left out."
        )
    else:
        judged = (scores.get("validation") or {}).get("plan")
        of = "" if judged is None else f" by {judged}"
        worth = "flatters" if judged is None else "is optimistic"
        chosen = f"The validation score{of} helped to choose the model, so it {worth}."
        corrected = (scores.get("guard") or {}).get("corrected")
        if corrected is not None and corrected["interval"] is not None:
            low, high = (number(end) for end in corrected["interval"])
            chosen = (
                f"{chosen} So did the guard score; corrected for that it is {number(corrected['estimate'])}, "
                f"{corrected['level']:.0%} interval {low} to {high}."
            )
    if tested is None:
        said = ", so no score speaks for it" if retrained else ""
        return [f"This model was not tested on held-out rows{said}. {chosen}", *_table(lineage, scores, "")]
    only = "Only the test score speaks for this model" if retrained else "Believe the test score"
    if tested["interval"] is None:
        told = f"{only}: {number(tested['score'])}. No choice was made by those rows. It has no interval."
    else:
        low, high = (number(end) for end in tested["interval"])
        told = (
            f"{only}: {number(tested['score'])}, {tested['level']:.0%} interval {low} to {high}, on "
            f"{tested['rows']} rows that no choice was made by (opening {tested['opening']} of these rows)."
        )
    return [f"{told} {chosen}", *_table(lineage, scores, "")]


def _table(lineage: Mapping[str, Any], scores: Mapping[str, Any], *before: str) -> list[str]:
    """Scores by tier as Markdown, after these lines; nothing if there are none."""
    if not scores:
        return []
    lines = ["| rows | " + str(lineage["objective"]).removeprefix("val_") + " |", "|---|---|"]
    for tier in (tier for tier in ("validation", "guard", "test") if tier in scores):
        again = lineage.get("final") == "all" and scores[tier].get("final") == "retrain"
        name = f"{tier} (refitted on train, validation and guard)" if again else tier
        name += f" ({scores[tier]['plan']}, optimistic)" if "plan" in scores[tier] else ""
        lines.append(f"| {name} | {number(scores[tier]['score'])} |")
    return [*before, *lines]


def _found(lineage: Mapping[str, Any]) -> list[str]:
    """Against the baseline on the same test rows, and the verdicts; nothing of a model that was not tested."""
    found = lineage["against_baseline"]
    if found is None:
        return []
    lines = [""]
    if (gain := found["gain"]) is not None:
        low, high = (number(end) for end in gain["interval"])
        lines.append(
            f"- better than the space's defaults by {number(gain['gain'])} on the same test rows (interval {low} to "
            f"{high}; below 0 is worse), which scored {number(found['score'])}"
        )
    return [*lines, *(f"- {name}: {verdicts.MEANING[name]}" for name in found["verdicts"])]
