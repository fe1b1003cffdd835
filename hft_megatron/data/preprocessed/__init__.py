"""Tokens made before the run: megatron-core's ``.bin/.idx`` files, their writer, and their reader."""
