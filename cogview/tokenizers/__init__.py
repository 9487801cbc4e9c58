"""text, pixels -> ids, codes: the text tokenizer, the image tokenizer, and the vocabulary that joins them."""
