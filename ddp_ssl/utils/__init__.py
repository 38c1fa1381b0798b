"""Helpers for all parts of the package: seeds, files, texts, progress lines."""
