"""``hft-megatron doctor``: what it looks at, one part of the machine per module; ``examination`` has the order."""
