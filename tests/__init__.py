"""Tests of lightning_smoe: the folders mirror the package."""
