"""Everything that a rank imports before it trains, or a test's body on it; ranks are forked from a process that has."""

import gc
import importlib
import pkgutil

import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401
import pytest  # noqa: F401
import torch.distributed.elastic.agent.server.local_elastic_agent
import torch.distributed.elastic.rendezvous.registry
import torch.distributed.launcher.api  # noqa: F401
import transformers.convert_slow_tokenizer
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import hft_megatron

for module in pkgutil.walk_packages(hft_megatron.__path__, "hft_megatron."):
    if not module.name.endswith(
        ("__main__", ".start_ranks")
    ):  # those are run, and Python warns of what is there already
        importlib.import_module(module.name)

# What is imported stays: collections in the forked processes need not look at it.
gc.collect()
gc.freeze()
