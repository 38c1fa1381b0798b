"""Lines for people, rows for programs."""
