"""Wide and deep: two inputs, two outputs, and how much each output's loss counts.

The wide part learns by heart what pairs of codes are worth, the deep part generalises (Cheng et al., DLRS 2016). The
rows are generated: offers of goods with a shop and a kind, their price, and whether they were sold.

    heldout launch spaces/wide_deep.py --trials 40
"""

import keras
import numpy as np

from search import Dataset

objective = "val_sold_accuracy"  # of the output "sold"; val_loss would weigh both
epochs = 20
ROWS, SHOPS, KINDS = 3000, 12, 20


def load() -> Dataset:
    """3,000 rows: ``measures`` (4,) and ``codes`` (shop, kind) to ``price``, of mean 0 and spread 1, and ``sold``."""
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, SHOPS, ROWS), rng.integers(0, KINDS, ROWS)], axis=1)
    measures = rng.normal(size=(ROWS, 4)).astype("float32")
    pair = rng.normal(size=(SHOPS, KINDS))[codes[:, 0], codes[:, 1]]
    price = pair + np.sin(2 * measures[:, 0]) + measures[:, 1] * measures[:, 2] + 0.3 * rng.normal(size=ROWS)
    price = (price - price.mean()) / price.std()
    sold = rng.random(ROWS) < 1 / (1 + np.exp(3 * price - 2 * measures[:, 3]))
    # The first output's labels are those by which rows are divided evenly.
    y = {"sold": sold.astype("float32")[:, None], "price": price.astype("float32")[:, None]}
    return Dataset({"codes": codes.astype("int32"), "measures": measures}, y)


def build(hp) -> keras.Model:
    """A linear part over crossed codes beside a dense part over their embeddings."""
    codes = keras.Input((2,), dtype="int32", name="codes")
    measures = keras.Input((4,), name="measures")
    size = hp.Int("embedding", 2, 16, step=2, sampling="log", default=8)
    shop, kind = codes[:, 0], codes[:, 1]
    x = keras.layers.Concatenate()(
        [measures, keras.layers.Embedding(SHOPS, size)(shop), keras.layers.Embedding(KINDS, size)(kind)]
    )
    for number in range(hp.Int("layers", 1, 3, default=2)):
        x = keras.layers.Dense(hp.Int(f"units_{number}", 16, 128, step=2, sampling="log", default=64), "relu")(x)
        x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0))(x)
    parts = [x]
    if hp.Boolean("wide", default=True):
        crossed = shop * KINDS + kind
        parts.append(keras.layers.Embedding(SHOPS * KINDS, 2, embeddings_initializer="zeros")(crossed))
    together = keras.layers.Concatenate()(parts) if len(parts) > 1 else x
    sold = keras.layers.Dense(1, activation="sigmoid", name="sold")(together)
    price = keras.layers.Dense(1, name="price")(together)
    model = keras.Model({"codes": codes, "measures": measures}, {"sold": sold, "price": price})

    hp.Choice("batch_size", [32, 64, 128], default=64)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=1e-3)
    model.compile(
        keras.optimizers.Adam(rate),
        loss={"sold": "binary_crossentropy", "price": "mse"},
        loss_weights={"sold": 1.0, "price": hp.Float("price_weight", 0.01, 10.0, sampling="log", default=1.0)},
        metrics={"sold": ["accuracy"], "price": ["mae"]},
    )
    return model
