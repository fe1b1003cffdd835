"""Opens preprocessed data as the examples of a source: memory-mapped, with an index in memory and no tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hft_megatron.data.examples import ExampleRules
from hft_megatron.data.files.sources import BOUNDARIES, LOSS_MASK
from hft_megatron.data.preprocessed.facts import Facts, check_facts, read_facts
from hft_megatron.data.preprocessed.index_file import open_documents, token_dtype
from hft_megatron.data.tokenizer import Encoded, Tokenizer
from hft_megatron.errors import UserError

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedExamples:
    """Examples whose tokens stay on the disk until they are asked for."""

    file: str
    """File of the tokens, for errors."""
    vocab_size: int
    tokens: NDArray[np.generic]
    trained: NDArray[np.generic]
    """Mask of one byte per token, mapped as well."""
    starts: NDArray[np.int64]
    """The first token of each example, shape (examples,)."""
    lengths: NDArray[np.int32]

    def example(self, index: int) -> Encoded:
        """Copies of the example's tokens and mask.

        Raises UserError for an id that the tokenizer doesn't have: bytes are not checked before they are needed, and on
        a GPU such an id would end the run without a word about the file.
        """
        start = int(self.starts[index])
        span = slice(start, start + int(self.lengths[index]))
        ids = self.tokens[span].astype(np.int32)
        # As unsigned, a negative id is too large as well.
        if int(ids.view(np.uint32).max()) >= self.vocab_size:
            raise UserError(
                f"{self.file} is damaged: the tokens from {start} on have an id beyond the tokenizer's "
                f"{self.vocab_size}; copy it again, or preprocess the data again."
            )
        return ids, self.trained[span].astype(np.bool_)

    def place(self, index: int) -> str:
        """Empty: preprocessed data are no longer tied to the files that they were made from."""
        return ""


def open_preprocessed(prefix: str, tokenizer: Tokenizer, rules: ExampleRules) -> tuple[MappedExamples, Facts]:
    """The examples of ``prefix`` and their account.

    Holds 12 bytes per example. Raises UserError for files that are missing, damaged or of different data, and for data
    that this tokenizer and these rules would make differently.
    """
    facts = read_facts(prefix)
    check_facts(facts, prefix, tokenizer.facts, rules)
    lengths, tokens = open_documents(prefix)
    _check_type(f"{prefix}.idx", tokens, token_dtype(facts.job.vocab_size))
    mask_lengths, trained = open_documents(f"{prefix}{LOSS_MASK}")
    _check_type(f"{prefix}{LOSS_MASK}.idx", trained, np.dtype(np.uint8))
    bound_counts, bounds = open_documents(f"{prefix}{BOUNDARIES}")
    _check_type(f"{prefix}{BOUNDARIES}.idx", bounds, np.dtype(np.int32))
    for companion, found in (("", lengths), (LOSS_MASK, mask_lengths), (BOUNDARIES, bound_counts)):
        if len(found) != facts.documents:
            raise _other_data(f"{prefix}{companion}.idx", f"it has {len(found)} documents instead of {facts.documents}")
    starts, sizes = _index(prefix, lengths, mask_lengths, bound_counts, bounds)
    if len(sizes) != facts.examples:
        raise _other_data(f"{prefix}{BOUNDARIES}.idx", f"it has {len(sizes)} examples instead of {facts.examples}")
    store = MappedExamples(
        file=f"{prefix}.bin",
        vocab_size=facts.job.vocab_size,
        tokens=tokens,
        trained=trained,
        starts=starts,
        lengths=sizes,
    )
    return store, facts


def _index(
    prefix: str,
    lengths: NDArray[np.int32],
    mask_lengths: NDArray[np.int32],
    bound_counts: NDArray[np.int32],
    bounds: NDArray[np.generic],
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Start of each example among all tokens, and its number of tokens; block by block, to stay small."""
    starts = np.empty(len(bounds) // 2, dtype=np.int64)
    sizes = np.empty(len(bounds) // 2, dtype=np.int32)
    token = example = 0
    for first in range(0, len(lengths), _BLOCK):
        size = np.asarray(lengths[first : first + _BLOCK])
        if not np.array_equal(size, mask_lengths[first : first + _BLOCK]):
            raise _other_data(f"{prefix}{LOSS_MASK}.idx", f"documents after {first} have other lengths")
        each = np.asarray(bound_counts[first : first + _BLOCK]) // 2
        begins = token + np.cumsum(size, dtype=np.int64) - size
        stop = example + int(each.sum())
        pairs = np.asarray(bounds[2 * example : 2 * stop]).reshape(-1, 2)
        inside = (pairs[:, 0] >= 0) & (pairs[:, 1] - pairs[:, 0] >= 2) & (pairs[:, 1] <= np.repeat(size, each))
        if len(pairs) != stop - example or not inside.all():
            raise _other_data(f"{prefix}{BOUNDARIES}.bin", f"examples lie outside of the documents after {first}")
        starts[example:stop] = np.repeat(begins, each) + pairs[:, 0]
        sizes[example:stop] = pairs[:, 1] - pairs[:, 0]
        token, example = token + int(size.sum(dtype=np.int64)), stop
    return starts, sizes


def _check_type(index: str, values: NDArray[np.generic], expected: np.dtype[np.generic]) -> None:
    if values.dtype != expected:
        raise _other_data(index, f"it holds {values.dtype} instead of {expected}")


def _other_data(path: str, reason: str) -> UserError:
    return UserError(
        f"{path} does not belong to the files beside it: {reason}; copy all files of the prefix again, or preprocess "
        f"the data again."
    )
