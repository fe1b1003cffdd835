"""Rows as records: one module per data layout, and the table that tells them apart."""
