"""One file per method; the file's name is `method.name`."""
