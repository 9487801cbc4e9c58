"""Promises and how to measure them: `make verify NAME=road`. Each file states its bars and runs the real thing."""
