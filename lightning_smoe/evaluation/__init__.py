"""What was kept, on held-out text."""
