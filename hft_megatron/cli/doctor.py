"""``hft-megatron doctor``: preflight checks of the machine, the ranks and the files of a run.

Run: ``torchrun --nproc-per-node 8 -m hft_megatron doctor --tensor-model-parallel-size 2``, or without torchrun for one
process. It takes the options of a run, so that a run's own command line (without --stages and --check) works with
``doctor`` in place of the method; without a model it checks the machine alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from textwrap import wrap

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.corpus import CorpusConfig
from hft_megatron.config.model import ModelConfig, model_is_given_once
from hft_megatron.config.names import MethodName
from hft_megatron.config.run import RunConfig
from hft_megatron.config.validation import validate_layout
from hft_megatron.doctor.findings import Diagnosis, Row, Status
from hft_megatron.errors import RunFailed, UserError
from hft_megatron.methods.registry import DECLARED
from hft_megatron.parallel import launch

LINE_WIDTH = 120
"""Columns of a line; fixed, so that reports can be compared."""


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """A line per finding, with a fix below where it isn't ok, and a sentence about all of them at the end."""
    statuses = [row.finding.status for row in diagnosis.rows]
    status_width = max(len(status) for status in statuses)
    what_width = max(len(row.finding.what) for row in diagnosis.rows)
    lines = [diagnosis.setting, ""]
    for row in diagnosis.rows:
        lines += _lines(row, f"{row.finding.status:<{status_width}}  {row.finding.what:<{what_width}}  ")
    return "\n".join([*lines, "", _conclusion(statuses)])


def _conclusion(statuses: Sequence[Status]) -> str:
    wrong, warnings = statuses.count("wrong"), statuses.count("warning")
    found = f"{_counted(wrong, 'is', 'are')} wrong and {_counted(warnings, 'has', 'have')} a warning"
    end = "; the fix is below each." if wrong or warnings else "."
    return f"Of {len(statuses)} preflight checks {found}{end}"


def diagnosis_json(diagnosis: Diagnosis) -> str:
    """``ok``, the layout, and ``checks``: ``what``, ``value``, ``status``, ``fix``, and ``where`` ranks differ."""
    return json.dumps(diagnosis.to_dict(), indent=1)


def _lines(row: Row, label: str) -> list[str]:
    value = f"{row.finding.value} ({row.where})" if row.where else row.finding.value
    indent = " " * len(label)
    lines = wrap(value, LINE_WIDTH, initial_indent=label, subsequent_indent=indent, break_long_words=False)
    if row.finding.fix is not None:
        lines += wrap(
            row.finding.fix, LINE_WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False
        )
    return lines


def _counted(count: int, one: str, more: str) -> str:
    """``none is``, ``1 is`` or ``2 are``."""
    return f"{count or 'none'} {one if count < 2 else more}"


FIRST = ("method", "json", "train-data-path", "valid-data-path", "data-path")
"""The options of its own that --help shows."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(RunConfig):
    """Options of ``hft-megatron doctor``: those of a run, and of the report."""

    config: str | None = None
    """YAML file with any of the options below, by name or under a group's name; the command line overrides it."""
    method: MethodName = "sft"
    """Command whose options these are."""
    json: bool = False
    """Print JSON instead of a table."""

    @property
    def as_run(self) -> RunConfig:
        """The run that these options describe."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in fields(RunConfig)})


def run(options: DoctorOptions, status: StatusFolder) -> None:
    """Run all checks and show the report; RunFailed where something is wrong, UserError for mistakes in the options.

    ``status`` is left alone: the save folder belongs to the run.
    """
    config, world_size = options.as_run, launch.world_size()
    has_model, has_data = _checked(options)
    validate_layout(config, world_size)
    # Imported here, because the checks above must not wait for torch and transformers.
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    launch.place_this_process()
    from hft_megatron.doctor.examination import Examination

    def show_diagnosis(diagnosis: Diagnosis) -> None:
        show(diagnosis_json(diagnosis) if options.json else diagnosis_text(diagnosis))

    diagnosis = Examination(
        method=options.method,
        config=config,
        world_size=world_size,
        has_model=has_model,
        has_data=has_data,
        show=show_diagnosis,
    ).run()
    if diagnosis.wrong:
        raise RunFailed(f"preflight checks failed: {', '.join(diagnosis.wrong)}; the report shows the fixes.")


def _checked(options: DoctorOptions) -> tuple[bool, bool]:
    """Return whether a model is given, and data; UserError for data that would be ignored."""
    has_corpus = options.corpus != CorpusConfig()
    files = options.data.train_data_path or options.data.valid_data_path
    groups = DECLARED[options.method].groups
    if has_corpus and "corpus" not in groups:
        takers = [name for name, method in DECLARED.items() if "corpus" in method.groups]
        raise UserError(
            f"--data-path and --mock-data are options of {' and '.join(takers)} only; add --method {takers[0]}, or "
            "leave them out."
        )
    if files and "data" not in groups:
        instead = "give --data-path" if "corpus" in groups else "leave them out"
        raise UserError(f"--train-data-path and --valid-data-path are not options of {options.method}; {instead}.")
    has_model, has_data = options.model != ModelConfig(), bool(has_corpus or files)
    needs_model = has_data or options.data.tokenizer_model is not None or options.checkpoint.load is not None
    if has_model or needs_model:
        model_is_given_once(options.model)
    return has_model, has_data
