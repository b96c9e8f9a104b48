"""The guard: which model is chosen, what its score is worth, and the one opening of the test set."""
