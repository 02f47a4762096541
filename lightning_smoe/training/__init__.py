"""Recovering what compression lost."""
