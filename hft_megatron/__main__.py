"""``python -m hft_megatron``: the same as the ``hft-megatron`` command."""

import sys

try:
    from hft_megatron.cli import main
except KeyboardInterrupt:
    sys.exit(130)  # EXIT_INTERRUPTED, which is not imported yet

if __name__ == "__main__":
    sys.exit(main())
