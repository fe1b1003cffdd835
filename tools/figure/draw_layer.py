"""Draws the README's picture: which matrices of two neighbouring layers train in a round, from a real plan.

Run: ``python tools/figure/draw_layer.py`` writes ``hft_layers.svg`` beside this file.
"""

from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.hft.plan import Plan, make_plan

TARGET = Path(__file__).with_name("hft_layers.svg")
SEED = 0
"""A draw with two feed-forward matrices in one layer and one in the other, as the rule has it."""
WIDTH, HEIGHT = 880, 330
INK, FAINT, TRAINS, FROZEN = "#1f2933", "#8a949e", "#1f7a6d", "#eef0f2"

# (module of the layer, label, left edge, width): in the order the tokens pass them.
BLOCKS = (
    ("input_layernorm", "norm", 90, 58),
    ("self_attn.q_proj", "q", 160, 58),
    ("self_attn.k_proj", "k", 222, 58),
    ("self_attn.v_proj", "v", 284, 58),
    ("self_attn.o_proj", "o", 346, 58),
    ("post_attention_layernorm", "norm", 428, 58),
    ("mlp.gate_proj", "gate", 498, 116),
    ("mlp.up_proj", "up", 618, 116),
    ("mlp.down_proj", "down", 738, 116),
)
LEGEND = (
    (True, "trains", "weight gradient, gradient buffer, reduce-scatter, all-gather, fp32 master, two moments"),
    (False, "frozen", "forward and input gradient only; its bits do not change, and bf16 costs 2 bytes per weight"),
)


def drawn_plan() -> Plan:
    """The plan of a two-layer LLaMA at ratio 0.5."""
    shape = ModelShape(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=16,
        vocab_size=128,
        max_position_embeddings=64,
    )
    return make_plan(shape, HFTConfig(), default_seed=SEED)


def draw(plan: Plan) -> str:
    """The picture as SVG text."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="15" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(282, 32, "attention: 2 of 4 train", anchor="middle"),
        _text(676, 32, "feed-forward: 2 or 1 of 3, so half on average", anchor="middle"),
    ]
    for layer, top in ((1, 50), (0, 130)):
        lines += _layer(plan, layer, top)
    for (trains, word, cost), top in zip(LEGEND, (232, 278), strict=True):
        lines += [*_block(90, top, 70, 32, word, trains), _text(176, top + 21, cost)]
    return "\n".join([*lines, "</svg>", ""])


def _layer(plan: Plan, layer: int, top: int) -> Iterator[str]:
    yield _text(14, top + 37, f"layer {layer}")
    yield f'<path d="M70 {top + 32} H866" stroke="{FAINT}" stroke-width="2"/>'
    for module, label, left, width in BLOCKS:
        yield from _block(left, top, width, 64, label, plan.trains(f"model.layers.{layer}.{module}"))


def _block(left: int, top: int, width: int, height: int, label: str, trains: bool) -> Iterator[str]:
    fill, edge = (TRAINS, TRAINS) if trains else (FROZEN, FAINT)
    dashes = "" if trains else ' stroke-dasharray="4 3"'
    yield (
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{edge}"{dashes}/>'
    )
    middle = (left + width // 2, top + height // 2 + 5)
    yield _text(*middle, label, anchor="middle", fill="white" if trains else INK)


def _text(x: int, y: int, words: str, anchor: str = "start", fill: str = INK) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


if __name__ == "__main__":
    TARGET.write_text(draw(drawn_plan()), encoding="utf-8")
