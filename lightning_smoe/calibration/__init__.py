"""What the experts do on real text."""
