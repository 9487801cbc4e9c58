"""The study of `human_evaluation`: groups of pictures, blind ballots, votes that last, and the pages."""
