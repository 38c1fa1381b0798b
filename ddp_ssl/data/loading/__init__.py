"""From image ids to batches: the order, reading, decoding and augmentation.

Only `dali.py` imports DALI, and it is imported when a loader is made.
"""
