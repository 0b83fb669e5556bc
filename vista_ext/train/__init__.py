"""Training: steps, checkpoints, evaluation, records."""
