"""What one rank raises, every rank raises. Run: pytest tests/parallel/test_consensus.py"""

import torch.distributed as dist

from hft_megatron.errors import UserError
from hft_megatron.parallel.consensus import gathered, on_rank_0, together


def outcomes() -> list[object]:
    """On each of two ranks: values of all, a mistake of rank 1, of rank 0, and a mistake where only rank 0 works."""
    rank = dist.get_rank()

    def fails(number: int) -> str:
        if rank == number:
            raise UserError(f"rank {rank} found a mistake")
        return f"rank {rank}"

    found: list[object] = [gathered(rank), together(lambda: fails(-1)), on_rank_0(lambda: fails(1))]
    for collective in (lambda: together(lambda: fails(1)), lambda: on_rank_0(lambda: fails(0))):
        try:
            found.append(collective())
        except UserError as error:
            found.append(str(error))
    return found


def test_values_and_mistakes_of_one_rank_are_those_of_all(ranks):
    expected = [[0, 1], ["rank 0", "rank 1"], "rank 0", "rank 1 found a mistake", "rank 0 found a mistake"]
    assert ranks(2).run(outcomes) == [expected, expected]
