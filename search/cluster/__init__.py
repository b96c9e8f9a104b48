"""Running trials on a Ray cluster: connecting, the agents on its nodes, the files that travel, and the executor."""
