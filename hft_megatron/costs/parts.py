"""The parts of a model in the order of the forward pass, and the passes that a step makes through each: no torch.

One walk up the model, in the order of the engine's forward pass, decides what the backward pass computes. FLOPs and
times by formula both follow from it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from hft_megatron.config.adapters import ADAPTER_PARTS, has_adapter
from hft_megatron.config.derived import layers_of_chunks
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.hft.units import (
    ATTENTION_IN,
    ATTENTION_OUT,
    EMBEDDING_NAME,
    FINAL_NORM_NAME,
    LM_HEAD_NAME,
    MLP_IN,
    MLP_OUT,
    NAMES_IN_LAYER,
)

Kind = Literal["embedding", "norm", "column", "rotation", "attention", "row", "swiglu", "head"]
"""``column``: matrices that share an input and are cut by their rows over tensor ranks; ``row``: one that is cut by its
columns. ``attention`` is the core alone, after the ``rotation`` of queries and keys."""
MATRICES: tuple[Kind, ...] = ("column", "row", "head")
"""The kinds that are products with weights."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the model, with the passes through it."""

    kind: Kind
    chunk: int
    """Number of the model's chunk, from the bottom up."""
    units: tuple[str, ...] = ()
    """Units whose weights it has. A tied head's unit is ``lm_head``, though the weight is the embedding's."""
    trained: tuple[str, ...] = ()
    """Units among them that train."""
    adapters: tuple[str, ...] = ()
    """Units of the adapters beside them that train, each A before its B."""
    forwards: int = 1
    """Number of forward passes: more than one with recomputation."""
    gives_gradient: bool
    """True if the backward pass computes the gradient of its input."""

    @property
    def goes_backward(self) -> bool:
        """True if its output has a gradient, because something in it or below it trains."""
        return self.gives_gradient or bool(self.trained) or bool(self.adapters)


def parts_of(
    shape: ModelShape,
    parallel: ParallelConfig,
    training: TrainingConfig,
    trains: Callable[[str], bool],
    *,
    head_forwards: int = 1,
) -> Iterator[Part]:
    """The parts of the whole model from the bottom up, when the units train for which ``trains`` is true.

    ``training``'s --recompute- options are read. ``head_forwards`` is how often the head's forward product is made.
    """
    walk = _Walk(shape=shape, parallel=parallel, training=training, trains=trains)
    return walk.parts(head_forwards)


@dataclass(kw_only=True)
class _Walk:
    shape: ModelShape
    parallel: ParallelConfig
    training: TrainingConfig
    trains: Callable[[str], bool]
    flows: bool = False
    """True if the hidden state at this point needs a gradient."""
    chunk: int = 0

    def parts(self, head_forwards: int) -> Iterator[Part]:
        yield self._part("embedding", (EMBEDDING_NAME,), 1)
        # Even above a frozen embedding the lowest hidden state then needs a gradient (``LlamaModel``).
        self.flows |= self._recomputed_layers_train()
        for chunk, layers in enumerate(layers_of_chunks(self.parallel, self.shape.num_layers)):
            self.chunk = chunk
            # What a stage receives always needs a gradient: megatron-core sends it back.
            self.flows |= layers.start > 0
            for layer_of_chunk, layer in enumerate(layers):
                yield from self._layer(layer, is_recomputed=self._is_recomputed(layer_of_chunk) and self.flows)
        yield self._part("norm", (FINAL_NORM_NAME,), 1)
        head = EMBEDDING_NAME if self.shape.tie_embeddings else LM_HEAD_NAME
        trained = (LM_HEAD_NAME,) if self.trains(head) else ()
        yield Part(
            kind="head",
            chunk=self.chunk,
            units=(LM_HEAD_NAME,),
            trained=trained,
            forwards=head_forwards,
            gives_gradient=self.flows,
        )

    def _layer(self, layer: int, *, is_recomputed: bool) -> Iterator[Part]:
        forwards = 2 if is_recomputed else 1

        def units(*modules: str) -> tuple[str, ...]:
            return tuple(f"model.layers.{layer}.{module}" for module in modules)

        yield self._part("norm", units("input_layernorm"), forwards)
        yield self._part("column", units(*ATTENTION_IN), forwards)
        yield self._part("rotation", (), forwards)
        again = is_recomputed or (self.training.recompute_granularity == "selective" and self.flows)
        yield self._part("attention", (), 2 if again else 1)
        yield self._part("row", units(ATTENTION_OUT), forwards)
        yield self._part("norm", units("post_attention_layernorm"), forwards)
        yield self._part("column", units(*MLP_IN), forwards)
        yield self._part("swiglu", (), forwards)
        yield self._part("row", units(MLP_OUT), forwards)

    def _part(self, kind: Kind, units: tuple[str, ...], forwards: int) -> Part:
        """The next part. The gradient of an input that matrices share is computed by all of them or by none."""
        trained = tuple(filter(self.trains, units))
        part = Part(
            kind=kind,
            chunk=self.chunk,
            units=units,
            trained=trained,
            adapters=self._adapters(units),
            forwards=forwards,
            gives_gradient=self.flows,
        )
        self.flows = part.goes_backward
        return part

    def _adapters(self, units: Iterable[str]) -> tuple[str, ...]:
        """The units of adapters that train beside matrices."""
        adapted = [unit for unit in units if has_adapter(unit, self.shape.adapters)]
        return tuple(filter(self.trains, (f"{unit}.{part}" for unit in adapted for part in ADAPTER_PARTS)))

    def _is_recomputed(self, layer_of_chunk: int) -> bool:
        """True if a layer's whole forward pass is recomputed: the first layers of every chunk under ``block``."""
        training = self.training
        if training.recompute_granularity != "full":
            return False
        assert training.recompute_num_layers is not None, "validate() asks for it"
        return training.recompute_method == "uniform" or layer_of_chunk < training.recompute_num_layers

    def _recomputed_layers_train(self) -> bool:
        lowest, *_ = layers_of_chunks(self.parallel, self.shape.num_layers)
        layers = [layer for layer in lowest if self._is_recomputed(layer)]
        units = [f"model.layers.{layer}.{module}" for layer in layers for module in NAMES_IN_LAYER]
        return any(map(self.trains, units)) or bool(self._adapters(units))
