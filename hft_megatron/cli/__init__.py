"""The command line: ``hft-megatron COMMAND OPTIONS``."""

from hft_megatron.cli.entry import main

__all__ = ["main"]
