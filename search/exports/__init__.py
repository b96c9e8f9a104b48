"""What an export writes: model files of several formats, each checked, and the model card."""
