"""Other tools' checkpoints in our format."""
