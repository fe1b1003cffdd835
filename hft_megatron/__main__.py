"""``python -m hft_megatron``: the same as the ``hft-megatron`` command."""

import sys

from hft_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
