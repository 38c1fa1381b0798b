"""From a data set's name to batches: `datasets/` finds the images, `loading/` makes batches."""
