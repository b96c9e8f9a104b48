"""Text: an embedding, and a convolution or an LSTM over it, against a bag of words that knows no order.

The reviews are generated from a small grammar, in which "not" turns the next word of praise or blame around: who
counts words gets some of them wrong.

    heldout launch spaces/reviews.py --trials 30
"""

import keras
import numpy as np

from search import Dataset

objective = "val_accuracy"
epochs = 12
ROWS, LENGTH = 2400, 24
PRAISE, BLAME, OTHERS = range(2, 42), range(42, 82), range(82, 400)  # words by their number
NOT, WORDS = 1, 400  # 0 fills up short reviews


def load() -> Dataset:
    """2,400 reviews of 8 to 24 words, as numbers (24,), and whether praise prevails."""
    rng = np.random.default_rng(0)
    texts, praises = np.zeros((ROWS, LENGTH), "int32"), np.zeros((ROWS, 1), "float32")
    for row in range(ROWS):
        length = rng.integers(8, LENGTH + 1)
        words = rng.choice(OTHERS, length)
        places = np.sort(rng.choice(np.arange(1, length), 5, replace=False))
        balance = 0
        for place in places:
            praise, turned = rng.random() < 0.5, rng.random() < 0.4 and place - 1 not in places
            words[place] = rng.choice(PRAISE if praise else BLAME)
            if turned:
                words[place - 1] = NOT
            balance += 1 if praise != turned else -1
        texts[row, :length], praises[row] = words, balance > 0
    return Dataset(texts, praises)


def build(hp) -> keras.Model:
    """Three ways to read."""
    text = keras.Input((LENGTH,), dtype="int32")
    reader = hp.Choice("reader", ["bag", "convolution", "lstm"], default="convolution")
    x = keras.layers.Embedding(WORDS, hp.Int("embedding", 8, 64, step=2, sampling="log", default=16))(text)
    x = keras.layers.Dropout(hp.Float("word_dropout", 0.0, 0.5, step=0.1, default=0.2))(x)
    if reader == "convolution":
        kernel = hp.Choice("kernel", [2, 3, 5], default=3)
        x = keras.layers.Conv1D(hp.Int("filters", 16, 64, step=16, default=32), kernel, activation="relu")(x)
    if reader == "lstm":
        x = keras.layers.Bidirectional(keras.layers.LSTM(hp.Int("units", 8, 32, step=8, default=16)))(x)
    else:
        x = keras.layers.GlobalMaxPooling1D()(x) if hp.Boolean("largest") else keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.2))(x)
    model = keras.Model(text, keras.layers.Dense(1, activation="sigmoid")(x))

    hp.Choice("batch_size", [32, 64, 128], default=64)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 3e-4, 3e-2, sampling="log", default=3e-3)
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"])
    return model
