"""The picture: written whole, of the right size, and with no label on another, whatever the scores are."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from search.shown import picture

SERIES = [(0, 0.9, 0.91), (1, 0.95, None), (2, 0.95, None), (7, 0.981, 0.97)]


def found(best: float = 0.975, worse: float = 0.945, width: float = 0.02, **changed: Any) -> dict[str, Any]:
    """A report of a winner near ``best`` and a baseline near ``worse``, in every tier."""

    def around(value: float) -> list[float]:
        return [value - width, value + width / 2]

    def role(trial: int, value: float) -> dict[str, Any]:
        tiers = {"validation": value, "guard": value - width / 3}
        return {"trial": trial, **tiers, **{f"{tier}_interval": around(score) for tier, score in tiers.items()}}

    return {
        "study": "digits-1",
        "objective": "val_accuracy",
        "direction": "max",
        "proportion": True,
        "winner": role(34, best),
        "baseline": role(40, worse),
        "corrected": {"estimate": best - width / 4, "interval": around(best)},
        "test": {
            "winner": best - width / 2,
            "interval": around(best),
            "baseline": worse,
            "baseline_interval": around(worse),
        },
    } | changed


LOSS = {"objective": "val_mean_squared_error", "direction": "min", "proportion": False}
CASES = {
    "accuracy with all parts": (found(), SERIES),
    "loss without test": (found(0.2, 0.4, 0.05, test=None, **LOSS), [(n, 1 - v, g) for n, v, g in SERIES]),
    "losses on several magnitudes": (
        found(0.2, 60.0, 0.01, **LOSS),
        [(0, 900.0, 950.0), (1, 2.0, 1.9), (2, 0.2, 0.21)],
    ),
    "losses that need exponents": (found(2e-6, 3e-6, 1e-7, **LOSS), [(0, 3e-6, 3e-6), (1, 2e-6, 2.1e-6)]),
    "one trial": (found(), [(0, 0.981, 0.98)]),
    "all right, with intervals that are points": (found(1.0, 1.0, 0.0), [(0, 1.0, 1.0), (1, 1.0, 1.0)]),
    "intervals that are almost points": (found(0.5, 0.5, 1e-9), [(0, 0.5, 0.5), (1, 0.5 + 1e-9, 0.5)]),
    "losses that are 0": (found(0.0, 0.0, 0.0, **LOSS), [(0, 0.0, 0.0)]),
    "no guard scores": (found(corrected=None), [(0, 0.9, None), (1, 0.95, None)]),
    "no baseline": (found(baseline=None), SERIES),
    "nothing": (found(winner=None, baseline=None, corrected=None, test=None), []),
    "long names": (found(study="s" * 100, objective="val_top_k_categorical_accuracy"), SERIES),
    "marks of mathematics": (found(objective="val_$_^{a"), SERIES),
}


def written(figure: Any) -> list[Any]:
    """Every piece of text of a figure, with the place it takes in pixels."""
    figure.canvas.draw()
    texts = [figure._suptitle]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title]
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
                texts += [label for at, label in ticks if low <= at <= high]
            texts += [axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts()]
    return [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text() and t.get_visible()]


def overlapping(texts: list[Any]) -> list[tuple[str, str]]:
    return [(one, other) for (one, a), (other, b) in itertools.combinations(texts, 2) if a.overlaps(b)]


@pytest.mark.parametrize("report, series", CASES.values(), ids=CASES)
def test_no_label_lies_on_another_or_outside(report: dict[str, Any], series: Any) -> None:
    texts = written(picture.figure(report, series))
    assert not overlapping(texts)
    for text, box in texts:
        assert 0 <= box.x0 and box.x1 <= 1200 and 0 <= box.y0 and box.y1 <= 520, text


# Numbers that are awkward to write, rather than any: each drawing takes a fifth of a second.
MAGNITUDES = st.sampled_from([1e-6, 9.9999e-5, 0.99999, 1.0, 12345.678, 1e6])


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    MAGNITUDES,
    st.sampled_from([0.01, 1.0, 1.5, 100.0]),
    st.sampled_from([0.0, 1e-9, 0.3]),
    st.lists(st.tuples(MAGNITUDES, st.none() | MAGNITUDES), min_size=1, max_size=3),
)
@example(210927.489, 0.0627, 0.154, [(229561.2, 227574.9)])
@example(12345.678, 1.0, 0.0, [(9.9999e-05, 12345.678)])
def test_no_label_lies_on_another_for_any_scores(best: float, ratio: float, width: float, scores: Any) -> None:
    report = found(best, best * ratio, best * min(1, ratio) * width, **LOSS)
    assert not overlapping(written(picture.figure(report, [(n, v, g) for n, (v, g) in enumerate(scores)])))


def test_it_is_a_png_of_its_size_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "study.png"
    path.write_bytes(b"an older picture")
    picture.draw(path, found(), SERIES)
    assert path.read_bytes().startswith(b"\x89PNG") and struct.unpack(">II", path.read_bytes()[16:24]) == (1200, 520)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_older_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.png"
    path.write_bytes(b"an older picture")

    def full(_: Any, to: Path, **__: Any) -> None:
        to.write_bytes(b"half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        picture.draw(path, found(), SERIES)
    assert path.read_bytes() == b"an older picture" and list(tmp_path.iterdir()) == [path]


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_it_shows_the_scores_of_the_report_by_tier() -> None:
    left, _ = picture.figure(found(), SERIES).axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["validation", "guard\n(winner: corrected)", "test"]
    assert sorted(labels(left)) == sorted(["97.5 %", "97.0 %", "96.5 %", "94.5 %", "93.8 %", "94.5 %"])
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["winner", "baseline"]


def test_a_score_that_is_not_corrected_is_not_called_so() -> None:
    report = found(corrected={"estimate": 0.5, "interval": None})
    left, _ = picture.figure(report, SERIES).axes
    assert "guard" in [text.get_text() for text in left.get_yticklabels()] and "50.0 %" not in labels(left)


def test_a_winner_that_is_the_baseline_is_drawn_once() -> None:
    report = found()
    report["baseline"] = report["winner"]
    left, _ = picture.figure(report, SERIES).axes
    assert len(labels(left)) == 3 and len(left.get_legend().get_texts()) == 1


def test_roles_with_a_validation_score_only_are_drawn() -> None:
    left, _ = picture.figure(found(baseline={"trial": 0, "validation": 0.9}, test=None), SERIES).axes
    assert "90.0 %" in labels(left) and len(labels(left)) == 3


def test_the_history_has_the_series_and_names_where_it_ends() -> None:
    _, right = picture.figure(found(), SERIES).axes
    lines = {line.get_linestyle(): line for line in right.lines if len(line.get_xdata()) == 4}
    assert list(lines["-"].get_xdata()) == [0, 1, 2, 7] and list(lines["-"].get_ydata()) == [0.9, 0.95, 0.95, 0.981]
    assert [str(value) for value in lines["--"].get_ydata()] == ["0.91", "nan", "nan", "0.97"]
    assert {line.get_drawstyle() for line in lines.values()} == {"steps-post"}
    assert labels(right) == ["98.1 %", "97.0 %"] and right.get_xlabel() == "trial"


@pytest.mark.parametrize("worst, scale", [(51.0, "log"), (49.0, "linear")])
def test_magnitudes_get_a_log_scale(worst: float, scale: str) -> None:
    _, right = picture.figure(found(0.2, 0.4, 0.05, **LOSS), [(0, worst, None), (1, 1.0, None)]).axes
    assert right.get_yscale() == scale


def test_losses_below_zero_stay_on_a_linear_scale() -> None:
    _, right = picture.figure(found(0.2, 0.4, 0.05, **LOSS), [(0, 60.0, None), (1, -1.0, None)]).axes
    assert right.get_yscale() == "linear"


def test_pyplot_is_never_loaded() -> None:
    code = "import sys, search.shown.picture; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
