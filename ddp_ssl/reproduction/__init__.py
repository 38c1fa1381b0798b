"""The tables and figures of AdaDim and of the multi-view paper: their runs and results."""
