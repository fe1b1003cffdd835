"""What a declaration of an option says. Run: pytest tests/config/test_declared.py"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt

from hft_megatron.config.declared import SAME_RUN, check_bounds, declared
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: Annotated[int, Ge(1), SAME_RUN] | None = None
    share: Annotated[float, Ge(0), Le(1)] = 0.5
    beta: Annotated[float, Ge(0), Lt(1)] = 0.9
    rate: Annotated[float, Gt(0)] = 1.0
    part: Annotated[float, Gt(0), Le(1)] | None = None
    kind: Literal["a", "b"] = "a"
    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("name", "expected", "allowed", "refused"),
    [
        ("count", "a whole number of at least 1", [1, 7], [0, -1, 1.0, True, "1", None]),
        ("share", "a number between 0 and 1", [0, 1, 0.25], [-0.1, 1.1, float("nan"), float("inf"), True]),
        ("beta", "a number from 0 to below 1", [0, 0.999], [1, 1.0, -1]),
        ("rate", "a number above 0", [1e-9, 5], [0, -1.0, float("inf")]),
        ("part", "a number above 0 and at most 1", [0.01, 1], [0, 1.1, -1]),
        ("kind", "one of a, b", ["a"], ["c", None]),
        ("on", "true or false", [True, False], [0, "true"]),
    ],
)
def test_a_declaration_says_what_its_value_must_be(
    name: str, expected: str, allowed: list[Any], refused: list[Any]
) -> None:
    option = declared(Inner)[name]
    assert option.expected == expected
    assert [value for value in allowed if not option.allows(value)] == []
    assert [value for value in refused if option.allows(value)] == []


def test_numbers_out_of_bounds_are_named_in_groups_within_groups() -> None:
    check_bounds(Outer())
    check_bounds(Outer(inner=Inner(count=3, beta=0.0)))
    for inner, sentence in (
        (Inner(count=0), "--count 0: must be a whole number of at least 1."),
        (Inner(beta=1.0), "--beta 1.0: must be a number from 0 to below 1."),
    ):
        with pytest.raises(UserError) as error:
            check_bounds(Outer(inner=inner))
        assert str(error.value) == sentence


def test_marks_are_found_on_either_side_of_none() -> None:
    assert SAME_RUN in declared(Inner)["count"].marks
    assert SAME_RUN not in declared(Inner)["share"].marks


BOUNDS = {
    "at least 1": """
        check_replicas_interval ddp_bucket_size decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers eval_interval eval_iters eval_tasks_batch_size eval_tasks_interval ewc_batches
        exit_interval ffn_hidden_size global_batch_size hft_audit_interval hidden_size keep_last kv_channels
        log_interval lora_rank lr_decay_iters lr_decay_samples lr_schedule_iters lr_wsd_decay_iters
        lr_wsd_decay_samples make_vocab_size_divisible_by max_position_embeddings micro_batch_size
        num_attention_heads num_layers
        num_layers_per_virtual_pipeline_stage num_query_groups packing_window pipeline_model_parallel_size
        profile_step_end recompute_num_layers save_hf_interval save_hf_keep save_interval save_retain_interval
        seq_length tensor_model_parallel_size tensorboard_log_interval train_epochs train_samples vocab_size
    """,
    "at least 0": """
        clip_grad decoupled_lr decoupled_min_lr dpo_sft_weight end_weight_decay ewc_lambda hft_first_round hft_seed
        kl_to_base lr lr_schedule_start lr_warmup_init lr_warmup_iters lr_warmup_samples manual_gc_interval min_lr
        profile_step_start seed skip_nonfinite_steps start_weight_decay train_iters weight_decay
    """,
    "above 0": """
        adam_eps distributed_timeout_minutes dpo_beta exit_duration_in_mins init_method_std lora_alpha
        loss_spike_threshold norm_epsilon rotary_base
    """,
    "above 0 and at most 1": "mofo_fraction",
    "from 0 to below 1": "adam_beta1 adam_beta2 lora_dropout lr_warmup_fraction",
    "from 0 to below 0.5": "dpo_label_smoothing",
    "between 0 and 1": "hft_ratio ift_gamma ift_lambda",
}


def test_the_numbers_of_a_run_have_bounds() -> None:
    found: dict[str, list[str]] = {}
    for group in get_type_hints(RunConfig).values():
        for name, option in declared(group).items():
            if option.type in (int, float):
                found.setdefault(option.bounds.removeprefix("of "), []).append(name)
    assert {bounds: sorted(names) for bounds, names in found.items()} == {
        bounds: names.split() for bounds, names in BOUNDS.items()
    }
