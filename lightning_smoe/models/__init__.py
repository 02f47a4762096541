"""Mixture-of-experts models and their checkpoints."""
