"""One run on disk and on the cluster: folder, status, environment, signals, watchdog."""
