"""What to return from ``preprocess(train)`` in place of something that is no Keras model."""

from __future__ import annotations

from typing import Any

_NORMALIZED = "keras.layers.Normalization(), after its adapt(train.x)"
_LOOKED_UP = "keras.layers.StringLookup or IntegerLookup with output_mode='one_hot', after its adapt(...)"
_WITH_CONSTANTS = "keras.layers.Rescaling(1 / (high - low), offset=-low / (high - low)) of train.x"

# scikit-learn's transformers, and what does the same inside of a model.
_INSTEAD = {
    "StandardScaler": _NORMALIZED,
    "RobustScaler": "keras.layers.Normalization(mean=..., variance=...) with the median and squared range of train.x",
    "MinMaxScaler": _WITH_CONSTANTS,
    "MaxAbsScaler": "keras.layers.Rescaling(1 / abs(train.x).max(axis=0))",
    "Normalizer": "keras.layers.UnitNormalization()",
    "OneHotEncoder": _LOOKED_UP,
    "OrdinalEncoder": "keras.layers.StringLookup or IntegerLookup, after its adapt(...)",
    "LabelBinarizer": _LOOKED_UP,
    "KBinsDiscretizer": "keras.layers.Discretization(num_bins=...), after its adapt(train.x)",
    "CountVectorizer": "keras.layers.TextVectorization(output_mode='count'), after its adapt(train.x)",
    "TfidfVectorizer": "keras.layers.TextVectorization(output_mode='tf_idf'), after its adapt(train.x)",
    "HashingVectorizer": "keras.layers.Hashing(num_bins=...)",
    "FeatureHasher": "keras.layers.Hashing(num_bins=...)",
    "PCA": "a Normalization for the mean and a Dense layer with trainable=False that holds pca.components_.T",
    "TruncatedSVD": "a Dense layer with use_bias=False and trainable=False that holds svd.components_.T",
    "Pipeline": "one keras.Sequential of layers that do its steps",
    "ColumnTransformer": "one keras.Model with an input for each part of x, a layer for each, and Concatenate",
}


def refusal(returned: Any) -> str:
    """Why this cannot be what ``preprocess(train)`` returns, and what could.

    Args:
        returned: What it returned, not a ``keras.Model``.
    """
    import keras

    kind = type(returned).__name__
    must = "preprocess(train) must return a keras.Model"
    if returned is None:
        return f"{must}, but returned nothing; add `return keras.Sequential([keras.Input(...), layer])`"
    if isinstance(returned, keras.layers.Layer):
        return (
            f"{must}, but returned the layer {kind} alone; return keras.Sequential([keras.Input(train.x.shape[1:]), "
            "layer])"
        )
    if type(returned).__module__.partition(".")[0] == "sklearn":
        instead = _INSTEAD.get(kind, "a layer of Keras that does the same, such as Normalization, adapted on train.x")
        return (
            f"{must}, which goes into the exported model, but returned scikit-learn's {kind}, which nothing can export "
            f"with it; take {instead}, in keras.Sequential([keras.Input(...), ...])"
        )
    if hasattr(returned, "shape") or kind in ("Dataset", "tuple", "list", "dict"):
        return (
            f"{must} that does it to any rows, but returned rows ({kind}); return the layers that make them, such as "
            "keras.Sequential([keras.Input(...), normalization])"
        )
    return f"{must}, such as keras.Sequential([keras.Input(...), normalization]), but returned {kind}"
