"""The files that grow chunk by chunk, and the journal from which a killed preprocessing resumes.

While it runs, everything is in ``PREFIX_unfinished``. The journal records the length of every file after a number of
chunks; anything after that, left by a kill, is cut off. At the end indices are written, all files get their names, and
the facts, which show that everything is there, come last.
"""

import contextlib
import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hft_megatron.config.names import DataFormat
from hft_megatron.config.run_folder import sync, write_atomically
from hft_megatron.data.examples import SftCounts
from hft_megatron.data.files.sources import BAD_LINES, BOUNDARIES, FACTS, LOSS_MASK, UNFINISHED
from hft_megatron.data.preprocessed.facts import Facts, Job
from hft_megatron.data.preprocessed.index_file import token_dtype, write_index
from hft_megatron.data.preprocessed.worker import Documents
from hft_megatron.data.record_errors import RecordUse
from hft_megatron.errors import UserError

_JOURNAL, _LOCK = "journal.json", "lock"
_LENGTHS, _BOUNDARY_COUNTS = "lengths", "boundary_counts"
_GROWING = (".bin", f"{LOSS_MASK}.bin", f"{BOUNDARIES}.bin", BAD_LINES, _LENGTHS, _BOUNDARY_COUNTS)
_INDICES = (".idx", f"{LOSS_MASK}.idx", f"{BOUNDARIES}.idx")
_PRODUCTS = (*_GROWING[:4], *_INDICES)
"""Endings after the prefix, in the order in which the files get their names."""


@dataclass(kw_only=True)
class Progress:
    """The journal: the work that is done, and the length of every file then."""

    job: Job
    chunks: int
    documents: int
    examples: int
    longest: int
    bad_lines: int
    formats: tuple[DataFormat, ...]
    counts: SftCounts
    sizes: dict[str, int]
    use: RecordUse = field(default_factory=RecordUse)
    complete: bool = False
    """True if only the names are missing."""


class Output:
    """The output of one job, new or resumed."""

    def __init__(self, prefix: str, job: Job) -> None:
        """Raises UserError where the prefix already belongs to something else, or cannot be written."""
        self._prefix = prefix
        self._folder = Path(f"{prefix}{UNFINISHED}")
        self._files: dict[str, BinaryIO] = {}
        found = self._read_journal()
        if found is None or found.chunks == 0:
            self._refuse_to_overwrite()
            nothing = dict.fromkeys(_GROWING, 0)
            found = Progress(
                job=job,
                chunks=0,
                documents=0,
                examples=0,
                longest=0,
                bad_lines=0,
                formats=(),
                counts=SftCounts(),
                sizes=nothing,
            )
        difference = job.first_difference(found.job)
        if difference is not None:
            raise UserError(
                f"--output-prefix {prefix} holds unfinished work of another command: this one has {difference}; choose "
                f"another prefix, or remove {self._folder}."
            )
        self.progress = found

    def open(self) -> None:
        """Return to the position of the journal, and continue from there. Raises UserError where that is impossible."""
        if self.progress.complete:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            for name, size in self.progress.sizes.items():
                path = self._folder / name
                path.touch()
                if path.stat().st_size < size:
                    raise UserError(f"{path} is shorter than it was; remove {self._folder} and start again.")
                os.truncate(path, size)
                self._files[name] = path.open("ab")
        except OSError as error:
            raise UserError(f"--output-prefix {self._prefix} cannot be written: {error.strerror}.") from error

    def _lock(self) -> None:
        """Raise UserError where another process writes it. The lock ends with the process, however that ends."""
        self._files[_LOCK] = (self._folder / _LOCK).open("wb")
        try:
            fcntl.lockf(self._files[_LOCK], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output-prefix {self._prefix} is being written by another process; wait for it, or end it."
            ) from None

    def add(self, made: Documents) -> None:
        """Append the documents of the next chunk. Raises OSError."""
        progress = self.progress
        arrays = (made.tokens, made.loss_mask, made.boundaries, None, made.lengths, made.boundary_counts)
        sizes = dict(progress.sizes)
        for name, array in zip(_GROWING, arrays, strict=True):
            content = "".join(made.bad).encode() if array is None else array.tobytes()
            self._files[name].write(content)
            sizes[name] += len(content)
        # Only now: the journal must not contain half a chunk, which a full disk leaves.
        progress.sizes = sizes
        progress.chunks += 1
        progress.documents += len(made.lengths)
        progress.examples += len(made.boundaries) // 2
        progress.longest = max(progress.longest, made.longest)
        progress.bad_lines += len(made.bad)
        progress.formats = tuple(sorted({*progress.formats, *made.formats}))
        progress.counts.merge(made.counts)
        progress.use = progress.use.merged(made.use)

    def record(self) -> None:
        """Sync everything that was added to the disk, and then the journal. Raises OSError."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_atomically(self._folder / _JOURNAL, json.dumps(asdict(self.progress)) + "\n")

    def finish(self) -> Facts:
        """Write the indices, give all files their names, and write the facts last. Raises OSError."""
        progress = self.progress
        if not progress.complete:
            token_type = token_dtype(progress.job.vocab_size)
            for name, dtype, lengths in zip(
                _INDICES,
                (token_type, np.dtype(np.uint8), np.dtype(np.int32)),
                (_LENGTHS, _LENGTHS, _BOUNDARY_COUNTS),
                strict=True,
            ):
                self._files[lengths].flush()
                write_index(self._folder / name, dtype, self._folder / lengths)
                sync(self._folder / name)
            progress.complete = True
            self.record()
            self.close()
        for name in _PRODUCTS:
            source = self._folder / name
            if source.exists() and (name != BAD_LINES or progress.bad_lines):
                source.replace(f"{self._prefix}{name}")
        facts = Facts(
            job=progress.job,
            documents=progress.documents,
            examples=progress.examples,
            longest=progress.longest,
            bad_lines=progress.bad_lines,
            formats=progress.formats,
            counts=progress.counts,
        )
        sync(self._folder.parent)
        facts.write(self._prefix)
        for left in self._folder.iterdir():
            left.unlink()
        self._folder.rmdir()
        return facts

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # the journal doesn't contain what could not be written
                file.close()
        self._files.clear()

    def _read_journal(self) -> Progress | None:
        path = self._folder / _JOURNAL
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            job, counts = Job.from_dict(saved.pop("job")), SftCounts.from_dict(saved.pop("counts"))
            use = RecordUse.from_dict(saved.pop("use")) if "use" in saved else RecordUse()
            return Progress(job=job, counts=counts, formats=tuple(saved.pop("formats")), use=use, **saved)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}); remove {self._folder} and start again.") from error

    def _refuse_to_overwrite(self) -> None:
        for name in (*_PRODUCTS, FACTS):
            path = Path(f"{self._prefix}{name}")
            if path.exists():
                raise UserError(
                    f"--output-prefix {self._prefix}: {path} already exists; choose another prefix, or remove it."
                )
