"""What MLflow is told of a study, and the processes that tell it."""
