"""The scorer: Keras' numbers where Keras is right, exact ones where it is not, for every form of labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from search.errors import SpaceError, TrialFailed
from search.scorer import metrics
from search.scorer.scoring import Metric, direction_for, in_order, resolve, score, value_of

RNG = np.random.default_rng(0)


def output(loss="mse", logits=False, name="out", **more):
    return {
        "name": name,
        "loss": loss,
        "from_logits": logits,
        "label_smoothing": 0.0,
        "weight": 1.0,
        "shape": [None, 1],
        **more,
    }


def declared(loss="mse", logits=False, metric=None, **config):
    listed = [] if metric is None else [{"output": "out", "name": metric, "kind": metric, "config": config}]
    return {"outputs": [output(loss, logits)], "metrics": listed}


def scored(metric, predictions, labels, loss="mse", logits=False, **config):
    declaration = declared(loss, logits, metric, **config)
    objective = "val_loss" if metric is None else f"val_{metric}"
    return score(resolve(objective, declaration), declaration, predictions, labels)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


BINARY = RNG.integers(0, 2, 200)
SPARSE = RNG.integers(0, 4, 200)
LOGIT1 = RNG.normal(size=(200, 1)) + BINARY[:, None]
LOGITS = RNG.normal(size=(200, 4)) + np.eye(4)[SPARSE]
VALUES = RNG.normal(size=200)
GUESS = VALUES[:, None] + RNG.normal(size=(200, 1))


@pytest.mark.parametrize(
    ("kind", "labels", "predictions", "tolerance"),
    [
        ("accuracy", BINARY, sigmoid(LOGIT1), 1e-6),
        ("accuracy", SPARSE, softmax(LOGITS), 1e-6),
        ("accuracy", np.eye(4)[SPARSE], softmax(LOGITS), 1e-6),
        ("binary_accuracy", np.eye(4)[SPARSE], softmax(LOGITS), 1e-6),
        ("sparse_top_k_categorical_accuracy", SPARSE, softmax(LOGITS), 1e-6),
        ("binary_crossentropy", BINARY, sigmoid(LOGIT1), 1e-6),
        ("sparse_categorical_crossentropy", SPARSE, softmax(LOGITS), 1e-6),
        ("categorical_crossentropy", np.eye(4)[SPARSE], softmax(LOGITS), 1e-6),
        ("mse", VALUES, GUESS, 1e-5),
        ("mae", VALUES, GUESS, 1e-5),
        ("RootMeanSquaredError", VALUES, GUESS, 1e-5),
        ("mean_absolute_percentage_error", VALUES + 9, GUESS + 9, 1e-3),
        ("mean_squared_logarithmic_error", VALUES + 9, GUESS + 9, 1e-5),
        ("LogCoshError", VALUES, GUESS, 1e-5),
        ("CosineSimilarity", np.eye(4)[SPARSE], LOGITS, 1e-5),
        ("KLDivergence", softmax(LOGITS[::-1]), softmax(LOGITS), 1e-5),
        ("Poisson", VALUES + 9, GUESS + 9, 1e-4),
        ("Hinge", BINARY, LOGIT1, 1e-5),
        ("SquaredHinge", BINARY, LOGIT1, 1e-5),
        ("CategoricalHinge", np.eye(4)[SPARSE], LOGITS, 1e-5),
        ("R2Score", VALUES, GUESS, 1e-5),
        ("Precision", BINARY, sigmoid(LOGIT1), 1e-6),
        ("Recall", BINARY, sigmoid(LOGIT1), 1e-6),
        ("Precision", np.eye(4)[SPARSE], softmax(LOGITS), 1e-6),
        # Keras' AUC is a sum over 200 thresholds; ours is exact.
        ("AUC", BINARY, sigmoid(LOGIT1), 5e-3),
        ("AUC", np.eye(4)[SPARSE], softmax(LOGITS), 5e-3),
    ],
)
def test_agrees_with_what_keras_reports(kind, labels, predictions, tolerance):
    import keras

    model = keras.Sequential([keras.Input(predictions.shape[1:]), keras.layers.Identity()])
    model.compile(loss="mse", metrics=[getattr(keras.metrics, kind)() if kind[0].isupper() else kind])
    wide = labels[:, None] if labels.ndim == 1 else labels
    model.compute_metrics(None, wide.astype(np.float32), predictions.astype(np.float32))
    reported = list(model.get_metrics_result().values())[-1]
    assert scored(kind, predictions, labels).value == pytest.approx(float(reported), abs=tolerance)


@pytest.mark.parametrize(
    ("loss", "labels", "logits"),
    [
        ("binary_crossentropy", BINARY, LOGIT1),
        ("sparse_categorical_crossentropy", SPARSE, LOGITS),
        ("categorical_crossentropy", np.eye(4)[SPARSE], LOGITS),
    ],
)
def test_loss_on_logits_is_the_loss_on_probabilities(loss, labels, logits):
    probabilities = (sigmoid if logits.shape[1] == 1 else softmax)(logits)
    on_logits = scored(None, logits, labels, loss, logits=True)
    assert on_logits.value == pytest.approx(scored(None, probabilities, labels, loss).value, abs=1e-12)
    expected = sk.log_loss(
        labels if labels.ndim == 1 else labels.argmax(1), probabilities, labels=range(max(2, logits.shape[1]))
    )
    assert on_logits.value == pytest.approx(expected)
    assert on_logits.losses.mean() == pytest.approx(on_logits.value)


def test_certain_logits_are_not_clipped_but_probabilities_are():
    wrong = np.array([[40.0], [-40.0]])
    assert scored(None, wrong, np.array([0, 1]), "binary_crossentropy", logits=True).value == pytest.approx(
        40
    )
    assert scored(None, sigmoid(wrong), np.array([0, 1]), "bce").value == pytest.approx(
        -np.log(1e-7), rel=1e-6
    )


def test_accuracy_on_logits_thresholds_at_zero():
    probabilities = scored("accuracy", sigmoid(LOGIT1), BINARY, "binary_crossentropy")
    on_logits = scored("accuracy", LOGIT1, BINARY, "binary_crossentropy", logits=True)
    assert on_logits.value == probabilities.value == sk.accuracy_score(BINARY, LOGIT1[:, 0] > 0)
    chosen = scored("binary_accuracy", LOGIT1, BINARY, "binary_crossentropy", logits=True, threshold=0.7)
    assert chosen.value == sk.accuracy_score(BINARY, LOGIT1[:, 0] > 0.7)


@pytest.mark.parametrize("labels", [BINARY, BINARY[:, None], BINARY.astype(bool), BINARY.astype(np.float32)])
@pytest.mark.parametrize("shape", [(200,), (200, 1)])
def test_binary_labels_in_every_form(labels, shape):
    one = scored("accuracy", sigmoid(LOGIT1).reshape(shape), labels, "binary_crossentropy")
    assert one.value == sk.accuracy_score(BINARY, LOGIT1[:, 0] > 0)
    assert set(np.unique(one.losses)) == {0.0, 1.0} and one.losses.shape == (200,)


def test_sparse_and_one_hot_labels_score_alike():
    for metric in ("accuracy", "crossentropy", "f1_score", "mcc", "balanced_accuracy"):
        sparse, hot = (scored(metric, softmax(LOGITS), y) for y in (SPARSE[:, None], np.eye(4)[SPARSE]))
        assert sparse.value == pytest.approx(hot.value), metric
        assert sparse.parts == pytest.approx(hot.parts), metric


def test_metrics_of_counts_are_scikit_learns():
    guess = LOGITS.argmax(1)
    for average in ("macro", "micro", "weighted"):
        assert scored("f1_score", LOGITS, SPARSE, average=average).value == pytest.approx(
            sk.f1_score(SPARSE, guess, average=average)
        )
    assert scored("mcc", LOGITS, SPARSE).value == pytest.approx(sk.matthews_corrcoef(SPARSE, guess))
    assert scored("balanced_accuracy", LOGITS, SPARSE).value == pytest.approx(
        sk.balanced_accuracy_score(SPARSE, guess)
    )
    binary = LOGIT1[:, 0] > 0
    for metric, function in (
        ("f1_score", sk.f1_score),
        ("mcc", sk.matthews_corrcoef),
        ("balanced_accuracy", sk.balanced_accuracy_score),
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
    ):
        value = scored(metric, LOGIT1, BINARY, "binary_crossentropy", logits=True).value
        assert value == pytest.approx(function(BINARY, binary)), metric


def test_ranks_and_variances_are_scikit_learns():
    assert scored("auc", LOGIT1, BINARY).value == pytest.approx(sk.roc_auc_score(BINARY, LOGIT1[:, 0]))
    assert scored("auc", LOGIT1, BINARY, curve="PR").value == pytest.approx(
        sk.average_precision_score(BINARY, LOGIT1[:, 0])
    )
    labels, guess = RNG.normal(size=(50, 3)) + 100, RNG.normal(size=(50, 3)) + 100
    for average in ("uniform_average", "variance_weighted_average"):
        expected = sk.r2_score(
            labels, guess, multioutput=average.replace("variance_weighted_average", "variance_weighted")
        )
        assert scored("r2_score", guess, labels, class_aggregation=average).value == pytest.approx(expected)


def test_nothing_to_count_is_no_crash():
    none = np.full((4, 1), -1.0)
    assert scored("precision", none, np.array([1, 0, 1, 0])).value == 0
    assert scored("f1_score", none, np.zeros(4)).value == 0
    assert scored("mcc", none, np.array([1, 0, 1, 0])).value == 0
    assert scored("balanced_accuracy", none, np.zeros(4)).value == 1
    assert scored("r2_score", np.ones((4, 1)), np.ones(4)).value == 1
    assert scored("r2_score", np.zeros((4, 1)), np.ones(4)).value == 0


@pytest.mark.parametrize(
    "kind", ["accuracy", "mse", "rmse", "r2_score", "f1_score", "mcc", "auc", "average_precision"]
)
def test_parts_of_a_subset_give_the_score_of_the_subset(kind):
    predictions, labels = sigmoid(LOGIT1), BINARY
    whole, some = scored(kind, predictions, labels), RNG.integers(0, 200, 150)
    alone = scored(kind, predictions[some], labels[some])
    assert value_of(whole.metric, whole.parts[some]) == pytest.approx(alone.value)


def test_rmse_is_the_root_of_the_aggregate():
    one = scored("rmse", GUESS, VALUES)
    assert one.value == pytest.approx(np.sqrt(one.losses.mean()))
    assert scored("auc", LOGIT1, BINARY).losses is None


def test_sequences_count_one_example_per_row():
    labels = RNG.integers(0, 4, (10, 6))
    predictions = softmax(RNG.normal(size=(10, 6, 4)))
    accuracy = scored("accuracy", predictions, labels)
    assert accuracy.losses.shape == (10,)
    assert accuracy.value == pytest.approx((predictions.argmax(-1) == labels).mean())
    flat = scored("crossentropy", predictions.reshape(60, 4), labels.ravel())
    assert scored("crossentropy", predictions, labels).value == pytest.approx(flat.value)


TWO = {
    "outputs": [
        output("mse", name="a", weight=2.0),
        output("binary_crossentropy", True, name="b", weight=0.5),
    ],
    "metrics": [
        {"output": "a", "name": "a_mae", "kind": "mae", "config": {}},
        {"output": "b", "name": "accuracy", "kind": "accuracy", "config": {}},
    ],
}


def test_several_outputs_by_keras_names():
    predictions, labels = [GUESS, LOGIT1], [VALUES, BINARY]
    a, b = (score(resolve(f"val_{name}_loss", TWO), TWO, predictions, labels).value for name in "ab")
    total = score(resolve("val_loss", TWO), TWO, predictions, labels)
    assert total.value == pytest.approx(2 * a + 0.5 * b) == total.losses.mean()
    assert score(resolve("val_b_accuracy", TWO), TWO, predictions, labels).value == sk.accuracy_score(
        BINARY, LOGIT1[:, 0] > 0
    )
    assert resolve("val_a_mae", TWO) == Metric("mean_absolute_error", 0, {})


def test_total_loss_is_keras_without_penalties_and_smoothing():
    import keras

    x = RNG.normal(size=(200, 3)).astype(np.float32)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.1))]
    )
    model.compile(loss=loss)
    predictions, labels = model.predict(x, verbose=0), np.eye(4)[SPARSE]
    ours = scored(None, predictions, labels, "categorical_crossentropy", logits=True, label_smoothing=0.1)
    plain = keras.losses.CategoricalCrossentropy(from_logits=True)(labels, predictions)
    assert ours.value == pytest.approx(float(plain), abs=1e-5)
    assert ours.value < model.evaluate(x, labels, verbose=0) - 0.01


def test_an_unreported_objective_is_told_what_is_reported():
    with pytest.raises(
        SpaceError,
        match="'val_acc' is not; it reports val_loss, val_a_loss, val_b_loss, val_a_mae, val_b_accuracy",
    ):
        resolve("val_acc", TWO)
    for objective in ("accuracy", "b_accuracy", "val_val_b_accuracy"):
        with pytest.raises(SpaceError):
            resolve(objective, TWO)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("custom", {}),
        ("mean_io_u", {}),
        ("precision", {"top_k": 2}),
        ("precision", {"thresholds": [0.1, 0.9]}),
        ("r2_score", {"num_regressors": 2}),
        ("accuracy", {"dtype": "float32"}),
    ],
)
def test_what_only_keras_can_compute_is_custom(kind, config):
    metric = resolve(f"val_{kind}", declared("mse", False, kind, **config))
    assert metric.kind == "custom" and metric.is_custom
    with pytest.raises(ValueError, match="Keras object"):
        score(metric, declared(), GUESS, VALUES)


def test_losses_of_the_users_own_are_custom():
    assert resolve("val_loss", declared(None)).kind == "custom"
    # A Huber loss may have any delta; without the loss' settings its value cannot be trusted.
    assert resolve("val_loss", declared("huber")).kind == "custom"
    known = {"outputs": [output("huber", config={"delta": 2.0})], "metrics": []}
    error = np.abs(GUESS[:, 0] - VALUES)
    expected = np.where(error <= 2, error**2 / 2, 2 * error - 2).mean()
    assert score(resolve("val_loss", known), known, GUESS, VALUES).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("metric", "predictions", "labels", "words"),
    [
        ("mse", GUESS[:-3], VALUES, "197 for 200 rows"),
        ("mse", np.hstack([GUESS, GUESS]), VALUES, r"shape \(\) per row, but have \(2,\)"),
        ("mse", np.zeros((200, 2, 3)), np.zeros((200, 3, 2)), "labels' shape"),
        ("accuracy", LOGITS, SPARSE + 1, "0 to 3 for 4 outputs, but go from 1 to 4"),
        ("accuracy", LOGITS, np.zeros((200, 2, 1)), "one label per prediction"),
        ("auc", LOGIT1, np.ones(200), "two classes"),
        ("mse", [GUESS, GUESS], [VALUES, VALUES], "one array for each of 1 outputs, but there are 2"),
    ],
)
def test_predictions_that_do_not_fit_fail_the_trial(metric, predictions, labels, words):
    with pytest.raises(TrialFailed, match=words) as caught:
        scored(metric, predictions, labels)
    assert caught.value.reason == "invalid" and "\n" not in caught.value.message


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_fail_the_trial(bad):
    predictions = GUESS.copy()
    predictions[[4, 9]] = bad
    with pytest.raises(TrialFailed, match="2 bad rows of 200") as caught:
        scored("mse", predictions, VALUES)
    assert caught.value.reason == "nan"
    with pytest.raises(TrialFailed) as caught:
        scored("mse", GUESS * 1e200, VALUES)
    assert caught.value.reason == "nan"


@pytest.mark.parametrize(
    ("objective", "direction"),
    [
        ("val_loss", "min"),
        ("val_accuracy", "max"),
        ("val_r2_score", "max"),
        ("val_auc_1", "max"),
        ("val_head_loss", "min"),
        ("val_my_head_sparse_categorical_accuracy", "max"),
        ("val_RootMeanSquaredError", "min"),
        ("val_false_positives", "min"),
        ("val_f1_score", "max"),
    ],
)
def test_directions_have_a_table_of_their_own(objective, direction):
    assert direction_for(objective) == direction
    assert direction_for(objective, "min") == "min"


@pytest.mark.parametrize(
    "objective", ["val_profit", "val_neg_mean_squared_error", "val_1_minus_auc", "val_", "val_7"]
)
def test_unknown_directions_must_be_given(objective):
    with pytest.raises(SpaceError, match='add `direction = "max"`'):
        direction_for(objective)
    assert direction_for(objective, "max") == "max"
    with pytest.raises(SpaceError, match="'up'"):
        direction_for(objective, "up")


def test_every_kind_has_a_direction():
    for kind in metrics.KINDS:
        assert (direction_for(f"val_{kind}") == "max") == metrics.higher_is_better(kind)


def test_labels_come_in_the_order_of_the_outputs():
    a, b = in_order({"b": [2], "a": [1]}, ["a", "b"])
    assert (a, b) == ([1], [2])
    assert [part.tolist() for part in in_order((np.array([1]), np.array([2])), ["a", "b"])] == [[1], [2]]
    assert len(in_order(np.array([1, 2]), ["a"])) == 1
    with pytest.raises(TrialFailed, match="without c"):
        in_order({"a": [1]}, ["a", "c"])
