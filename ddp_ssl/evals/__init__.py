"""Evaluations of a representation: k-NN, linear classifiers, fine-tuning, a validation pass."""
