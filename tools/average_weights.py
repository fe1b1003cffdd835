"""Another name of ``hft-megatron average``, for one more version."""

import sys

from hft_megatron.cli.entry import main

if __name__ == "__main__":
    sys.exit(main(["average", *sys.argv[1:]]))
