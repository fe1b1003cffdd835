"""--deterministic-mode: only kernels that give the same bits every time, and collectives that add in one order."""

import os

import torch

_ENVIRONMENT = {
    # cuBLAS picks its workspace, and so its order of summation, freely unless it is fixed.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # Ring adds in the order of ranks whatever the message size; the tuner would switch algorithms.
    "NCCL_ALGO": "Ring",
}


def make_deterministic() -> None:
    """Must run before CUDA and NCCL start. Variables that the user set stay as they are."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # It would fill every tensor that is made empty, and everything here writes before it reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
