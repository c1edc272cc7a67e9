"""Plain single-device models: no ranks, no files, no config objects."""
