"""Batch and request jobs around a trained model: summarize all users, score from the store, compare the two."""
