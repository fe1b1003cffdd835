"""Tokens made before the run: megatron-core's ``.bin/.idx`` files, how they are written, and how they are opened."""
