"""Another name of ``hft-megatron convert``, for one more version."""

import sys

from hft_megatron.cli.entry import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
