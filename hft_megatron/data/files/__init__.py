"""Data files as rows: which files a path means, how they are compressed, and where each row stands."""
