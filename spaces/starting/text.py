"""Short texts of two kinds, to be told apart: a start for your own.

Runs as it is, on reviews that are made up. Replace what is marked with YOURS, then:

    heldout check text.py --sanity
    heldout launch text.py --trials 30
"""

import keras
import numpy as np

from search import Dataset

objective = "val_accuracy"
epochs = 15  # at most: training stops when the objective has not improved for a while

WORDS = 5000  # YOURS: the most frequent words that are told apart
LENGTH = 40  # YOURS: words of a text that are read
CLASSES = 2  # YOURS: how many kinds there are


def load() -> Dataset:
    """Every labelled text. Heldout splits them."""
    texts, kinds = made_up()
    # YOURS: in place of the line above, for a table with the columns "text" and "kind" (numbers 0, 1, 2, …):
    # import pandas
    # table = pandas.read_csv("/path/to/reviews.csv")
    # texts, kinds = table["text"].to_numpy(str), table["kind"].to_numpy("int64")
    return Dataset(np.array(texts)[:, None], np.array(kinds))


def made_up() -> tuple[list[str], list[int]]:
    """2,000 reviews, in which "not" turns the next word around. YOURS: not needed any more."""
    rng = np.random.default_rng(0)
    praise, blame = "good great lovely bright clever".split(), "bad dull awful slow clumsy".split()
    others = "the a film plot cast music scene end and with of very quite this story".split()
    texts, kinds = [], []
    for _ in range(2000):
        words, balance = list(rng.choice(others, rng.integers(8, 20))), 0
        for place in sorted(rng.choice(len(words), 3, replace=False), reverse=True):
            likes, turned = rng.random() < 0.5, rng.random() < 0.3
            words[place:place] = ["not"] * turned + [str(rng.choice(praise if likes else blame))]
            balance += 1 if likes != turned else -1
        texts.append(" ".join(words))
        kinds.append(int(balance > 0))
    return texts, kinds


def preprocess(train: Dataset) -> keras.Model:
    """Words as numbers, learned on train rows only. Becomes part of the exported model, which takes plain text."""
    vectorize = keras.layers.TextVectorization(max_tokens=WORDS, output_sequence_length=LENGTH)
    vectorize.adapt(train.x)
    return keras.Sequential([keras.Input((1,), dtype="string"), vectorize])


def build(hp) -> keras.Model:
    """A bag of words, a convolution or an LSTM; each `hp` call declares a parameter where it is used."""
    text = keras.Input((LENGTH,), dtype="int64")
    x = keras.layers.Embedding(WORDS, hp.Int("embedding", 8, 64, step=2, sampling="log", default=16))(text)
    reader = hp.Choice("reader", ["bag", "convolution", "lstm"], default="convolution")
    if reader == "convolution":
        filters = hp.Int("filters", 16, 64, step=16, default=32)
        x = keras.layers.Conv1D(filters, hp.Choice("kernel", [2, 3, 5], default=3), activation="relu")(x)
    if reader == "lstm":
        x = keras.layers.Bidirectional(keras.layers.LSTM(hp.Int("units", 8, 32, step=8, default=16)))(x)
    else:
        x = keras.layers.GlobalMaxPooling1D()(x)
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.2))(x)
    model = keras.Model(text, keras.layers.Dense(CLASSES, activation="softmax")(x))

    hp.Choice("batch_size", [32, 64, 128], default=32)  # reaches training by its name
    rate = hp.Float("learning_rate", 3e-4, 3e-2, sampling="log", default=3e-3)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
