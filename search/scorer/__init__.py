"""The one scorer: from predictions and labels of any tier to a score, by what the model declares of itself."""
