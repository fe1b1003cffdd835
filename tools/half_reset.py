"""Another name of ``hft-megatron half-reset``, for one more version."""

import sys

from hft_megatron.cli.entry import main

if __name__ == "__main__":
    sys.exit(main(["half-reset", *sys.argv[1:]]))
