"""CogView: text and VQ image tokens in one GPT. A library of rooms; see README.md for the walk through them."""

__version__ = "0.1.0"
