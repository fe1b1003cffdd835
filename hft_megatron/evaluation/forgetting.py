"""A tuned model's forgetting of a text: its loss compared with its base's, and the divergence of their predictions.

The two divergences weigh tokens by different models. KL(base || tuned) counts tokens that the base expected and the
tuned model no longer does; KL(tuned || base) is the one that ties policies to a reference.
"""

from collections.abc import Iterable, Sequence

import torch

from hft_megatron.data.tokenizer import Encoded, Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.examples import TextDifference
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.measures import Statistics


def check_one_vocabulary(names: tuple[str, str], vocab_sizes: tuple[int, int], tokenizers: Sequence[Tokenizer]) -> None:
    """Raises UserError unless base and tuned model have one vocabulary, over whose tokens divergences are summed."""
    if vocab_sizes[0] != vocab_sizes[1]:
        raise UserError(
            f"{names[0]} has a vocabulary of {vocab_sizes[0]} rows and {names[1]} one of {vocab_sizes[1]}, but their "
            "predictions can only be compared over the same tokens; use the base that the model was tuned from."
        )
    if tokenizers[0].facts.identity != tokenizers[1].facts.identity:
        raise UserError(
            f"{names[0]} and {names[1]} have tokenizers that split texts differently, but their predictions can only "
            "be compared over the same tokens; read both with one tokenizer, by --tokenizer-model."
        )


def compare(base: ModelInPlace, tuned: ModelInPlace, batch: Sequence[Encoded]) -> list[TextDifference] | None:
    """The differences on sequences, in their order; None off the last pipeline stage. Collective over a replica's
    ranks, which hold both models in one layout.

    Logits of both are in memory for a chunk of tokens at a time.
    """
    assert not any(scored[0] for _, scored in batch), "nothing predicts a first token"
    with torch.inference_mode():
        # The last token of a sequence predicts nothing that is wanted.
        read = [torch.from_numpy(ids[:-1]).long() for ids, _ in batch]
        of_base, of_tuned = base.read(read), tuned.read(read)
        if of_base is None or of_tuned is None:
            return None
        masks = [torch.from_numpy(scored[1:]) for _, scored in batch]
        predicts = torch.cat(masks).to(of_base.device)
        targets = torch.cat([torch.from_numpy(ids[1:]).long() for ids, _ in batch]).to(of_base.device)[predicts]
        of_base, of_tuned = of_base[predicts], of_tuned[predicts]
        nats = [
            -model.readout.token_scores(hidden, targets)[0] for model, hidden in ((base, of_base), (tuned, of_tuned))
        ]
        # (4, scored tokens)
        values = torch.cat([torch.stack(nats), base.readout.divergences(of_base, tuned.readout, of_tuned)])
    counts = [int(mask.sum()) for mask in masks]
    parts = values.double().cpu().split(counts, dim=1)
    return [_difference(count, part.sum(dim=1).tolist()) for count, part in zip(counts, parts, strict=True)]


def _difference(tokens: int, sums: Sequence[float]) -> TextDifference:
    base_nats, tuned_nats, kl_base_tuned, kl_tuned_base = sums
    return TextDifference(
        tokens=tokens,
        base_nats=base_nats,
        tuned_nats=tuned_nats,
        kl_base_tuned=kl_base_tuned,
        kl_tuned_base=kl_tuned_base,
    )


def statistics(differences: Iterable[TextDifference]) -> dict[str, Statistics]:
    """Statistics of an example, by measure, from its sequences' differences."""
    found = list(differences)
    tokens = float(sum(one.tokens for one in found))
    base_nats, tuned_nats = sum(one.base_nats for one in found), sum(one.tuned_nats for one in found)
    return {
        "cross_entropy": (tuned_nats, tokens),
        "base_cross_entropy": (base_nats, tokens),
        "forgetting": (tuned_nats - base_nats, tokens),
        "kl_base_tuned": (sum(one.kl_base_tuned for one in found), tokens),
        "kl_tuned_base": (sum(one.kl_tuned_base for one in found), tokens),
    }
