"""A run as a thing on disk and on the cluster."""
