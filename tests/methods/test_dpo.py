"""The losses of preference pairs are those of the papers and of TRL. Run: pytest tests/methods/test_dpo.py"""

import math
from collections import defaultdict
from itertools import accumulate
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from hft_megatron.methods.dpo.objective import (
    PreferenceRule,
    answer_log_probs,
    pair_loss,
    preference_losses,
    preference_objective,
)

PAIRS, LONGEST = 6, 9


def made_up(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token log-probabilities of policy and reference (answers, s), and the mask: TRL's order, all chosen first."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (-4 * torch.rand(2 * PAIRS, LONGEST, generator=generator) for _ in range(2))
    lengths = torch.randint(1, LONGEST + 1, (2 * PAIRS, 1), generator=generator)
    return policy, reference, (torch.arange(LONGEST) < lengths).float()


def ours(rule: PreferenceRule, *, packed: bool) -> float:
    """The mean loss of the made-up pairs, as rows or as the segments of one sequence."""
    policy, reference, mask = made_up()
    order = torch.arange(2 * PAIRS).view(2, PAIRS).T.flatten()  # pair by pair
    policy, mask = policy[order], mask[order]
    expected = (reference[order] * mask).double().sum(1).view(PAIRS, 2)
    batch = {"loss_mask": mask, "answers": torch.arange(2 * PAIRS).view(PAIRS, 2), "reference": expected}
    losses = -policy
    if packed:
        # Segments of other lengths: each answer without its padding, and padding at the end.
        lengths = mask.sum(1).int().tolist()
        losses = torch.cat([row[:n] for row, n in zip(losses, lengths, strict=True)] + [torch.ones(5)])[None]
        batch["loss_mask"] = torch.cat([torch.ones(sum(lengths)), torch.zeros(5)])[None]
        batch["cu_seqlens"] = torch.tensor([0, *accumulate([*lengths, 5])], dtype=torch.int32)
    loss, pairs, _ = pair_loss(losses, micro_batch=batch, rule=rule)
    assert int(pairs) == PAIRS
    return float(loss) / PAIRS


def trls(loss_type: str, beta: float) -> float:
    """TRL's loss of the same log-probabilities: its trainer's own function, with a model that returns them."""
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, reference, mask = made_up()

    def model(log_probs: torch.Tensor) -> MagicMock:
        zero = torch.zeros(2 * PAIRS, LONGEST)
        # For its metrics TRL reads other things than the log-probabilities: of those any value does.
        output = SimpleNamespace(log_probs=log_probs * mask, entropy=zero, mean_logits=zero, is_top1=zero.bool())
        return MagicMock(return_value=output, is_gradient_checkpointing=False, training=True)

    trainer = SimpleNamespace(
        model=model(policy),
        ref_model=model(reference),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda values: values,
            gather_for_metrics=lambda values: values,
            unwrap_model=lambda one: one,
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    whole = torch.cat([torch.zeros(2 * PAIRS, 1), mask], dim=1)  # the first position is predicted by nothing
    inputs = {
        "input_ids": torch.ones(2 * PAIRS, LONGEST + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, LONGEST + 1, dtype=torch.long),
        "completion_mask": whole.long(),
    }
    return float(DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("loss_type", "rule"),
    [
        ("sigmoid", PreferenceRule(beta=0.3)),
        ("hinge", PreferenceRule(beta=0.3, loss="hinge")),
        ("ipo", PreferenceRule(beta=0.3, loss="ipo", average_log_probs=True)),
        ("sigmoid_norm", PreferenceRule(beta=0.3, average_log_probs=True)),
    ],
)
def test_losses_are_trls_for_the_same_log_probabilities(loss_type: str, rule: PreferenceRule, packed: bool) -> None:
    assert ours(rule, packed=packed) == pytest.approx(trls(loss_type, rule.beta), rel=1e-6)


def test_losses_follow_their_formulas() -> None:
    ratios = torch.tensor([[1.5, 0.5], [-2.0, 1.0]], dtype=torch.float64)
    margins = (1.0, -3.0)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = {
        PreferenceRule(beta=0.2): [-math.log(sigmoid(0.2 * h)) for h in margins],
        PreferenceRule(beta=0.2, label_smoothing=0.1): [
            -0.9 * math.log(sigmoid(0.2 * h)) - 0.1 * math.log(sigmoid(-0.2 * h)) for h in margins
        ],
        PreferenceRule(beta=0.2, loss="hinge"): [max(0.0, 1 - 0.2 * h) for h in margins],
        PreferenceRule(beta=0.2, loss="ipo"): [(h - 2.5) ** 2 for h in margins],
    }
    for rule, losses in expected.items():
        assert preference_losses(ratios, rule).tolist() == pytest.approx(losses, rel=1e-12)


def test_ipo_averages_over_tokens_unless_told_otherwise() -> None:
    from hft_megatron.config.dpo import DpoConfig

    def averages(**options: Any) -> bool:
        step: Any = preference_objective(DpoConfig(**options)).forward_step
        return bool(step.keywords["rule"].average_log_probs)

    assert averages(dpo_loss="ipo")
    assert not averages(dpo_loss="ipo", dpo_average_log_probs=False)
    assert not averages()
    assert averages(dpo_average_log_probs=True)


def test_a_packed_answer_has_the_log_probability_of_its_own_row_to_the_last_bit_but_a_few() -> None:
    policy, _, mask = made_up(1)
    rows = {"loss_mask": mask, "answers": torch.arange(2 * PAIRS).view(PAIRS, 2)}
    alone, tokens = answer_log_probs(-policy, rows)
    packed = rows | {
        "loss_mask": mask.view(1, -1),
        "cu_seqlens": torch.arange(0, 2 * PAIRS * LONGEST + 1, LONGEST, dtype=torch.int32),
    }
    together, tokens_together = answer_log_probs(-policy.view(1, -1), packed)
    assert torch.equal(alone, together)
    assert torch.equal(tokens, tokens_together)
    assert alone.dtype == torch.float64
