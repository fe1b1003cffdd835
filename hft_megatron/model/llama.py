"""LLaMA on megatron-core's ``GPTModel``, through a layer spec that keeps one parameter per category matrix.

The only module that names ``GPTModel``, which 0.19 calls deprecated. Its successor there, ``HybridModel``, takes a spec
for each kind of layer and a pattern of kinds (``*-``: attention, then MLP), and counts the two as layers of their own:
with the first line that lacks ``GPTModel``, that pattern replaces the spec here, and ``parameter_names`` counts anew.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.training import TransformerImpl
from hft_megatron.errors import UserError
from hft_megatron.model.adapters import add_adapters
from hft_megatron.model.embedding import TokenEmbedding, without_gradient
from hft_megatron.model.head import Beside, TokenValues, VocabularyHead
from hft_megatron.model.layers import CategorySelfAttention, LlamaMLP, RMSNorm, RotaryTable
from hft_megatron.model.linear import RowParallel
from hft_megatron.model.torch_attention import PackedSegments, TorchAttention
from hft_megatron.parallel.groups import Placement


def check_implementation(implementation: TransformerImpl, *, bf16: bool) -> None:
    """Raises UserError where transformer-engine is asked for and its attention and norms cannot run.

    megatron-core's own finding counts, because an installed package that cannot be imported is no use. In fp32
    transformer-engine has no attention without a score matrix in memory.
    """
    if implementation == "local":
        return
    lacks = {
        "a CUDA device, and torch finds none": torch.cuda.is_available(),
        "bf16; add --bf16": bf16,
        "transformer-engine, which cannot be imported; run `pip install 'transformer-engine[pytorch]'`": bool(HAVE_TE),
    }
    for what, is_there in lacks.items():
        if not is_there:
            raise UserError(f"--transformer-impl {implementation} needs {what}, or leave it out.")


def layer_spec(implementation: TransformerImpl) -> ModuleSpec:
    """One LLaMA layer, with transformer-engine's attention and norms or with torch's."""
    norm: type = RMSNorm
    attention: type = TorchAttention
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

        norm, attention = TENorm, TEDotProductAttention
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=CategorySelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(linear_qkv=None, core_attention=attention, linear_proj=RowParallel),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=LlamaMLP,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class LlamaModel(GPTModel):
    """One model chunk."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        *,
        padded_vocab: int,
        placement: Placement,
        pre_process: bool,
        post_process: bool,
        virtual_stage: int | None,
    ) -> None:
        spec = layer_spec(config.transformer_impl)
        layers = get_num_layers_to_build(config, virtual_stage, placement.pipeline_rank)
        assert spec.submodules is not None
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[spec] * layers, layer_norm=spec.submodules.input_layernorm
            ),
            vocab_size=padded_vocab,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            pg_collection=placement.groups,
            vp_stage=virtual_stage,
        )
        self.shape = shape
        self._keeps_hidden_states = False
        self._beside: Beside | None = None
        if shape.adapters is not None:
            add_adapters(self.decoder.layers, shape.adapters, placement.tensor_rank)
        if pre_process:
            is_head = post_process and shape.tie_embeddings
            self.embedding.word_embeddings = TokenEmbedding(self.embedding.word_embeddings, is_head=is_head)
            self.embedding.register_forward_hook(self._lay_out_one_sequence)
        if pre_process and config.recompute_granularity == "full":
            self.embedding.register_forward_hook(self._let_recomputed_layers_train)
        self.rotary_pos_emb = RotaryTable(shape, config.params_dtype)
        if post_process:
            rows = padded_vocab // placement.tensor_size
            real_rows = max(0, min(rows, shape.vocab_size - placement.tensor_rank * rows))
            self.output_layer: VocabularyHead = VocabularyHead(self.output_layer, config, real_rows=real_rows)

    def hidden_states(self, tokens: Tensor, segments: PackedSegments) -> Tensor:
        """Returns this chunk's output for packed sequences, before the head.

        Tokens (t,) -> (t / tp or t, 1, h), on the last stage after the final norm. A chunk that is not the first reads
        the value of ``set_input_tensor`` instead.
        """
        with self.keeping_hidden_states():
            positions = segments.positions.unsqueeze(0)
            output: Tensor = self(tokens.unsqueeze(0), positions, None, packed_seq_params=segments)
            return output

    def head_weight(self) -> Parameter:
        """This rank's rows of the head, (rows, h), which may be the embedding's; on the last stage."""
        weight: Parameter = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        return weight

    @contextlib.contextmanager
    def keeping_hidden_states(self) -> Iterator[None]:
        """Makes the last stage's output hidden states as well, (s / tp or s, b, h), those after the final norm."""
        self._keeps_hidden_states = True
        try:
            yield
        finally:
            self._keeps_hidden_states = False

    @contextlib.contextmanager
    def giving_beside_losses(self, beside: Beside) -> Iterator[None]:
        """Makes the last stage's output for labels ``TokenValues``, each (b, s)."""
        self._beside = beside
        try:
            yield
        finally:
            self._beside = None

    def mixed_embeddings(self, tokens: Tensor, others: Tensor, share: float) -> Tensor:
        """``(1 - share) E(tokens) + share E(others)`` of two times (b, s) tokens, (s / tp or s, b, h): an input for the
        first stage's layers in place of the embedding's output. No gradient reaches the embedding."""
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        with torch.no_grad():
            own, other = (self.embedding(input_ids=ids, position_ids=positions) for ids in (tokens, others))
            mixed: Tensor = own.lerp(other, share)
        table = self.embedding.word_embeddings
        # DDP waits for a gradient of every trainable weight; the head's comes where both are one weight on one stage.
        if table.weight.requires_grad and torch.is_grad_enabled() and not table.is_head:
            return without_gradient(mixed, table.weight)
        if self.config.recompute_granularity == "full":
            self._let_recomputed_layers_train(self.embedding, (), mixed)
        return mixed

    def _lay_out_one_sequence(self, module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
        """(s, 1, h) with the strides of a tensor made in that shape; the same memory.

        megatron-core transposes (b, s, h), which leaves the dimension of one sequence with a stride that no memory
        has. Torch's matmul then treats each token as a batch of its own where the weight needs no gradient: in bf16 on
        CPU a frozen matrix costs several times what a trainable one does.
        """
        return output.squeeze(1).unsqueeze(1) if output.size(1) == 1 else output

    def _let_recomputed_layers_train(self, module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        """Makes the output of a frozen embedding require a gradient where recomputed layers would not train without it.

        megatron-core's ``CheckpointFunction`` sees a layer's inputs and not its weights: when no input needs a gradient
        neither does its output, and the weights inside silently never train. Elsewhere the flag stays off, so that
        autograd computes no input gradient below the lowest weight that trains.
        """
        if not torch.is_grad_enabled() or output.requires_grad:
            return
        by_block = self.config.recompute_method == "block"
        recomputed = list(self.decoder.layers)[: self.config.recompute_num_layers if by_block else None]
        if any(weight.requires_grad for layer in recomputed for weight in layer.parameters()):
            output.requires_grad_()

    def _postprocess(self, *, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Tensor | TokenValues:
        """Hidden states before the last stage; there logits (b, s, rows), or with labels (b, s) losses (b, s), or the
        values asked for in their place."""
        if self._keeps_hidden_states:
            return hidden_states
        if labels is None or not self.post_process:
            output: Tensor = super()._postprocess(hidden_states=hidden_states, labels=labels, **others)
            return output
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        losses: Tensor | TokenValues
        losses, _ = self.output_layer(hidden_states, weight=weight, labels=labels.t(), beside=self._beside)
        return losses.t().contiguous() if isinstance(losses, Tensor) else losses.by_sequence()
