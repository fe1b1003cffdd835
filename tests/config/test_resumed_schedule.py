"""Which schedule a resumed run follows. Run: pytest tests/config/test_resumed_schedule.py"""

from dataclasses import asdict, fields, replace

import pytest

from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.errors import UserError
from hft_megatron.trainer.resume import resumed_schedule, schedule_to_note

RUN = RunConfig(
    training=TrainingConfig(train_iters=8), optimizer=OptimizerConfig(lr=1e-3, lr_warmup_fraction=0.25, min_lr=1e-5)
)
NOTED = schedule_to_note(RUN, 8)
KEEPS = CheckpointConfig(load="run", use_checkpoint_opt_param_scheduler=True)


def test_the_same_command_has_nothing_to_say() -> None:
    assert resumed_schedule(RUN, NOTED, 8, iteration=4) == (RUN, [])


@pytest.mark.parametrize("name", [field.name for field in fields(OptimizerConfig)])
def test_every_option_of_the_optimizer_that_differs_is_said_with_both_values(name: str) -> None:
    value = {"lr_decay_style": "linear"}.get(name, 7)
    other = replace(RUN, optimizer=replace(RUN.optimizer, **{name: value}))
    config, [line] = resumed_schedule(other, NOTED, 8, iteration=4)
    assert config == other
    assert f" {NOTED[name]} -> {value};" in line
    kept, [line] = resumed_schedule(replace(other, checkpoint=KEEPS), NOTED, 8, iteration=4)
    assert asdict(kept.optimizer) == asdict(RUN.optimizer) | {"lr_decay_iters": 8}
    assert line.endswith(f" {NOTED[name]} -> {value}")


def test_behind_the_last_iteration_an_option_that_differs_changes_nothing_any_more() -> None:
    other = replace(RUN, optimizer=replace(RUN.optimizer, lr=7.0))
    _, [line] = resumed_schedule(other, NOTED, 8, iteration=8)
    assert line == (
        "warning: iteration 8 is the last, so these options have no effect (checkpoint -> this command): "
        "--lr 0.001 -> 7.0"
    )


def test_a_schedule_in_every_round_is_another_schedule_and_is_kept_with_its_length() -> None:
    of_rounds = replace(RUN, hft=HFTConfig(hft_lr_schedule="round"))
    noted = schedule_to_note(of_rounds, 2)
    kept, [line] = resumed_schedule(replace(RUN, checkpoint=KEEPS), noted, 8, iteration=4)
    assert kept.hft.hft_lr_schedule == "round"
    assert kept.optimizer.lr_decay_iters == 2
    assert "length of the decay in iterations 2 -> 8, --hft-lr-schedule round -> run" in line


@pytest.mark.parametrize("iterations", [6, 12])
def test_a_given_length_of_the_decay_leaves_only_another_length_of_the_run_to_say(iterations: int) -> None:
    noted = schedule_to_note(replace(RUN, optimizer=replace(RUN.optimizer, lr_decay_iters=20)), 8)
    longer = replace(
        RUN, training=TrainingConfig(train_iters=iterations), optimizer=replace(RUN.optimizer, lr_decay_iters=20)
    )
    expected = f"the run now has {iterations} iterations; it had 8 when iteration 4 was saved"
    assert resumed_schedule(longer, noted, iterations, iteration=4) == (longer, [expected])


def test_a_weight_decay_that_rises_over_another_length_is_said_and_cannot_be_kept() -> None:
    rising = OptimizerConfig(start_weight_decay=0.0, end_weight_decay=0.1, weight_decay_incr_style="linear")
    noted = schedule_to_note(replace(RUN, optimizer=replace(rising, lr_decay_iters=20)), 8)
    longer = RunConfig(training=TrainingConfig(train_iters=12), optimizer=replace(rising, lr_decay_iters=20))
    _, [line] = resumed_schedule(longer, noted, 12, iteration=4)
    assert line.endswith("; warning: the weight decay reaches --end-weight-decay after 12 iterations instead")
    with pytest.raises(UserError, match="after 8 iterations, but this run has 12; give --train-iters 8, or leave"):
        resumed_schedule(replace(longer, checkpoint=KEEPS), noted, 12, iteration=4)


def test_a_part_of_a_longer_schedule_that_gets_another_length_ends_where_all_of_it_does() -> None:
    rising = OptimizerConfig(start_weight_decay=0.0, end_weight_decay=0.1, weight_decay_incr_style="linear")
    part = replace(RUN, optimizer=replace(rising, lr_schedule_iters=20, lr_schedule_start=10))
    noted = schedule_to_note(part, 20)
    assert noted["lr_decay_iters"] == 20
    longer = replace(part, training=TrainingConfig(train_iters=10))
    expected = "the run now has 10 iterations; it had 8 when iteration 4 was saved"
    assert resumed_schedule(longer, noted, 20, iteration=4) == (longer, [expected])
    of_a_longer_one = replace(part, optimizer=replace(part.optimizer, lr_schedule_iters=30))
    _, [line] = resumed_schedule(of_a_longer_one, noted, 30, iteration=4)
    assert "--lr-schedule-iters 20 -> 30" in line


def test_a_schedule_in_samples_is_another_one_than_in_iterations() -> None:
    training = TrainingConfig(train_samples=70, global_batch_size=8)
    in_samples = replace(RUN, training=training)
    noted = schedule_to_note(in_samples, 70)
    assert resumed_schedule(in_samples, noted, 70, iteration=4) == (in_samples, [])
    longer = replace(in_samples, training=replace(training, train_samples=71))
    config, lines = resumed_schedule(replace(longer, checkpoint=KEEPS), noted, 71, iteration=4)
    assert config.optimizer.lr_decay_samples == 70
    assert "length of the decay in samples 70 -> 71" in lines[0]
    assert lines[1].startswith("the run now has 71 samples; it had 70 when iteration 4 was saved; warning: from sample")
    _, lines = resumed_schedule(RUN, noted, 8, iteration=4)
    assert "length of the decay in iterations None -> 8, length of the decay in samples 70 -> None" in lines[0]
    assert lines[1] == "the run now has 8 iterations; it had 70 samples when iteration 4 was saved"
    with pytest.raises(UserError, match=r"in samples, but this command's is in iterations; give .* --train-samples"):
        resumed_schedule(replace(RUN, checkpoint=KEEPS), noted, 8, iteration=4)


def test_an_option_that_came_after_a_checkpoint_had_its_default() -> None:
    new = ("decoupled_lr", "end_weight_decay", "train_samples")
    earlier = {name: value for name, value in NOTED.items() if name not in new}
    assert resumed_schedule(RUN, earlier, 8, iteration=4) == (RUN, [])
    other = replace(RUN, optimizer=replace(RUN.optimizer, decoupled_lr=0.5))
    _, [line] = resumed_schedule(other, earlier, 8, iteration=4)
    assert "--decoupled-lr None -> 0.5" in line
    kept, _ = resumed_schedule(replace(other, checkpoint=KEEPS), earlier, 8, iteration=4)
    assert kept.optimizer.decoupled_lr is None


def test_the_schedule_of_a_checkpoint_that_notes_none_cannot_be_kept() -> None:
    _, [line] = resumed_schedule(RUN, {}, 8, iteration=4)
    assert "iteration 4 was saved by an earlier version, which recorded no schedule" in line
    with pytest.raises(
        UserError, match="--load run was saved by an earlier version, which recorded no schedule; leave it"
    ):
        resumed_schedule(replace(RUN, checkpoint=KEEPS), {}, 8, iteration=4)
