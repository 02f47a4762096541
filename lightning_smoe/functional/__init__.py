"""The formulas: tensors in, tensors out; they know torch, scipy and scikit-learn only."""
