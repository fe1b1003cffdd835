"""Data files as rows: the files that a path means, their compression, and the place of each row."""
