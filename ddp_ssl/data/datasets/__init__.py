"""The images of a data set and their classes, found by name. Nothing here imports DALI.

`registry.py` chooses the definition of a data set. It also does the work common to all of them:
held-out images, `data.fraction` and `data.skip`. numpy only at import.
"""
