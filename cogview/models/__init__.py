"""SequenceBatch tensors -> logits."""
