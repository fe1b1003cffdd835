"""Preparations before megatron-core is imported, and its import."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from hft_megatron.engine.lines import engine_line

_ENVIRONMENT = {
    # megatron-core's overlaps rely on kernels running in the order they were launched; read when CUDA starts.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Buffers get another size in every round: with segments of fixed size, memory that is free would not fit them.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""Variables that torch and CUDA read when they start; those that the user set stay as they are."""
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
    # It takes the plan and position, which are written first, for the remains of another save.
    "megatron.core.dist_checkpointing.serialization",
    # 0.19: that GPTModel, its own way to save, and the common state of older checkpoints will be removed.
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.common",
)
"""Loggers whose warnings are about the engine itself; their errors are still shown."""


def prepare_engine() -> None:
    """Checks that a supported megatron-core is installed, sets the variables it reads, silences its warnings about
    itself, which come from every rank, and imports it.

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
    _import_engine()


def _import_engine() -> None:
    """Imports megatron-core without two packages that it may never use: torch's compiler, which takes a fifth of a
    process's time until its first step, and wandb, which serves inference engines that are not used here."""
    if "megatron.core" in sys.modules:
        return
    with _compiled_at_the_first_call(), _absent("wandb"):
        importlib.import_module("megatron.core")


@contextmanager
def _compiled_at_the_first_call() -> Iterator[None]:
    """Within it, functions decorated with ``torch.compile`` are compiled at their first call."""
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return partial(compile_later, **options)
        compiled: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Within it, imports of a package that isn't loaded yet fail, as if it were not installed."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
