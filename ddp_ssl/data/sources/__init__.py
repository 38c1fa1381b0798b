"""What a named data set looks like on disk: one function that finds it, one that loads it.

`datasets.py` chooses among them and does what is common to all: held-out images, `data.fraction`
and `data.skip`. numpy only at import.
"""
