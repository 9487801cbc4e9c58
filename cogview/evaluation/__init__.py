"""From samples to scores: what a model drew, how well it fits what was asked for, and sheets of pictures to look at.

In: samples, a checkpoint and held-out token rows. Out: scores, each with its n, and images (sections 2.2 and 3 of the
paper: reconstruction quality and the quality of what is generated).
"""
