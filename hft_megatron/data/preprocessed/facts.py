"""Origin and rules of preprocessed data: ``PREFIX_preprocessed.json``, written last."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hft_megatron.config.data import data_keys
from hft_megatron.config.declared import flag
from hft_megatron.config.names import DataFormat
from hft_megatron.config.run_folder import write_atomically
from hft_megatron.data.examples import NO_LIMIT, ExampleRules, SftCounts
from hft_megatron.data.files.sources import BAD_LINES, FACTS, UNFINISHED
from hft_megatron.data.formats.table import FORMATS
from hft_megatron.data.record_errors import RecordUse
from hft_megatron.data.tokenizer import TokenizerFacts
from hft_megatron.errors import UserError

_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the bytes of the output."""

    inputs: tuple[str, ...]
    """sha256 of each input file, in their order."""
    tokenizer: str
    chat_template: str
    template_variables: dict[str, str]
    vocab_size: int
    seq_length: int | None
    """Sequence length; None where examples have no limit."""
    long_examples: str
    loss_on: str
    train_on_eos: bool
    data_format: str | None
    append_eod: bool
    document_separator: str | None
    ignore_keys: tuple[str, ...]
    data_keys: str | None
    prompt_separator: str

    @staticmethod
    def of(
        inputs: tuple[str, ...],
        tokenizer: TokenizerFacts,
        rules: ExampleRules,
        *,
        append_eod: bool,
        document_separator: str | None,
    ) -> "Job":
        """The job of these inputs and options."""
        return Job(
            inputs=inputs,
            tokenizer=tokenizer.identity,
            chat_template=tokenizer.chat_template,
            template_variables=dict(tokenizer.template_variables),
            vocab_size=tokenizer.vocab_size,
            seq_length=None if rules.seq_length == NO_LIMIT else rules.seq_length,
            long_examples=rules.long_examples,
            loss_on=rules.loss.loss_on,
            train_on_eos=rules.loss.train_on_eos,
            data_format=rules.records.data_format,
            append_eod=append_eod,
            document_separator=document_separator,
            ignore_keys=rules.records.ignore_keys,
            data_keys=",".join(f"{key}={known}" for key, known in rules.records.data_keys) or None,
            prompt_separator=rules.records.prompt_separator,
        )

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "Job":
        """The inverse of ``asdict``, of JSON."""
        return Job(**{**saved, "inputs": tuple(saved["inputs"]), "ignore_keys": tuple(saved["ignore_keys"])})

    def first_difference(self, other: "Job") -> str | None:
        """The first difference in words, with this job's value first; None without any."""
        for name, mine in asdict(self).items():
            theirs = getattr(other, name)
            if mine != theirs:
                if name in _TOLD_BY_NAME:
                    return _TOLD_BY_NAME[name]
                return f"{flag(name)} {_word(mine)} instead of {_word(theirs)}"
        return None


_TOLD_BY_NAME = {
    "inputs": "other input",
    "tokenizer": "another tokenizer",
    "chat_template": "another chat template",
    "template_variables": "another tokenizer",
    "vocab_size": "another tokenizer",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The contents of the file."""

    job: Job
    documents: int
    examples: int
    longest: int
    """Positions of the longest document."""
    bad_lines: int
    formats: tuple[DataFormat, ...]
    counts: SftCounts

    @property
    def use(self) -> RecordUse:
        """Effects of the job's rules about records: a job whose rules had none was not completed."""
        return RecordUse(keys=data_keys(self.job.data_keys), separator=self.job.prompt_separator)

    @property
    def origin(self) -> dict[str, Any]:
        """Origin of the examples, as for the same files read directly; with more entries where reading differed."""
        job = self.job
        more = {"bad_lines": self.bad_lines, "document_separator": job.document_separator}
        return {"files": list(job.inputs), **{name: value for name, value in more.items() if value}}

    def summary(self, prefix: str) -> str:
        """One line for a person."""
        counts = self.counts
        long = f", {counts.truncated} truncated, {counts.dropped} dropped, {counts.split} split"
        bad = f"; {self.bad_lines:,} bad lines in {prefix}{BAD_LINES}" if self.bad_lines else ""
        return (
            f"{prefix} ({', '.join(self.formats)}{self.use.words()}): {self.documents:,} documents, {self.examples:,} "
            f"examples, {counts.trained_tokens:,} trained tokens of {counts.tokens:,}"
            f"{long if counts.truncated + counts.dropped + counts.split else ''}{bad}"
        )

    def write(self, prefix: str) -> None:
        """Complete the data of ``prefix``."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        write_atomically(Path(f"{prefix}{FACTS}"), text + "\n")


def read_facts(prefix: str) -> Facts:
    """The facts of complete data. Raises UserError for data that are not complete, or without readable facts."""
    path = Path(f"{prefix}{FACTS}")
    if not path.exists() and Path(f"{prefix}{UNFINISHED}").exists():
        raise UserError(
            f"{prefix} is not completely preprocessed; run `hft-megatron preprocess` again with the same options."
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if (found := saved.pop("format")) != _FORMAT:
            raise UserError(
                f"{path} has format {found}, but this version of hft_megatron reads records by other rules and "
                f"writes format {_FORMAT}; preprocess the data again."
            )
        job, counts = Job.from_dict(saved.pop("job")), SftCounts.from_dict(saved.pop("counts"))
        return Facts(job=job, counts=counts, formats=tuple(saved.pop("formats")), **saved)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, which records how {prefix}.bin was made; copy it too, or make the data with "
            f"`hft-megatron preprocess`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again, or preprocess the data again.") from error


def check_facts(facts: Facts, prefix: str, tokenizer: TokenizerFacts, rules: ExampleRules) -> None:
    """Raise UserError where a run with this tokenizer and these rules would make other examples of the same files."""
    job = facts.job
    if "text" in facts.formats and not job.append_eod:
        raise UserError(
            f"{prefix} was preprocessed without --append-eod, but fine-tuning ends every text with it; preprocess the "
            f"data again with --append-eod."
        )
    run = Job.of(job.inputs, tokenizer, rules, append_eod=job.append_eod, document_separator=job.document_separator)
    if job.seq_length is None and run.seq_length is not None and facts.longest > run.seq_length:
        raise UserError(
            f"{prefix} was preprocessed with --seq-length unset, but the run has {run.seq_length}, and a document has "
            f"{facts.longest} positions; preprocess the data again with --seq-length {run.seq_length}."
        )
    for what, theirs, ours in _differences(facts, run):
        raise UserError(
            f"{prefix} was preprocessed with {what} {theirs}, but the run has {ours}; use the same value, or "
            f"preprocess the data again."
        )


def _differences(facts: Facts, run: Job) -> Iterator[tuple[str, object, object]]:
    """Yields (what, of the data, of the run) for every setting that changes the examples, in the options' words."""
    job = facts.job
    if (job.tokenizer, job.template_variables) != (run.tokenizer, run.template_variables):
        yield "a --tokenizer-model of digest", job.tokenizer[:12], f"one of digest {run.tokenizer[:12]}"
    if job.chat_template != run.chat_template:
        theirs, ours = _where_they_differ(job.chat_template, run.chat_template)
        yield "a --chat-template with", theirs, f"one with {ours}"
    of_records = ["data_keys"] * _reads_other_keys(facts, run) + ["prompt_separator"] * _joins(facts)
    for name in ("loss_on", "train_on_eos", "ignore_keys", *of_records):
        if getattr(job, name) != getattr(run, name):
            yield flag(name), _word(getattr(job, name)), _word(getattr(run, name))
    if run.data_format is not None and facts.formats != (run.data_format,):
        yield "records of the format", " and ".join(facts.formats), f"--data-format {run.data_format}"
    # Limits that no example reached make no difference.
    for limit in (job.seq_length, run.seq_length):
        if limit is not None and facts.longest > limit:
            for name in ("seq_length", "long_examples"):
                if getattr(job, name) != getattr(run, name):
                    yield flag(name), _word(getattr(job, name)), _word(getattr(run, name))


def _reads_other_keys(facts: Facts, run: Job) -> bool:
    """True if the run's --data-keys would make other records of the inputs: all keys of the data had an effect, and
    further ones have one where a record has the key."""
    own, asked = set(facts.use.keys), set(data_keys(run.data_keys))
    there = {key for format in facts.formats for key in (*FORMATS[format].keys, *FORMATS[format].reads)}
    return not own <= asked or any(key in there or key in facts.counts.unread for key, _ in asked - own)


def _joins(facts: Facts) -> bool:
    """True if another --prompt-separator would make other records, as far as formats show: some don't use it."""
    return not set(facts.formats) <= {"messages", "sharegpt", "alpaca", "text"}


def _word(value: object) -> object:
    if isinstance(value, tuple):
        return ",".join(value) or "unset"
    if isinstance(value, str) and not (value and value.isprintable()):
        return repr(value)
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else value


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """The parts of two texts that differ."""
    common = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(one), len(other)) if common is None else common
    return repr(one[start : start + 40]), repr(other[start : start + 40])
