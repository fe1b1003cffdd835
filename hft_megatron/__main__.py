"""``python -m hft_megatron``: the same as the ``hft-megatron`` command."""

import sys

from hft_megatron.cli import main

# The guard matters: checkpoints are written with the help of multiprocessing, which imports this file again.
if __name__ == "__main__":
    sys.exit(main())
