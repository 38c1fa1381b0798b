"""From names to batches: datasets, sample order, views, the DALI pipeline and its loader."""
