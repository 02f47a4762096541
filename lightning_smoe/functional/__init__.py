"""Tensors in, tensors out: the formulas, which know torch, scipy and scikit-learn and nothing else."""
