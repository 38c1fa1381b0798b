"""A run from its first step to its last: the loop and the parts around it."""
