"""``hft-megatron convert``: converts a training checkpoint to a Hugging Face folder, in one process, without the model.

Run: ``hft-megatron convert --load RUN --save-hf OUT``, with ``--check`` to compare logits as well, or
``hft-megatron convert --load-hf MODEL --check`` to compare those of a folder before training.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.checkpoint import CheckpointConfig, outputs_can_be_written
from hft_megatron.config.declared import check_bounds
from hft_megatron.config.exports import nothing_is_overwritten
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError
from hft_megatron.parallel import launch


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of ``hft-megatron convert``."""

    load: str | None = None
    """Folder of a run (its --save) to convert. Load only folders you trust: torch reads a checkpoint's index with
    pickle."""
    iteration: Annotated[int, Ge(0)] | None = None
    """Iteration of the checkpoint; the newest when unset."""
    save_hf: str | None = None
    """New folder for the export in Hugging Face's format."""
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Data type of the exported tensors; each tensor's own in the run's --load-hf folder (or the run's) when unset."""
    check: bool = False
    """Compare the logits of the export with the checkpoint's; with --load-hf, the logits of transformers with those of
    this project. Builds the models, one after the other, in fp32."""
    load_hf: str | None = None
    """Hugging Face folder to check instead of --load; needs --check."""


def run(options: ConvertOptions, status: StatusFolder) -> None:
    """Check the options, then convert or compare. Raises UserError for every mistake."""
    check_bounds(options)
    _check(options)
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    if options.check:
        launch.place_this_process()
    from hft_megatron.trainer.convert import check_model_folder, convert_checkpoint

    if options.load_hf is not None:
        check_model_folder(options.load_hf, show)
        return
    assert options.load is not None
    assert options.save_hf is not None
    convert_checkpoint(
        options.load,
        options.iteration,
        options.save_hf,
        save_dtype=options.save_dtype,
        check=options.check,
        announce=show,
    )


def _check(options: ConvertOptions) -> None:
    """Raises UserError for options that don't fit together, before anything is read."""
    if launch.world_size() > 1:
        raise UserError("hft-megatron convert runs in one process; start it without torchrun.")
    if (options.load is None) == (options.load_hf is None):
        raise UserError("Give either --load RUN to convert a run's checkpoint, or --load-hf MODEL to check a folder.")
    if options.load_hf is not None:
        others = {"--save-hf": options.save_hf, "--save-dtype": options.save_dtype, "--iteration": options.iteration}
        for flag, value in others.items():
            if value is not None:
                raise UserError(
                    f"{flag} {value} cannot be used with --load-hf {options.load_hf}, which is only checked; "
                    "to convert between such folders, run `hft-megatron sft --train-iters 0 --load-hf A --save-hf B`."
                )
        if not options.check:
            raise UserError(
                f"--load-hf {options.load_hf} needs --check, since training reads such folders directly; add it."
            )
        return
    if options.save_hf is None:
        raise UserError(f"--save-hf is missing: name the new folder for the conversion of --load {options.load}.")
    outputs = RunConfig(checkpoint=CheckpointConfig(save_hf=options.save_hf))
    for rule in (nothing_is_overwritten, outputs_can_be_written):
        rule(outputs, None, 1)
