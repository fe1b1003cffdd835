"""The models that an evaluation names: Hugging Face folders, and checkpoints of runs, which need no conversion."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hft_megatron.checkpoint.folders import DIGESTS_FILE, end_of_chain, identity_of, read_digests
from hft_megatron.checkpoint.saved_run import SavedRun
from hft_megatron.checkpoint.store import load_weights as load_checkpoint
from hft_megatron.checkpoint.verification import damage_of, shared_digest
from hft_megatron.config.lora import ADAPTER_CONFIG_FILE
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RUN_IDENTITY_FILE
from hft_megatron.config.training import TrainingConfig
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import check_weights
from hft_megatron.conversion.load import load_weights as load_folder
from hft_megatron.data.tokenizer import Tokenizer, fit_tokenizer
from hft_megatron.data.tokenizer_loading import holds_tokenizer, load_tokenizer
from hft_megatron.engine.lines import refuse_if_unreadable
from hft_megatron.errors import UserError
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.weight_changes import UnitWeights, folder_weights, run_weights
from hft_megatron.model.build import build_model
from hft_megatron.parallel.groups import Placement

OPTION = "--model"
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model on disk."""

    option: str
    """The option that names it, for messages."""
    name: str
    """The name as given: a Hugging Face folder, a run's --save (its newest checkpoint), or one checkpoint in it."""
    shape: ModelShape
    run: SavedRun | None
    """The run; None for a Hugging Face folder."""

    @staticmethod
    def read(name: str, option: str = OPTION) -> "SavedModel":
        """Reads the metadata at ``name``, no weights. Raises UserError if it is no model."""
        folder, iteration = Path(name), None
        found = _ITERATION.fullmatch(folder.resolve().name)
        if found is not None and (folder.resolve().parent / RUN_IDENTITY_FILE).exists():
            if not (folder / DIGESTS_FILE).exists():
                raise UserError(f"{option} {name} is not a complete checkpoint; name another one, or the run's folder.")
            folder, iteration = folder.resolve().parent, int(found[1])
        if (folder / RUN_IDENTITY_FILE).exists():
            run = SavedRun.read(str(folder), iteration, option=option)
            refuse_if_unreadable(run.checkpoint, read_digests(run.checkpoint))
            return SavedModel(option=option, name=name, shape=run.identity.shape, run=run)
        if not (folder / HF_CONFIG_FILE).exists():
            if (folder / ADAPTER_CONFIG_FILE).exists():
                raise UserError(
                    f"{option} {name} is an adapter without its model; merge the two first, as docs/lora.md shows."
                )
            raise UserError(
                f"{option} {name} has neither {HF_CONFIG_FILE} (a Hugging Face folder) nor {RUN_IDENTITY_FILE} (the "
                f"--save of a run); name one of the two."
            )
        shape = ModelShape.from_hf_config(load_hf_config(name), source=f"{name}/{HF_CONFIG_FILE}")
        check_weights(name, shape, option=option)
        return SavedModel(option=option, name=name, shape=shape, run=None)

    @property
    def iteration(self) -> int | None:
        """Iteration of the checkpoint; None for a Hugging Face folder."""
        return None if self.run is None else self.run.state.iteration

    @property
    def own_bf16(self) -> bool | None:
        """True if the run trains in bf16; None for a Hugging Face folder, which can be read in any precision."""
        return None if self.run is None else self.run.config.training.bf16

    def tokenizer(self, path: str | None) -> Tokenizer:
        """The model's own tokenizer, or that at ``path`` (--tokenizer-model). Raises UserError if there is none."""
        found = None
        if path is not None:
            # With the run's chat template, which is an option of the run and not in the folder.
            template = None if self.run is None else self.run.chat_template()
            found = load_tokenizer(None, path, template)
        elif self.run is not None:
            found = self.run.tokenizer()
        elif holds_tokenizer(self.name):
            found = load_tokenizer(None, self.name)
        if found is None:
            raise UserError(f"{self.option} {self.name} has no tokenizer; name one with --tokenizer-model.")
        return fit_tokenizer(found, self.shape.vocab_size)

    def digest(self, placement: Placement) -> str:
        """sha256 (hex) over every byte of its files; collective. Raises UserError where a checkpoint has changed."""
        if self.run is None:
            with HuggingFaceWeights(self.name, option=self.option) as weights:
                return shared_digest(weights.files(), placement)
        damage = damage_of(self.run.checkpoint, placement)
        if damage is not None:
            raise UserError(
                f"{self.option} {self.name}: {damage}; evaluate another checkpoint, or copy this one again."
            )
        return identity_of(self.run.checkpoint)

    @contextmanager
    def weights(self) -> Iterator[UnitWeights]:
        """Its weights unit by unit, without a model. Raises UserError where they cannot be read."""
        of_run = None if self.run is None else run_weights(self.run)
        with of_run or folder_weights(self.name, option=self.option) as weights:
            yield weights

    def open(
        self, parallel: ParallelConfig, placement: Placement, *, bf16: bool, like: RunConfig | None = None
    ) -> ModelInPlace:
        """This rank's part of the model, in the layout of ``placement``; collective.

        Its kernels and the padding of its vocabulary are those of the run ``like``, or none, and not its own run's: two
        models whose predictions are compared are built alike.
        """
        like = like or RunConfig()
        chunks = build_model(
            self.shape,
            parallel,
            TrainingConfig(transformer_impl=like.training.transformer_impl),
            placement=placement,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            vocab_multiple=like.model.make_vocab_size_divisible_by,
        )
        if self.run is None:
            load_folder(self.name, chunks, self.shape, placement, option=self.option)
        else:
            if end_of_chain(self.run.checkpoint, option=self.option).is_based_on_model:
                source = self.run.source()
                assert source is not None, "SavedRun.source refuses it"
                load_folder(source, chunks, self.shape, placement, option=self.option)
            load_checkpoint(self.run.checkpoint, chunks)
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        return ModelInPlace(chunks=chunks, placement=placement)
