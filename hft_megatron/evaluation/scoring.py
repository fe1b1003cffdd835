"""Log-probabilities of given tokens under a model, in any layout."""

from collections.abc import Sequence

import torch

from hft_megatron.data.tokenizer import Encoded
from hft_megatron.evaluation.examples import SequenceScore
from hft_megatron.evaluation.forward import ModelInPlace


def score(model: ModelInPlace, batch: Sequence[Encoded]) -> list[SequenceScore] | None:
    """The scores of sequences, in their order; None off the last pipeline stage. Collective over a replica's ranks.

    A token's log-probability is conditional on all tokens before it in its sequence. Sums are in fp64, so that they
    don't depend on how many other tokens there are.
    """
    assert not any(scored[0] for _, scored in batch), "nothing predicts a first token"
    device = model.placement.device
    with torch.inference_mode():
        # The last token of a sequence predicts nothing that is wanted.
        hidden = model.read([torch.from_numpy(ids[:-1]).long() for ids, _ in batch])
        if hidden is None:
            return None
        masks = [torch.from_numpy(scored[1:]) for _, scored in batch]
        predicts = torch.cat(masks).to(device)
        targets = torch.cat([torch.from_numpy(ids[1:]).long() for ids, _ in batch]).to(device)
        log_probs, greedy = model.readout.token_scores(hidden[predicts], targets[predicts])
    counts = [int(mask.sum()) for mask in masks]
    return [
        SequenceScore(log_prob=float(some.double().sum()), tokens=len(some), is_greedy=bool(are_greedy.all()))
        for some, are_greedy in zip(log_probs.cpu().split(counts), greedy.cpu().split(counts), strict=True)
    ]
