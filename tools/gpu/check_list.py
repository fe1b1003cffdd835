"""The checks, in order, with their time limits. Imports neither torch nor the product."""

from dataclasses import dataclass

CORRECTNESS, SPEED = "correctness", "speed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table at the end."""

    name: str
    """Its name for ``--only``."""
    title: str
    limit_s: float
    """Seconds on a GPU, after which a hanging check is killed."""
    target: str
    """``module:function``; the function takes a ``Site``, returns its measurements, and raises where they are wrong."""
    alone: bool = False
    """In a process of its own, also with several ranks."""
    least_ranks: int = 1


INSTALL = Check(
    name="0",
    title="install the wheels, then doctor",
    limit_s=45,
    target="install:install_and_examine",
    alone=True,
)
ONE_CARD = {
    CORRECTNESS: (
        INSTALL,
        Check(name="1", title="logits against transformers", limit_s=30, target="check_numbers:logits"),
        Check(name="2", title="20 steps against the CPU's losses", limit_s=90, target="check_losses:losses"),
        Check(name="3", title="bf16, audit, frozen weights", limit_s=30, target="check_numbers:bf16_and_audit"),
        Check(name="4", title="save, resume, SIGTERM, export", limit_s=85, target="check_saving:saving"),
        Check(name="5", title="deterministic mode twice", limit_s=35, target="check_numbers:deterministic"),
        Check(name="6", title="kernels and host syncs of a step", limit_s=35, target="check_kernels:kernels"),
        Check(name="7", title="weight gradient against fp32", limit_s=10, target="check_kernels:weight_gradient"),
        Check(name="13", title="DPO's references; pretraining", limit_s=45, target="check_losses:methods"),
    ),
    SPEED: (
        INSTALL,
        Check(name="8", title="8 layers of 7B, and transformers", limit_s=100, target="check_speed:seven_b_layers"),
        Check(name="9", title="whole 7B on one card", limit_s=85, target="check_speed:whole_seven_b"),
        Check(name="10", title="4 layers of Llama-3-8B, packed, 32k", limit_s=65, target="check_speed:long_sequences"),
        Check(name="11", title="6 rounds of 1B", limit_s=50, target="check_memory:rounds"),
        Check(name="12", title="save and load 1B", limit_s=60, target="check_memory:checkpoint"),
    ),
}
"""Parts of a run on one GPU; each stays under seven minutes even if all limits are reached."""
MORE_CARDS = (
    INSTALL,
    Check(name="tp", title="20 steps at TP 2", limit_s=60, target="check_ranks:tensor_parallel", least_ranks=2),
    Check(name="pp", title="20 steps at PP 2", limit_s=60, target="check_ranks:pipeline_parallel", least_ranks=2),
    Check(name="dp", title="20 steps at DP 2", limit_s=60, target="check_ranks:data_parallel", least_ranks=2),
    Check(name="tp-pp", title="20 steps at TP 2 x PP 2", limit_s=60, target="check_ranks:both", least_ranks=4),
    Check(name="overlap", title="DP with overlap, rounds", limit_s=60, target="check_ranks:overlap", least_ranks=2),
    Check(
        name="async",
        title="async save, resume at another layout",
        limit_s=60,
        target="check_ranks:resume_elsewhere",
        least_ranks=2,
    ),
    Check(
        name="killed", title="a killed rank, and the restart", limit_s=90, target="check_ranks:killed", least_ranks=2
    ),
)
"""The correctness part under torchrun on several GPUs."""


def checks_of(part: str, ranks: int) -> tuple[Check, ...]:
    """The checks of a part on this number of ranks, in order."""
    if ranks == 1:
        return ONE_CARD[part]
    return tuple(check for check in MORE_CARDS if check.least_ranks <= ranks)
