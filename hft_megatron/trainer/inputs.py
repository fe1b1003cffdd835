"""Inputs of a run: tokenizer, data, checkpoint and scores, the same on every rank."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hft_megatron.checkpoint.finished import discarded
from hft_megatron.checkpoint.folders import Checkpoints, complete_checkpoints, find_checkpoints, iteration_of
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config import derived
from hft_megatron.config.exports import nothing_is_overwritten
from hft_megatron.config.loading import read_resolved
from hft_megatron.config.lora import note_dropout, with_adapters
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import SELECTIONS
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE, RUN_IDENTITY_FILE, SPECTRUM_FILE
from hft_megatron.config.run_identity import RunIdentity, check_same_model, check_same_run, run_identity
from hft_megatron.config.validation import shape_of, validate
from hft_megatron.conversion.adapter_folder import check_adapter
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import check_weights
from hft_megatron.conversion.weight_files import notes_on_folder
from hft_megatron.data.order import describe_samples, with_iterations
from hft_megatron.data.tokenizer import Tokenizer, fit_tokenizer
from hft_megatron.data.tokenizer_loading import holds_tokenizer, load_tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.outcomes import ReadTask
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.plan_file import check_enough_rounds, load_plans
from hft_megatron.hft.rounds import RoundSchedule
from hft_megatron.hft.spectrum import spectrum_scores
from hft_megatron.hft.units import MATRIX_CATEGORIES, units_of
from hft_megatron.parallel.consensus import on_rank_0
from hft_megatron.parallel.groups import Placement
from hft_megatron.tracking.trackers import check_tracking_packages
from hft_megatron.trainer.method import Method, RunData
from hft_megatron.trainer.rounds import Rounds, round_schedule, rounds_of_run
from hft_megatron.trainer.task_evaluation import tasks_of_run

_ROUNDS_DRAWN_AHEAD = 100
"""Rounds whose plans are drawn before the start: a full cycle of HiFT's groups in every LLaMA; at 70B they take less
than a second."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that was read, the same on every rank."""

    method: Method
    config: RunConfig
    """Resolved options; ``bf16`` may be unset until ranks have met: the machines decide it."""
    shape: ModelShape
    tokenizer: Tokenizer | None
    """None only where a model without tokenizer files is converted."""
    data: RunData | None
    """None where nothing is trained or validated on."""
    epochs: int | None
    """Value of --train-epochs; ``config`` has it in iterations."""
    identity: RunIdentity
    found: Checkpoints | None
    """Checkpoints in the --load folder."""
    finetune_has_begun: bool
    """True if --finetune was given and --save already holds a checkpoint, from which the run resumes."""
    checkpoint: Path | None
    """The newest one, from which the run resumes or takes its first weights."""
    tasks: tuple[ReadTask, ...] = ()
    """Tasks of --eval-tasks."""
    plans: tuple[Plan, ...] = ()
    """Plans of --hft-plan, one per round; empty where plans are drawn."""

    @property
    def resumes(self) -> bool:
        """Return whether the run resumes from its checkpoint; --finetune only takes its first weights from one."""
        return self.checkpoint is not None and not self.config.checkpoint.finetune

    @property
    def is_over(self) -> bool:
        """Return whether the run resumes at its last iteration, so that options cannot change the result."""
        length = derived.train_iters(self.config.training)
        return self.resumes and 0 < length <= self.position.iteration

    @property
    def carries_moments(self) -> bool:
        """Return whether a run that takes its first weights from another also takes its moments, as between rounds."""
        hft, options = self.config.hft, self.config.checkpoint
        is_next_round = options.finetune and hft.hft_first_round is not None and hft.hft_moments == "carry"
        return self.checkpoint is not None and is_next_round and options.load_optim

    @property
    def position(self) -> TrainState:
        """Position at which the run starts or resumes."""
        if self.checkpoint is not None and self.resumes:
            return TrainState.read(self.checkpoint)
        return TrainState(round=self.config.hft.hft_first_round or 0)

    def round_schedule(self, world_size: int) -> RoundSchedule:
        """First iterations of the rounds of this run."""
        return round_schedule(self.config, world_size, None if self.data is None else self.data.samples)

    def rounds(self, world_size: int, scores: Mapping[str, float] | None = None) -> Rounds:
        """The rounds of this run; ``scores`` are those of --hft-selection spectrum."""
        return rounds_of_run(
            self.config,
            self.shape,
            world_size,
            samples=None if self.data is None else self.data.samples,
            loaded=self.plans,
            scores=scores,
        )

    def describe(self) -> list[str]:
        """Lines for the log about the data and the starting point."""
        parallel = self.config.parallel
        folders = (self.config.model.load_hf, self.config.dpo.dpo_reference_model)
        lines = [note for folder in folders if folder is not None for note in notes_on_folder(folder)]
        if parallel.sequence_parallel and not derived.splits_sequences(parallel):
            lines.append("--sequence-parallel is off: without tensor parallelism there is nothing to split")
        lines += [] if self.tokenizer is None else self.tokenizer.facts.notes
        lines += note_dropout(self.config.lora)
        lines += self.method.notes(self.config)
        if self.data is not None:
            lines += self.data.describe()
            if self.data.samples is not None:
                lines += describe_samples(self.data.samples, self.epochs, derived.train_iters(self.config.training))
        lines += [note for one in self.tasks for note in one.read.notes]
        lines += self._leaves_random()
        if self.finetune_has_begun:
            lines.append(f"--finetune: --save {self.config.checkpoint.save} already holds this run; resuming it")
        if self.found is not None:
            lines += self.found.notes()
            if self.found.is_empty:
                lines.append(f"--load {self.found.folder} holds no checkpoint yet: starting a new run")
        return lines

    def _leaves_random(self) -> list[str]:
        """A warning where random weights stay frozen for the whole run."""
        hft, is_random = self.config.hft, self.config.model.load_hf is None and self.checkpoint is None
        trains = self.config.training.train_iters != 0
        if not (is_random and trains and hft.hft_ratio < 1 and hft.hft_round_interval == "stage"):
            return []
        return [
            f"warning: the model starts from random weights, and with --hft-ratio {hft.hft_ratio} the frozen ones stay "
            "random for the whole run; use --hft-ratio 1 to train all, or --hft-round-interval N to alternate"
        ]


def read_inputs(method: Method, options: RunConfig, shape: ModelShape | None, world_size: int) -> Inputs:
    """Reads tokenizer, data and the saved run. Raises UserError for a user's mistake in any of them.

    ``shape`` is None when the vocabulary's size is the tokenizer's.
    """
    check_tracking_packages(options.logging)
    tokenizer, shape = tokenizer_and_shape(options, shape)
    given = options.checkpoint
    options = _resuming_finetune(options)
    found = _checkpoints_to_load(options)
    checkpoint = None if found is None else found.newest
    saved = None
    if checkpoint is not None and not options.checkpoint.finetune:
        saved = read_resolved(checkpoint.parent / RESOLVED_CONFIG_FILE)
    config = derived.resolve(options, shape, world_size, saved)
    validate(config, shape, world_size, method.name)
    data = None
    epochs = config.training.train_epochs
    if config.training.train_iters != 0 or derived.only_validates(config):
        assert tokenizer is not None
        data = method.read_data(config, tokenizer, shape, world_size)
        if data.samples is not None:
            config = with_iterations(config, data.samples, world_size)
            # Epochs are iterations now, which decide whether the final export already exists.
            nothing_is_overwritten(config, shape, world_size)
    identity = run_identity(
        config,
        shape,
        world_size,
        method=method.name,
        data_digest=None if data is None else data.digest,
        order_digest=None if data is None else data.order_digest,
        tokenizer_digest=None if tokenizer is None else tokenizer.facts.identity,
        finetuned_from=given.load if given.finetune else None,
        uses_chat_template=data is not None and data.uses_chat_template,
    )
    identity = _checked_with_held_runs(config, identity)
    if checkpoint is not None and saved is not None:
        _check_can_resume(config, saved, checkpoint, world_size)
    inputs = Inputs(
        method=method,
        config=config,
        shape=shape,
        tokenizer=tokenizer,
        data=data,
        epochs=epochs,
        identity=identity,
        found=found,
        finetune_has_begun=given.finetune and not config.checkpoint.finetune,
        checkpoint=checkpoint,
        tasks=() if tokenizer is None else tasks_of_run(config, tokenizer, shape),
        plans=() if config.hft.hft_plan is None else load_plans(config.hft.hft_plan, shape),
    )
    _check_rounds(inputs, world_size)
    return inputs


def _resuming_finetune(options: RunConfig) -> RunConfig:
    """With --finetune, a run that has begun is resumed: starting again would discard its training."""
    checkpoint = options.checkpoint
    if not checkpoint.finetune or checkpoint.save is None:
        return options
    found = find_checkpoints(checkpoint.save)
    if found.is_empty:
        return options
    # --no-load-optim concerned the weights of --finetune, not every restart of the run.
    return replace(options, checkpoint=replace(checkpoint, load=checkpoint.save, finetune=False, load_optim=True))


def _checkpoints_to_load(options: RunConfig) -> Checkpoints | None:
    """Checkpoints in --load; UserError where there is none and one is required."""
    found = None if options.checkpoint.load is None else find_checkpoints(options.checkpoint.load)
    if options.checkpoint.finetune:
        check_not_discarded(found)
        _check_weights_are_there(options, found)
    if options.checkpoint.exit_on_missing_checkpoint and found is not None and found.is_empty:
        raise UserError(
            f"--load {found.folder} holds no checkpoint, but --exit-on-missing-checkpoint requires one; give the "
            f"--save folder of a run that saved one, or leave --exit-on-missing-checkpoint out to start fresh."
        )
    return found


def check_not_discarded(found: Checkpoints | None) -> None:
    """Raise UserError where --continual-discard deleted the checkpoints of the --load folder."""
    if found is not None and discarded(found.folder) is not None:
        raise UserError(
            f"--load {found.folder} holds a finished task whose checkpoints --continual-discard has deleted; give the "
            f"folder of another run."
        )


def _check_weights_are_there(options: RunConfig, found: Checkpoints | None) -> None:
    """Raise UserError where --finetune has no weights to start from."""
    if found is None or found.is_empty:
        raise UserError(
            f"--finetune takes the weights of --load {options.checkpoint.load}, which holds no complete checkpoint; "
            f"give the --save folder of another run."
        )


def _check_can_resume(config: RunConfig, saved: RunConfig, checkpoint: Path, world_size: int) -> None:
    """A resumed run keeps its precision, and doesn't end before its checkpoint: its export would be named after another
    iteration."""
    folder = config.checkpoint.load
    asked, reached = derived.train_iters(config.training), iteration_of(checkpoint)
    if 0 < asked < reached:
        samples, least = config.training.train_samples, reached
        given = f"--train-iters {asked}"
        if samples is not None:
            given = f"--train-samples {samples} ({asked} iterations)"
            least = derived.batch_sizes(config, world_size).samples_before(reached)
        raise UserError(
            f"{given} is below iteration {reached} of the checkpoint in --load {folder}; give at least {least}, or "
            f"another folder."
        )
    if config.training.bf16 != saved.training.bf16:
        new, kept = ("--bf16" if bf16 else "--no-bf16" for bf16 in (config.training.bf16, saved.training.bf16))
        raise UserError(
            f"{new} contradicts --load {folder}, which was trained with {kept}: "
            f"its masters and moments have that precision; leave {new} out."
        )


def _check_rounds(inputs: Inputs, world_size: int) -> None:
    """Draws plans, so that mistakes in the method's options are found before ranks start."""
    # Any scores will do here in place of spectrum's.
    rounds = inputs.rounds(world_size, scores=dict.fromkeys((unit.name for unit in units_of(inputs.shape)), 0.0))
    if inputs.config.hft.hft_plan is not None:
        check_enough_rounds(inputs.plans, rounds.schedule.rounds, inputs.config.hft.hft_plan)
    first = rounds.schedule.first_round
    for round in range(first, first + min(rounds.schedule.rounds, _ROUNDS_DRAWN_AHEAD)):
        rounds.plan(round)


def tokenizer_and_shape(options: RunConfig, shape: ModelShape | None) -> tuple[Tokenizer | None, ModelShape]:
    """The run's tokenizer, checked against the model's shape, which it decides where ``shape`` is None."""
    tokenizer = _read_tokenizer(options)
    if shape is None:
        assert tokenizer is not None
        shape = shape_of(options.model, vocab_size=tokenizer.vocab_size)
        assert shape is not None
    if tokenizer is not None:
        tokenizer = fit_tokenizer(tokenizer, shape.vocab_size)
    return tokenizer, with_adapters(shape, options.lora)


def _read_tokenizer(options: RunConfig) -> Tokenizer | None:
    path = derived.tokenizer_path(options)
    converts_only = options.training.train_iters == 0 and not derived.only_validates(options)
    if converts_only and options.data.tokenizer_model is None and not holds_tokenizer(path):
        if options.data.chat_template is not None:
            raise UserError(
                f"--chat-template {options.data.chat_template} needs a tokenizer, but {path} has none; name one with "
                f"--tokenizer-model, or leave the template out."
            )
        return None
    return load_tokenizer(options.data.tokenizer_type, path, options.data.chat_template)


def _checked_with_held_runs(config: RunConfig, identity: RunIdentity) -> RunIdentity:
    """The identity with digests of all weights, and with the start and data of the runs in --save and --load.

    UserError where --save or --load holds another run, or with --finetune another model."""
    own: list[tuple[str, str, RunIdentity]] = []
    for option, folder in (("--save", config.checkpoint.save), ("--load", config.checkpoint.load)):
        if folder is None or not ((Path(folder) / RUN_IDENTITY_FILE).exists() or complete_checkpoints(folder)):
            continue
        held = RunIdentity.read(option, folder)
        identity = replace(identity, uses_chat_template=identity.uses_chat_template or held.uses_chat_template)
        if config.checkpoint.finetune and option == "--load":
            check_same_model(held, identity, folder)
            continue
        # Once before the weights are read, which takes long.
        without_weights = replace(held, weights_digest=None, adapter_digest=None, reference_digest=None)
        check_same_run(without_weights, identity, folder, option=option)
        own.append((option, folder, held))
        if identity.finetuned_from is None:
            identity = replace(identity, finetuned_from=held.finetuned_from)
        if option == "--save":
            identity = replace(identity, run_id=held.run_id)
    if config.model.load_hf is not None:
        identity = replace(identity, weights_digest=check_weights(config.model.load_hf, identity.shape))
    if config.lora.lora_adapter is not None:
        identity = replace(identity, adapter_digest=check_adapter(config.lora.lora_adapter, identity.shape))
    if config.dpo.dpo_reference_model is not None:
        reference = check_weights(config.dpo.dpo_reference_model, identity.shape, option="--dpo-reference-model")
        identity = replace(identity, reference_digest=reference)
    for option, folder, held in own:
        check_same_run(held, identity, folder, option=option)
    return identity


def scores_of_run(inputs: Inputs, placement: Placement) -> dict[str, float] | None:
    """Signal-to-noise ratio by unit; None for other selections. Collective over all ranks.

    Raises UserError when a matrix or the saved scores cannot be read.
    """
    config = inputs.config
    if not SELECTIONS[config.hft.hft_selection].needs_scores:
        return None
    if inputs.resumes:
        assert inputs.checkpoint is not None
        file = inputs.checkpoint.parent / SPECTRUM_FILE
        return on_rank_0(lambda: read_scores(file, inputs.shape))
    assert config.model.load_hf is not None, "the rules of the options require it"
    with HuggingFaceWeights(config.model.load_hf) as weights:
        return spectrum_scores(inputs.shape, weights.read, device=placement.device)


def read_scores(file: Path, shape: ModelShape) -> dict[str, float]:
    """The scores that a run left in its folder; UserError when they cannot be read or are another model's."""
    try:
        scores: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        missing = {unit.name for unit in units_of(shape) if unit.category in MATRIX_CATEGORIES} - set(scores)
        mistake = f"it has no score of {min(missing)}" if missing else None
    except (OSError, ValueError, TypeError) as error:
        mistake = str(error)
    if mistake is not None:
        raise UserError(
            f"--load {file.parent}: {SPECTRUM_FILE} cannot be used ({mistake}); copy the run's folder again."
        )
    return scores
