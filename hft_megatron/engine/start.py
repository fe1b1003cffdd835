"""What must happen before megatron-core is imported. Imports nothing of it."""

import logging
import os
import warnings

from hft_megatron.engine.lines import engine_line

_ENVIRONMENT = {
    # megatron-core's overlaps rely on kernels running in the order they were launched; read when CUDA starts.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Buffers get another size in every round: with segments of fixed size, memory that is free would not fit them.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""What torch and CUDA read when they start; variables that the user set stay as they are."""
_OLD_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}
"""Torch still reads the old one where the new one is not set."""
_SAID_BY_OUR_LOG_LINE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
)
_NOT_FOR_USERS = (
    "full scope is deprecated",  # about megatron-core's own default
    r"`torch\.distributed\..*` is deprecated",  # megatron-core's calls, on torch 2.13 and newer
    r"`load_state_dict` is deprecated",  # of torch.distributed.checkpoint, which megatron-core calls
)
_LOGGERS = (
    "megatron.core.rerun_state_machine",
    # That indices of samples are kept in memory.
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.blended_dataset",
    # Takes the plan and position, which are written first, for the rests of another save.
    "megatron.core.dist_checkpointing.serialization",
    # 0.19: that GPTModel, its own way to save, and the common state of older checkpoints go away some day.
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.common",
)
"""Whose warnings are about the engine itself; their errors are still shown."""


def prepare_engine() -> None:
    """Makes sure that a supported megatron-core is there, sets what is read at its start, and silences what it says
    about itself, from every rank.

    Called by name from entry points, before anything imports torch or megatron-core. Raises UserError for an engine
    that this package doesn't run on. Warnings that are not listed here are still shown.
    """
    engine_line()
    for name, value in _ENVIRONMENT.items():
        if _OLD_NAMES.get(name, name) not in os.environ:
            os.environ.setdefault(name, value)
    for message in (*_SAID_BY_OUR_LOG_LINE, *_NOT_FOR_USERS):
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
