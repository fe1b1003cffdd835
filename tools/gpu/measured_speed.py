"""Tokens and FLOPs per second of a run, by shapes; the shapes for GPUs and for toys."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from product import STEP_MS, Run

WARM_UP_STEPS = 3
"""Steps in which kernels are chosen, and moments are made."""
ACTUAL = "actual throughput per GPU (TFLOP/s/GPU)"
"""The product's own figure, without skipped products and with recomputed ones."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaMA."""

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    vocabulary: int

    def words(self, sequence: int) -> tuple[object, ...]:
        """The options of a run with random weights in this shape."""
        return (
            *("--num-layers", self.layers, "--hidden-size", self.hidden, "--ffn-hidden-size", self.inner),
            *("--num-attention-heads", self.heads, "--num-query-groups", self.groups),
            *("--vocab-size", self.vocabulary, "--untie-embeddings-and-output-weights"),
            *("--max-position-embeddings", sequence, "--seq-length", sequence),
        )

    @property
    def matrix_parameters(self) -> int:
        """Parameters of all products with weights; the embedding is looked up."""
        kv = self.groups * (self.hidden // self.heads)
        layer = 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.inner
        return self.layers * layer + self.hidden * self.vocabulary

    def model_flops_per_token(self, example: int) -> int:
        """6 x matrix parameters + 6 x layers x width x length of the example, which sees half of its scores."""
        return 6 * self.matrix_parameters + 6 * self.layers * self.hidden * example


SEVEN_B = Shape(layers=32, hidden=4096, inner=11008, heads=32, groups=32, vocabulary=32000)
LLAMA3_8B = Shape(layers=32, hidden=4096, inner=14336, heads=32, groups=8, vocabulary=128256)
ONE_B = Shape(layers=16, hidden=2048, inner=8192, heads=32, groups=8, vocabulary=32000)
TOY = Shape(layers=2, hidden=64, inner=112, heads=4, groups=2, vocabulary=512)


def speed_of(run: Run, shape: Shape, *, tokens: int, example: int) -> dict[str, Any]:
    """``tokens`` are a step's; by the median of the steps after the warm-up."""
    milliseconds = median(run.values(STEP_MS)[WARM_UP_STEPS:])
    figures = figures_of(milliseconds, shape, tokens=tokens, example=example)
    actual = run.values(ACTUAL)[WARM_UP_STEPS:]
    return {**figures, "actual TFLOP/s": median(actual) if actual else None, "peak GB": run.peak_bytes / 1e9}


def figures_of(milliseconds: float, shape: Shape, *, tokens: int, example: int) -> dict[str, Any]:
    """Figures of a step of this time."""
    per_second = tokens / milliseconds * 1e3
    return {
        "ms": milliseconds,
        "tokens/s": per_second,
        "model TFLOP/s": per_second * shape.model_flops_per_token(example) / 1e12,
    }
