"""Interaction data: the event format on disk, importers, batches, metrics and floors."""
