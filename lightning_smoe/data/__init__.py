"""Text, as batches of tokens with their domains."""
