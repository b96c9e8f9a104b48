"""Blends: what is averaged, what greedy selection and Nelder-Mead promise, and that no row judges what it fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.ensembles import blending
from search.ensembles.blending import SIGMOID, SOFTMAX, VALUES, Blend
from search.errors import RequestError
from search.guard import statistics
from search.scorer import scoring
from search.scorer.metrics import Floats
from search.scorer.scoring import Metric


def declared(loss: str, kind: str | None = None, logits: bool = False, **config: Any) -> dict[str, Any]:
    output = {"name": "out", "loss": loss, "from_logits": logits, "config": {"from_logits": logits}}
    known = [{"output": "out", "name": kind, "kind": kind, "config": config}] if kind else []
    return {"outputs": [output], "metrics": known}


def blend_of(kind: str, predictions: Sequence[np.ndarray], labels: np.ndarray, direction: str, **more: Any) -> Blend:
    declaration = declared(more.pop("loss", "mse"), kind, **more)
    metric = scoring.resolve(f"val_{kind}", declaration)
    read = [blending.scales(declaration, metric)] * len(predictions)
    return Blend(metric, direction, declaration, [[one] for one in predictions], read, [labels])


def regression(seed: int, count: int, rows: int = 40) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(rows, 1))
    return [labels * rng.uniform(0.3, 1) + rng.normal(scale=0.7, size=(rows, 1)) for _ in range(count)], labels


def classification(seed: int, count: int, rows: int = 60, classes: int = 3) -> tuple[list[np.ndarray], np.ndarray]:
    """Probabilities of weak models, which see the label through noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = [np.eye(classes)[labels] * 1.5 + rng.normal(size=(rows, classes)) * 1.5 for _ in range(count)]
    return [np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in logits], labels


# ── what is averaged ─────────────────────────────────────────────────────────────────────────────


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def test_values_are_averaged_as_they_are() -> None:
    found = blending.average([np.array([1.0, 5.0]), np.array([3.0, 6.0])], np.array([0.25, 0.75]), [VALUES] * 2, VALUES)
    assert found == pytest.approx([2.5, 5.75])


def test_logits_are_averaged_as_probabilities_and_stay_logits() -> None:
    rng, weights = np.random.default_rng(0), np.array([0.2, 0.8])
    a, b = rng.normal(size=(2, 7, 4)) * 3
    mean = 0.2 * softmax(a) + 0.8 * softmax(b)
    found = blending.average([a, b], weights, [SOFTMAX] * 2, SOFTMAX)
    assert softmax(found) == pytest.approx(mean)
    assert blending.average([a, b], weights, [SOFTMAX] * 2, VALUES) == pytest.approx(mean)
    # A model that ends in a softmax beside one that does not: both say probabilities in the end.
    assert softmax(blending.average([a, softmax(b)], weights, [SOFTMAX, VALUES], SOFTMAX)) == pytest.approx(mean)

    mean = 0.2 * sigmoid(a) + 0.8 * sigmoid(b)
    found = blending.average([a, b], weights, [SIGMOID] * 2, SIGMOID)
    assert sigmoid(found) == pytest.approx(mean)
    assert sigmoid(blending.average([a, sigmoid(b)], weights, [SIGMOID, VALUES], SIGMOID)) == pytest.approx(mean)


@settings(deadline=None)
@given(st.floats(-300, 300), st.floats(-300, 300), st.floats(0.01, 0.99))
def test_sure_logits_do_not_overflow(a: float, b: float, weight: float) -> None:
    weights = np.array([weight, 1 - weight])
    for scale, arrays in ((SIGMOID, [[[a]], [[b]]]), (SOFTMAX, [[[a, 0.0]], [[b, 0.0]]])):
        found = blending.average([np.array(one) for one in arrays], weights, [scale] * 2, scale)
        assert np.isfinite(found).all()
        logit = found[0, 0] - (found[0, 1] if scale == SOFTMAX else 0.0)
        assert min(a, b) - 1e-6 <= logit <= max(a, b) + 1e-6


@pytest.mark.parametrize(
    ("declaration", "objective", "wanted"),
    [
        (declared("sparse_categorical_crossentropy", "accuracy"), "val_accuracy", VALUES),
        (declared("sparse_categorical_crossentropy", "accuracy", logits=True), "val_accuracy", SOFTMAX),
        (declared("binary_crossentropy", "auc", logits=True), "val_auc", SIGMOID),
        (declared("binary_focal_crossentropy", "accuracy", logits=True), "val_accuracy", SIGMOID),
        (declared("binary_crossentropy", logits=True), "val_loss", SIGMOID),
        (declared("mse", "mean_absolute_error"), "val_mean_absolute_error", VALUES),
        # The metric's own setting counts, as it does for the scorer.
        (declared("mse", "binary_crossentropy", from_logits=True), "val_binary_crossentropy", SIGMOID),
    ],
)
def test_how_outputs_are_read(declaration: dict[str, Any], objective: str, wanted: str) -> None:
    assert blending.scales(declaration, scoring.resolve(objective, declaration)) == [wanted]


def test_logits_of_a_loss_that_is_not_known_are_refused() -> None:
    declaration = declared("my_loss", "accuracy", logits=True)
    with pytest.raises(RequestError, match="end the model in a softmax or a sigmoid"):
        blending.scales(declaration, Metric("accuracy", 0))


def test_a_blend_of_logits_scores_what_its_probabilities_score() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 50)
    logits = [np.eye(3)[labels] + rng.normal(size=(50, 3)) for _ in range(3)]
    weights = np.array([0.5, 0.25, 0.25])
    kind, loss = "sparse_categorical_crossentropy", "sparse_categorical_crossentropy"
    by_logits = blend_of(kind, logits, labels, "min", loss=loss, logits=True)
    by_shares = blend_of(kind, [softmax(z) for z in logits], labels, "min", loss=loss)
    assert by_logits.loss(weights) == pytest.approx(by_shares.loss(weights))


def test_other_outputs_than_the_scored_one_are_averaged_in_the_end() -> None:
    outputs = [{"name": name, "loss": "mse", "from_logits": False} for name in ("a", "b")]
    known = [{"output": "b", "name": "b_mae", "kind": "mae", "config": {}}]
    declaration = {"outputs": outputs, "metrics": known}
    metric = scoring.resolve("val_b_mae", declaration)
    predictions = [[np.full((4, 1), k), np.full((4, 1), 10.0 * k)] for k in (0, 1)]
    blend = Blend(metric, "min", declaration, predictions, [[VALUES, VALUES]] * 2, [np.zeros((4, 1))] * 2)
    assert blend.loss(np.array([0.5, 0.5])) == 5
    a, b = blend.outputs(np.array([0.5, 0.5]))
    assert (a == 0.5).all() and (b == 5).all()


# ── greedy selection ─────────────────────────────────────────────────────────────────────────────


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), size=st.integers(1, 8))
def test_greedy_weights_are_shares_of_picks_and_never_worse_than_the_best_single_model(
    seed: int, count: int, size: int
) -> None:
    for kind, direction, made in (
        ("mean_squared_error", "min", regression(seed, count)),
        ("accuracy", "max", classification(seed, count)),
        ("r2_score", "max", regression(seed, count)),
    ):
        blend = blend_of(kind, *made, direction)
        weights = blending.greedy(blend.loss, count, size)
        assert weights.shape == (count,) and weights.sum() == pytest.approx(1) and (weights >= 0).all()
        assert any(np.allclose(weights * k, np.round(weights * k)) for k in range(1, size + 1))
        best = min(blend.loss(one) for one in np.eye(count))
        assert blend.loss(weights) <= best + 1e-12 * abs(best)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(5)))
def test_greedy_weights_do_not_depend_on_the_order_of_the_models(seed: int, order: list[int]) -> None:
    predictions, labels = regression(seed, 5)
    weights = blending.greedy(blend_of("mean_squared_error", predictions, labels, "min").loss, 5, 6)
    turned = blend_of("mean_squared_error", [predictions[k] for k in order], labels, "min")
    assert blending.greedy(turned.loss, 5, 6) == pytest.approx(weights[order])


def test_more_picks_are_no_worse_and_errors_that_cancel_are_found() -> None:
    labels = np.zeros((4, 1))
    up, down, poor = labels + 1.0, labels - 1.0, labels + 0.9
    blend = blend_of("mean_squared_error", [poor, up, down], labels, "min")
    assert blending.greedy(blend.loss, 3, 1).tolist() == [1, 0, 0]
    two = blending.greedy(blend.loss, 3, 2)
    assert two.tolist() == [0.5, 0, 0.5]
    losses = [blend.loss(blending.greedy(blend.loss, 3, size)) for size in range(1, 12)]
    assert losses == sorted(losses, reverse=True)


def test_ties_go_to_the_least_picked_and_then_to_the_first() -> None:
    # With a metric that goes in steps all models may be right; then there is no reason to take one alone.
    assert blending.greedy(lambda _: 0.0, 3, 5).tolist() == [0.4, 0.4, 0.2]
    assert blending.greedy(lambda w: 0.0 if w[0] == 1 else 1.0, 3, 5).tolist() == [1, 0, 0]
    assert blending.greedy(lambda _: float("inf"), 2, 2).sum() == 1


def test_nelder_mead_is_never_worse_than_equal_weights_and_finds_the_best_of_two() -> None:
    labels = np.zeros((6, 1))
    blend = blend_of("mean_squared_error", [labels + 3.0, labels - 1.0], labels, "min")
    assert blending.nelder_mead(blend.loss, 2) == pytest.approx([0.25, 0.75], abs=0.01)
    for seed in range(5):
        blend = blend_of("accuracy", *classification(seed, 4), "max")
        weights = blending.nelder_mead(blend.loss, 4)
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
        assert blend.loss(weights) <= blend.loss(np.full(4, 0.25))


# ── cross-fitting ────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(rows=st.integers(2, 300), seed=st.integers(0, 99))
def test_folds_of_single_rows_are_about_equal(rows: int, seed: int) -> None:
    found = blending.folds(rows, None, False, seed=seed)
    sizes = np.bincount(found)
    assert len(found) == rows and len(sizes) == min(5, rows) and np.ptp(sizes) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=200), st.integers(0, 9))
def test_a_group_is_never_divided(groups: list[int], seed: int) -> None:
    units = statistics.units_of(len(groups), np.array(groups), False)
    found = blending.folds(len(groups), units, False, seed=seed)
    for group in set(groups) if units is not None else ():
        assert len(set(found[np.array(groups) == group])) == 1
    assert set(found) == set(range(min(5, len(set(groups)) if units is not None else len(groups))))


@settings(deadline=None)
@given(st.integers(30, 400))
def test_folds_of_rows_in_order_of_time_are_stretches_of_whole_blocks(rows: int) -> None:
    units = statistics.units_of(rows, None, True)
    assert units is not None
    found = blending.folds(rows, units, True)
    assert (np.diff(found) >= 0).all() and set(found) == set(range(min(5, units.max() + 1)))
    for block in range(units.max() + 1):
        assert len(set(found[units == block])) == 1


@settings(deadline=None)
@given(rows=st.integers(10, 120), grouped=st.booleans(), ordered=st.booleans(), seed=st.integers(0, 99))
def test_no_row_judges_what_was_fitted_to_it(rows: int, grouped: bool, ordered: bool, seed: int) -> None:
    groups = np.random.default_rng(seed).integers(0, 7, rows) if grouped else None
    units = statistics.units_of(rows, groups, ordered)
    fold_of = blending.folds(rows, units, ordered and not grouped, seed=seed)
    looked = []

    def fit(at: np.ndarray) -> frozenset[int]:
        looked.append(set(at.tolist()))
        return frozenset(at.tolist())

    def judge(fitted: frozenset[int]) -> Floats:  # 1 where a row was looked at
        return np.array([[float(row in fitted)] for row in range(rows)])

    assert (blending.cross_fitted(fold_of, fit, judge) == 0).all()
    for row in range(rows):  # and each row is looked at by all folds but its own
        assert sum(row in seen for seen in looked) == len(looked) - 1
    if groups is not None and units is not None:
        for seen in looked:
            assert not {groups[row] for row in seen} & {groups[row] for row in set(range(rows)) - seen}


def test_what_is_fitted_to_some_rows_depends_on_no_other_row() -> None:
    """Labels of the rows held out may be anything: weights stay the same, to the bit."""
    predictions, labels = classification(1, 4)
    at = np.arange(0, 60, 2)
    other = labels.copy()
    other[1::2] = (other[1::2] + 1) % 3
    for fit in (lambda b: blending.greedy(b.loss, 4, 5), lambda b: blending.nelder_mead(b.loss, 4)):
        one, two = (fit(blend_of("accuracy", predictions, known, "max").on(at)) for known in (labels, other))
        assert one.tolist() == two.tolist()


def test_cross_fitting_corrects_what_fitting_flatters() -> None:
    """Models that know nothing: fitted weights look better than chance on their own rows, cross-fitted ones do not."""
    flattered, judged = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels, predictions = rng.integers(0, 2, 200), [rng.random((200, 1)) for _ in range(15)]
        blend = blend_of("accuracy", predictions, labels, "max", loss="binary_crossentropy")
        flattered.append(-blend.loss(blending.greedy(blend.loss, 15, 5)))
        parts = blending.cross_fitted(
            blending.folds(200, None, False), lambda at, b=blend: blending.greedy(b.on(at).loss, 15, 5), blend.parts
        )
        judged.append(scoring.value_of(blend.metric, parts))
    assert np.mean(flattered) > 0.58
    assert np.mean(judged) == pytest.approx(0.5, abs=0.03)  # four standard errors: 0.035 / √20


def test_correlations_say_nothing_of_what_does_not_vary() -> None:
    a, b = np.array([0.0, 1, 0, 1]), np.array([0.0, 1, 1, 1])
    found = blending.correlations([a, b, np.ones(4)])
    assert found[0][0] == pytest.approx(1) and found[0][1] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found[2] == [None, None, None]
    assert blending.correlations([a]) == [[pytest.approx(1)]]
