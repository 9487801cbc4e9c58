"""Prompt and checkpoint -> samples."""
