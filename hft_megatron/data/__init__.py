"""Text to batches: tokenizers, records, examples with their loss masks, order and batches."""
