"""Ensembles: which trained models are averaged, what that is worth, and one Keras model that does it."""
