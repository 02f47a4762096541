"""Plans, and carrying them out."""
