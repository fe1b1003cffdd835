"""Log-probabilities of given tokens under a model, in any layout."""

from collections.abc import Sequence

import torch

from hft_megatron.data.tokenizer import Encoded
from hft_megatron.evaluation.examples import SequenceScore
from hft_megatron.evaluation.forward import ModelInPlace


def score(model: ModelInPlace, batch: Sequence[Encoded]) -> list[SequenceScore] | None:
    """The scores of sequences, in their order; None off the last pipeline stage. Collective over a replica's ranks.

    A token's log-probability is that of the token behind all tokens before it in its sequence. Sums are in fp64, so
    that they don't depend on how many other tokens there are.
    """
    device = model.placement.device
    with torch.inference_mode():
        sequences = [torch.from_numpy(ids).long() for ids, _ in batch]
        hidden = model.read(sequences)
        if hidden is None:
            return None
        # What stands before a scored token predicts it.
        masks = [torch.from_numpy(scored).roll(-1) for _, scored in batch]
        assert not any(bool(mask[-1]) for mask in masks), "nothing predicts a first token"
        predicts = torch.cat(masks).to(device)
        targets = torch.cat([ids.roll(-1) for ids in sequences]).to(device)
        log_probs, greedy = model.readout.token_scores(hidden[predicts], targets[predicts])
    counts = [int(mask.sum()) for mask in masks]
    return [
        SequenceScore(log_prob=float(some.double().sum()), tokens=len(some), is_greedy=bool(are_greedy.all()))
        for some, are_greedy in zip(log_probs.cpu().split(counts), greedy.cpu().split(counts), strict=True)
    ]
