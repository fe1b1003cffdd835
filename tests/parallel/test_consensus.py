"""What one rank raises, every rank raises. Run: pytest tests/parallel/test_consensus.py"""

import torch.distributed as dist

from hft_megatron.errors import RunFailed, UserError
from hft_megatron.parallel.consensus import gathered, on_rank_0, together


def outcomes() -> list[object]:
    """On each of two ranks: values of all, a mistake of rank 1, and one where only rank 0 works; the same of failures
    that are nobody's mistake."""
    rank = dist.get_rank()

    def fails(number: int, kind: type[Exception] = UserError) -> str:
        if rank == number:
            raise kind(f"rank {rank} found a mistake" if kind is UserError else f"rank {rank} has failed")
        return f"rank {rank}"

    found: list[object] = [gathered(rank), together(lambda: fails(-1)), on_rank_0(lambda: fails(1))]
    for collective in (lambda: together(lambda: fails(1)), lambda: on_rank_0(lambda: fails(0))):
        try:
            found.append(collective())
        except UserError as error:
            found.append(str(error))
    for collective in (lambda: together(lambda: fails(1, RunFailed)), lambda: on_rank_0(lambda: fails(0, RunFailed))):
        try:
            found.append(collective())
        except RunFailed as error:
            found.append(str(error))
    return found


def test_values_and_mistakes_of_one_rank_are_those_of_all(ranks):
    expected = [[0, 1], ["rank 0", "rank 1"], "rank 0", "rank 1 found a mistake", "rank 0 found a mistake"]
    expected += ["rank 1 has failed", "rank 0 has failed"]
    assert ranks(2).run(outcomes) == [expected, expected]
