"""Rows as records: one module per layout that data comes in, and the table that tells them apart."""
