"""The demo corpus: captioned procedural scenes, an analytic reader of them, and a web site that serves them.

In: a seed. Out: scenes with captions in English and Chinese, their images, and a score for any image that a
model draws for such a caption. It stands where the paper's 30 million pairs (section 2.4) stand, small enough for a
laptop and with an answer that can be checked.
"""
