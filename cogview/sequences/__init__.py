"""Token rows -> SequenceBatch: layouts as data, the table of tasks, and batches of them."""
