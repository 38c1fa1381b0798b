"""What was learned: online probe, k-NN, and the figures of a validation pass."""
