"""What a loss is by chance: against the formulas that everybody knows, and for any labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.checks import chance


def of(kind: str, labels: Any, shape: tuple[int, ...], **config: Any) -> chance.Chance:
    found = chance.of(kind, config, np.asarray(labels), shape)
    assert found is not None
    return found


def test_balanced_classes_give_ln_c_whatever_their_encoding() -> None:
    numbers = np.arange(1000) % 10
    for kind, labels in (
        ("sparse_categorical_crossentropy", numbers),
        ("categorical_crossentropy", np.eye(10)[numbers]),
        ("crossentropy", np.eye(10)[numbers]),
    ):
        found = of(kind, labels, (10,))
        assert found.informed == pytest.approx(math.log(10)) and found.fresh == pytest.approx(math.log(10))
        assert found.perfect == 0 and found.why == "ln 10 = 2.303"


def test_unbalanced_classes_give_the_entropy_of_the_labels_to_a_model_that_knows_it() -> None:
    found = of("sparse_categorical_crossentropy", [0] * 90 + [1] * 10, (2,))
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert found.informed == pytest.approx(entropy) and found.fresh == pytest.approx(math.log(2))
    assert "0.3251, the entropy of the labels" in found.why
    binary = of("binary_crossentropy", [0] * 90 + [1] * 10, (1,))
    assert binary.informed == pytest.approx(entropy) and binary.fresh == pytest.approx(math.log(2))


def test_units_that_no_label_has_count_for_a_fresh_model() -> None:
    found = of("sparse_categorical_crossentropy", np.arange(90) % 3, (10,))
    assert found.informed == pytest.approx(math.log(3)) and found.fresh == pytest.approx(math.log(10))


def test_values_give_their_variance_or_their_distance_from_the_median() -> None:
    y = np.random.default_rng(0).normal(5, 3, 1001)
    assert of("mean_squared_error", y, (1,)).informed == pytest.approx(y.var())
    assert of("mean_absolute_error", y, (1,)).informed == pytest.approx(np.abs(y - np.median(y)).mean())
    two = np.stack([y, 10 * y], axis=1)
    assert of("mean_squared_error", two, (2,)).informed == pytest.approx((y.var() + 100 * y.var()) / 2)


def test_other_losses_of_values_give_what_the_best_constant_gives() -> None:
    y = np.random.default_rng(0).poisson(4, 2000).astype(float)
    best = y.mean()  # of Poisson's loss, too
    assert of("poisson", y, (1,)).informed == pytest.approx((best - y * np.log(best + 1e-7)).mean(), abs=1e-5)
    wide = of("huber", y, (1,), delta=1e6)  # is half of the square then
    assert wide.informed == pytest.approx(y.var() / 2, rel=1e-4)


def test_soft_labels_cannot_be_driven_to_nothing() -> None:
    found = of("categorical_crossentropy", [[0.9, 0.1], [0.1, 0.9]] * 10, (2,))
    assert found.perfect == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))


@pytest.mark.parametrize("kind", ["cosine_similarity", "kl_divergence", "categorical_hinge"])
def test_where_no_constant_says_it_nothing_is_said(kind: str) -> None:
    assert chance.of(kind, {}, np.ones((10, 3)), (3,)) is None


def test_outputs_add_up_by_their_weights() -> None:
    one = of("mean_squared_error", np.arange(10.0), (1,))
    both = chance.together([(1.0, one), (0.5, one)])
    assert both.informed == pytest.approx(1.5 * one.informed) and both.allowed == pytest.approx(1.5 * one.allowed)
    assert chance.together([(1.0, one)]) is one


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=60),
    st.sampled_from(["sparse_categorical_crossentropy", "mean_squared_error", "mean_absolute_error", "log_cosh"]),
)
def test_nothing_is_below_perfect_and_nothing_fresh_below_informed(labels: list[int], kind: str) -> None:
    found = of(kind, labels, (5,) if "cross" in kind else (1,))
    assert found.perfect <= found.informed + 1e-9 <= found.fresh + 2e-9 and found.informed <= found.allowed + 1e-9
