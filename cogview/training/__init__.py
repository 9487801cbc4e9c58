"""Batches -> checkpoints and step metrics."""
