"""``hft-megatron evaluate``: evaluates models on tasks, in any layout and without a conversion.

Run: ``hft-megatron evaluate --model BASE RUN --tasks tasks.yaml --output results.json``, under torchrun where a model
needs more than one rank.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from hft_megatron.cli.boundary import StatusFolder, end_of_peers, note, show
from hft_megatron.config.declared import check_bounds, declared, flag
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.validation import validate_plan
from hft_megatron.errors import UserError
from hft_megatron.parallel import launch

if TYPE_CHECKING:
    from hft_megatron.evaluation.side_by_side import Evaluation
    from hft_megatron.evaluation.tasks import Task
    from hft_megatron.parallel.peers import Peers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of models over ranks, whatever the layout of their runs; replicas share the examples."""

    tensor_model_parallel_size: Annotated[int, Ge(1)] = 1
    """Ranks that share every matrix of a layer (tensor parallelism)."""
    pipeline_model_parallel_size: Annotated[int, Ge(1)] = 1
    """Stages that the layers are divided into (pipeline parallelism)."""
    decoder_first_pipeline_num_layers: Annotated[int, Ge(1)] | None = None
    """Layers of the first pipeline stage, for uneven stages."""
    decoder_last_pipeline_num_layers: Annotated[int, Ge(1)] | None = None
    """Layers of the last pipeline stage, for uneven stages."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Backend of torch.distributed; nccl with CUDA and gloo without when unset."""
    distributed_timeout_minutes: Annotated[float, Gt(0)] = ParallelConfig.distributed_timeout_minutes
    """Time-out of the rendezvous and of a batch of answers, in minutes."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of ``hft-megatron evaluate``."""

    model: tuple[str, ...] = ()
    """Models to evaluate: Hugging Face folders, runs (their --save: the newest checkpoint) and checkpoints of runs
    (RUN/iter_0000100). The others are compared with the first. Load only runs you trust: torch reads a checkpoint's
    index with pickle."""
    base: str | None = None
    """Model that the others were tuned from: measures the change of their weights, and on texts the change of
    likelihood and of the predictions (KL divergences)."""
    tasks: str | None = None
    """YAML file of tasks; examples/tasks has some."""
    task_names: tuple[str, ...] = ()
    """Names of the tasks to evaluate; all tasks of the file when unset."""
    limit: Annotated[int, Ge(1)] | None = None
    """Number of rows of every task to evaluate, from the first; all when unset."""
    output: str | None = None
    """New file for the results (.json); the answers to every example go into a .predictions.jsonl beside it. A stopped
    command resumes when it is run again; with --lm-eval-tasks, which writes only at its end, it starts again."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Sequences that a replica processes at once."""
    bf16: bool | None = None
    """Read all weights as bf16, or (--no-bf16) fp32. When unset, bf16 if all runs among the models train in it, or, for
    Hugging Face folders alone, if every rank's processor is fast at it."""
    tokenizer_model: str | None = None
    """Hugging Face folder or SentencePiece .model file, in place of every model's own."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness instead of --tasks: names, patterns, or YAML files. Rank 0 runs the harness, all
    ranks answer. Needs `pip install 'hft-megatron[lm-eval]'`. Your own tasks may contain code, which is run."""
    lm_eval_include: str | None = None
    """Folder of your own tasks for the harness."""
    lm_eval_fewshot: Annotated[int, Ge(0)] | None = None
    """Solved examples before each question of the harness; each task's own number when unset."""
    compare: tuple[str, ...] = ()
    """Result files to compare instead of evaluating models: the differences of the second from the first, with
    intervals. FILE:MODEL where a file has several models."""
    frontier: tuple[str, ...] = ()
    """Runs (their --save) to compare instead of evaluating models: the forgetting of each at equal learning, because at
    the same learning rate a method that learns less forgets less. The two options below name the metrics.
    NAME=RUN,RUN combines runs of one method, such as at several learning rates."""
    frontier_learning: str | None = None
    """Metric of learning in metrics.jsonl, such as `lm loss validation/new`."""
    frontier_forgetting: str | None = None
    """Metric of forgetting in metrics.jsonl, such as `lm loss validation/old` or `tasks/stories/bits_per_byte`."""
    frontier_levels: Annotated[int, Ge(1)] = 5
    """Number of levels of learning, in equal steps up to the highest that all methods reach."""
    layout: Layout = field(default_factory=Layout)


def run(options: EvaluateOptions, status: StatusFolder) -> None:
    """Check the options, then evaluate or compare. Raises UserError for every mistake."""
    check_bounds(options)
    if options.compare or options.frontier:
        show(_from_files(options))
        return
    # Imported in functions: other commands, and the checks, must not wait for it all.
    tasks = _checked(options)
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    evaluation = _evaluation(options, tasks)
    launch.place_this_process()
    from hft_megatron.parallel.groups import stop_groups
    from hft_megatron.parallel.peers import peers
    from hft_megatron.trainer.out_of_memory import memory_errors_as

    no_memory = (
        f"rank {launch.rank()} ran out of memory at --batch-size {options.batch_size}; give a smaller one, or spread "
        f"the models over more ranks with --tensor-model-parallel-size."
    )
    with (
        peers(evaluation.parallel.distributed_timeout_minutes, end_of_peers(status)) as company,
        memory_errors_as(lambda _: no_memory),
    ):
        text = _by_harness(options, evaluation, company) if options.lm_eval_tasks else _by_tasks(evaluation, company)
        company.leave()
        stop_groups()
    if text:
        note(text)


def _evaluation(options: EvaluateOptions, tasks: "tuple[Task, ...]") -> "Evaluation":
    """The evaluation with the models' own descriptions; UserError for models that cannot be evaluated with it."""
    from hft_megatron.evaluation.saved_models import SavedModel
    from hft_megatron.evaluation.side_by_side import Evaluation
    from hft_megatron.evaluation.weight_changes import check_alike
    from hft_megatron.trainer.convert import units_trained

    parallel = ParallelConfig(**vars(options.layout))
    models = [SavedModel.read(name) for name in options.model]
    base = None if options.base is None else SavedModel.read(options.base, "--base")
    for model in [*models, *([] if base is None else [base])]:
        validate_plan(RunConfig(parallel=parallel), model.shape, launch.world_size())
        if base is not None:
            check_alike((f"{base.option} {base.name}", f"{model.option} {model.name}"), (base.shape, model.shape))
    of_runs = [model for model in models if base is not None and model.run is not None]
    return Evaluation(
        models=models,
        base=base,
        trained={model.name: units_trained(model.run) for model in of_runs if model.run is not None},
        tasks=tasks,
        parallel=parallel,
        batch_size=options.batch_size,
        bf16=options.bf16,
        tokenizer_model=options.tokenizer_model,
        output=None if options.output is None else Path(options.output),
    )


def _by_tasks(evaluation: "Evaluation", company: "Peers") -> str:
    """The table of all models, on rank 0."""
    from hft_megatron.evaluation.side_by_side import evaluate
    from hft_megatron.report.evaluation import results_text

    results = evaluate(evaluation, company, note)
    return results_text(results["models"], results["records"]) if launch.rank() == 0 else ""


def _by_harness(options: EvaluateOptions, evaluation: "Evaluation", company: "Peers") -> str:
    """The tables of lm-evaluation-harness, on rank 0."""
    from hft_megatron.evaluation.harness import HarnessTasks, evaluate_by_harness

    tasks = HarnessTasks(
        names=options.lm_eval_tasks,
        include_path=options.lm_eval_include,
        num_fewshot=options.lm_eval_fewshot,
        limit=options.limit,
    )
    return evaluate_by_harness(evaluation, tasks, company, note)


def _checked(options: EvaluateOptions) -> "tuple[Task, ...]":
    """The chosen tasks; UserError for options that don't fit together, before anything large is read."""
    from hft_megatron.evaluation.results import check_output
    from hft_megatron.evaluation.task_files import read_tasks

    if not options.model:
        raise UserError("--model is missing: name a Hugging Face folder or the --save folder of a run.")
    twice = [name for name in options.model if options.model.count(name) > 1]
    if twice:
        raise UserError(f"--model {twice[0]} is given twice; name every model once.")
    own = {name for group in (EvaluateOptions, Layout) for name in declared(group)} - _FRONTIER - {"compare"}
    if options.lm_eval_tasks:
        _refuse_others(
            options, "--lm-eval-tasks", own - {"tasks", "task_names", "base"}, "measures the harness's tasks alone"
        )
    else:
        _need_their_mode(options)
    if options.tasks is None and options.base is None and not options.lm_eval_tasks:
        raise UserError("--tasks is missing: name a YAML file of tasks, such as examples/tasks/text.yaml.")
    tasks = () if options.tasks is None else read_tasks(Path(options.tasks))
    names = [task.name for task in tasks]
    if options.task_names and options.tasks is None:
        raise UserError(f"--task-names {' '.join(options.task_names)} needs --tasks, the file of the tasks; add it.")
    for name in options.task_names:
        if name not in names:
            raise UserError(
                f"--task-names {name}: --tasks {options.tasks} has no such task; it has {', '.join(names)}."
            )
    if options.output is not None:
        check_output(Path(options.output))
    chosen = tuple(task for task in tasks if not options.task_names or task.name in options.task_names)
    if options.limit is None:
        return chosen
    return tuple(replace(task, limit=min(options.limit, task.limit or options.limit)) for task in chosen)


_FRONTIER = {"frontier", "frontier_learning", "frontier_forgetting", "frontier_levels"}
_HARNESS = {"lm_eval_tasks", "lm_eval_include", "lm_eval_fewshot"}


def _need_their_mode(options: EvaluateOptions) -> None:
    """UserError for an option of --frontier or of --lm-eval-tasks that is given without it."""
    for mode, names in (("--frontier", _FRONTIER), ("--lm-eval-tasks", _HARNESS)):
        for name in sorted(names):
            value = getattr(options, name)
            if value != declared(EvaluateOptions)[name].default:
                raise UserError(f"{flag(name)} {value} needs {mode}; add it, or leave {flag(name)} out.")


def _refuse_others(options: EvaluateOptions, asked: str, own: Collection[str], why: str) -> None:
    """UserError for the first option that is given and not among a mode's ``own``."""
    groups: tuple[object, ...] = (options, options.layout)
    for group in groups:
        kind: type = type(group)
        for name, option in declared(kind).items():
            value = getattr(group, name)
            if name not in own and not is_dataclass(value) and value != option.default:
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UserError(f"{flag(name)} {shown} cannot be used with {asked}, which {why}; leave one out.")


def _from_files(options: EvaluateOptions) -> str:
    """Text of --compare and --frontier, from files of earlier commands."""
    from hft_megatron.evaluation.comparison import compare
    from hft_megatron.evaluation.frontier import curve_of_run, frontier, shared_levels
    from hft_megatron.report.evaluation import comparison_text, frontier_text

    asked, own = ("--compare", {"compare"}) if options.compare else ("--frontier", _FRONTIER)
    _refuse_others(options, asked, own, "reads existing files")
    if options.compare:
        if len(options.compare) != 2:
            raise UserError(f"--compare {' '.join(options.compare)}: give two result files.")
        return comparison_text(compare(*options.compare))
    if options.frontier_learning is None or options.frontier_forgetting is None:
        missing = "learning" if options.frontier_learning is None else "forgetting"
        raise UserError(f"--frontier-{missing} is missing: name a metric of the runs' metrics.jsonl.")
    curves, wanted = {}, (options.frontier_learning, options.frontier_forgetting)
    for word in options.frontier:
        name, equals, runs = word.partition("=")
        folders = runs.split(",") if equals else [word]
        if not all(folders) or not name or name in curves or ("," in word and not equals):
            raise UserError(f"--frontier {word}: write RUN, or NAME=RUN,RUN with another name for every method.")
        curves[name] = [curve_of_run(folder, *wanted) for folder in folders]
    return frontier_text(frontier(curves, shared_levels(curves, options.frontier_levels)), *wanted)
