"""Text from a model, token by token: greedy, or drawn from its distribution, in any layout."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import numpy as np
import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from torch import Tensor

from hft_megatron.evaluation.examples import EndedBy, Generated
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.model.kv_cache import KeyValueCache


class Decoder(Protocol):
    """The tokenizer interface that generation needs."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""


@dataclass(frozen=True, kw_only=True)
class GenerationRules:
    """Rules for choosing tokens and ending a text. Defaults are greedy."""

    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Maximum tokens of a text; fewer where the model's window ends before."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Divisor of the logits before one token is drawn; 0 always takes the likeliest."""
    top_k: Annotated[int, Ge(0)] = 0
    """Draw among this many likeliest tokens; 0: among all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draw among the likeliest tokens that together have this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the draws. Each prompt has its own stream by its number, so that neither batches nor ranks matter."""
    stop: tuple[str, ...] = ()
    """Texts that end a generation, without being part of it."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a generation."""


@dataclass
class _Text:
    """One generation as it grows."""

    prompt: Tensor
    draws: torch.Generator
    ids: list[int] = field(default_factory=list)
    ended_by: EndedBy | None = None
    text: str = ""
    """Set where a stop string ended it."""

    @property
    def newest(self) -> int:
        """The token to be read next; arbitrary for a text that has ended without one."""
        return self.ids[-1] if self.ids else 0

    @property
    def whole(self) -> Tensor:
        """Prompt and all tokens so far, (tokens,)."""
        return torch.cat([self.prompt, torch.tensor(self.ids, dtype=torch.int64)])


def generate(
    model: ModelInPlace,
    tokenizer: Decoder,
    prompts: Sequence[NDArray[np.int32]],
    rules: GenerationRules,
    *,
    numbers: Sequence[int],
    use_cache: bool = True,
) -> list[Generated]:
    """Continues a batch of prompts; every rank of the replica gets all of it. Collective over a replica's ranks.

    ``numbers`` give each prompt its own draws. Without ``use_cache`` every token is computed again for each new one,
    which gives the same and takes longer.
    """
    texts = [
        _Text(prompt=torch.from_numpy(ids).long(), draws=_draws(rules.seed, number))
        for ids, number in zip(prompts, numbers, strict=True)
    ]
    longest = max(len(text.prompt) for text in texts)
    assert longest < model.window, "a task's prompts leave room for a token"
    with torch.inference_mode():
        cache = _new_cache(model, texts, rules) if use_cache else None
        active, hidden = texts, _at_ends(model.read([text.prompt for text in texts], cache), texts)
        while True:
            _append(model, tokenizer, rules, active, hidden)
            active = _still_growing(active, cache)
            if not active:
                return [_result(text, tokenizer) for text in texts]
            if cache is not None:
                hidden = model.read_next(torch.tensor([text.newest for text in active]), cache)
            else:
                hidden = _at_ends(model.read([text.whole for text in active]), active)


def _draws(seed: int, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _new_cache(model: ModelInPlace, texts: Sequence[_Text], rules: GenerationRules) -> KeyValueCache:
    lengths = [len(text.prompt) for text in texts]
    return KeyValueCache(
        room=max(lengths) + rules.max_new_tokens,
        lengths=torch.tensor(lengths, device=model.placement.device),
        longest=max(lengths),
    )


def _at_ends(hidden: Tensor | None, texts: Sequence[_Text]) -> Tensor | None:
    """The hidden states (sequences, h) of last tokens among those of whole sequences (tokens, h)."""
    if hidden is None:
        return None
    ends = torch.tensor([len(text.prompt) + len(text.ids) for text in texts]).cumsum(0) - 1
    return hidden[ends.to(hidden.device)]


def _append(
    model: ModelInPlace, tokenizer: Decoder, rules: GenerationRules, active: Sequence[_Text], hidden: Tensor | None
) -> None:
    """Chooses the next token of each text on the last stage, and sends it to the others; marks the texts that end."""
    placement = model.placement
    if hidden is None:
        chosen = torch.empty(len(active), dtype=torch.int64, device=placement.device)
    elif rules.temperature == 0:
        chosen = model.readout.likeliest(hidden)
    else:
        logits = model.readout.logits(hidden)
        are_numbers = logits.isfinite().all(dim=1)
        drawn = draw(logits.where(are_numbers[:, None], 0.0), rules, [text.draws for text in active])
        chosen = drawn.where(are_numbers, -1)
    if placement.pipeline_size > 1:
        dist.broadcast(chosen, group=placement.groups.pp, group_src=placement.pipeline_size - 1)
    for text, token in zip(active, chosen.tolist(), strict=True):
        if text.ended_by is None:
            _add_token(text, token, tokenizer, rules, model.window)


def draw(logits: Tensor, rules: GenerationRules, draws: Sequence[torch.Generator]) -> Tensor:
    """One token for each row of logits (n, vocabulary), which are divided by the temperature, cut to ``top_k`` and then
    to ``top_p``, in the order of transformers' ``generate``. A draw is one number of a row's stream."""
    scaled, order = _likeliest_first(logits / rules.temperature, rules.top_k)
    # On CPU, where the order of sums is always the same.
    shares = scaled.cpu().double().softmax(dim=1)
    # A token stays while the likelier ones have less than top_p together, so that the likeliest always does.
    shares = shares.where(shares.cumsum(dim=1) - shares < rules.top_p, 0.0)
    sums = shares.cumsum(dim=1)
    numbers = torch.stack([torch.rand((), dtype=torch.float64, generator=one) for one in draws])
    places = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)
    # A number next to 1 may lie beyond every sum that rounding left.
    places = places.minimum((shares > 0).sum(dim=1, keepdim=True) - 1)
    return order.gather(1, places.to(order.device)).squeeze(1)


def _likeliest_first(scaled: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest of each row (n, vocabulary), or all for 0, and their tokens; of equal ones the first."""
    if not 0 < top_k < scaled.size(1):
        return scaled.sort(dim=1, descending=True, stable=True)
    # Among equal numbers topk takes any: it is asked for all that equal the last one, and these are sorted.
    last = scaled.topk(top_k, dim=1).values[:, -1:]
    enough = int((scaled >= last).sum(dim=1).max())
    tokens = scaled.topk(enough, dim=1, sorted=False).indices.sort(dim=1).values
    largest, order = scaled.gather(1, tokens).sort(dim=1, descending=True, stable=True)
    return largest[:, :top_k], tokens.gather(1, order)[:, :top_k]


def _add_token(text: _Text, token: int, tokenizer: Decoder, rules: GenerationRules, window: int) -> None:
    if token < 0:
        text.ended_by = "no number"
        return
    if token in rules.end_ids:
        text.ended_by = "end token"
        return
    text.ids.append(token)
    if rules.stop:
        # A token has at least one byte of the text, so that a new stop string is within the last ones.
        last = max(len(stop.encode()) for stop in rules.stop) + 8
        if _first_stop(tokenizer.decode(text.ids[-last:]), rules.stop) is not None:
            whole = tokenizer.decode(text.ids)
            end = _first_stop(whole, rules.stop)
            if end is not None:
                text.ended_by, text.text = "stop string", whole[:end]
                return
    if len(text.ids) == min(rules.max_new_tokens, window - len(text.prompt)):
        text.ended_by = "length"


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    places = [text.find(stop) for stop in stops]
    return min((place for place in places if place >= 0), default=None)


def _still_growing(active: list[_Text], cache: KeyValueCache | None) -> list[_Text]:
    """The texts that continue, with ended ones among them as long as these are fewer than half: dropping them copies
    the cache."""
    growing = [row for row, text in enumerate(active) if text.ended_by is None]
    if not growing or (cache is not None and len(growing) > len(active) / 2):
        return active if growing else []
    kept = [active[row] for row in growing]
    if cache is not None:
        # The cache has all tokens except the newest.
        cache.keep(growing, longest=max(len(text.prompt) + len(text.ids) for text in kept) - 1)
    return kept


def _result(text: _Text, tokenizer: Decoder) -> Generated:
    assert text.ended_by is not None
    whole = text.text if text.ended_by == "stop string" else tokenizer.decode(text.ids)
    return Generated(ids=tuple(text.ids), text=whole, ended_by=text.ended_by)
