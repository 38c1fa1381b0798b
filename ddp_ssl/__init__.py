"""ddp_ssl: self-supervised visual pretraining on many GPUs, exact over the global batch.

Importing the package imports no torch, so that a typo in a config answers at once.
"""

__version__ = "0.1.0"
