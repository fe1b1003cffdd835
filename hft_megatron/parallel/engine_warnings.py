"""Silences what the engine says about itself at import, from every rank: one log line of ours says it once.

Imports nothing of the engine, because it must run before the engine is imported.
"""

import logging
import warnings

_SAID_BY_OUR_LOG_LINE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
)
_NOT_FOR_USERS = (
    "full scope is deprecated",  # about megatron-core's own default
    r"`torch\.distributed\..*` is deprecated",  # megatron-core's calls, on torch 2.13 and newer
)


def silence_engine_warnings() -> None:
    """Called by name from the entry point; anything not listed here is still shown."""
    for message in (*_SAID_BY_OUR_LOG_LINE, *_NOT_FOR_USERS):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    # That indices of samples are kept in memory.
    for name in ("gpt_dataset", "blended_dataset"):
        logging.getLogger(f"megatron.core.datasets.{name}").setLevel(logging.ERROR)
    # Takes the plan and position, which are written first, for the rests of another save.
    logging.getLogger("megatron.core.dist_checkpointing.serialization").setLevel(logging.ERROR)
