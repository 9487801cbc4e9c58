"""The jobs: one file, one `make` target, one MLflow experiment, one output folder each. `python -m pipelines` is the
menu.
"""
