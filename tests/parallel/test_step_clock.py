"""Every moment of a step belongs to one section; checked on a clock that the test sets."""

import pytest
import torch

from hft_megatron.parallel import step_clock
from hft_megatron.parallel.step_clock import ALL_GATHER_WAIT, BACKWARD, FORWARD, SECTIONS, StepClock


@pytest.fixture
def now(monkeypatch):
    """``now[0]`` is what time it is, in seconds."""
    moment = [100.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: moment[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return moment


def test_an_inner_section_pauses_the_outer_one_and_the_rest_is_other(now):
    clock = StepClock()
    clock.begin()
    now[0] += 1
    with clock.section(FORWARD):
        now[0] += 2
        with clock.section(ALL_GATHER_WAIT):
            now[0] += 4
        now[0] += 8
    now[0] += 16
    with clock.section(FORWARD):
        now[0] += 32
    times = clock.end()
    assert times.sections == dict.fromkeys(SECTIONS, 0.0) | {FORWARD: 42_000.0, ALL_GATHER_WAIT: 4_000.0}
    assert (times.total, times.other) == (63_000.0, 17_000.0)


def test_time_in_collectives_stays_with_the_pass_and_is_not_its_own_work(now):
    clock = StepClock()
    clock.begin()
    with clock.collective():
        now[0] += 1
    for name in (FORWARD, BACKWARD):
        with clock.section(name):
            now[0] += 2
            with clock.collective():
                now[0] += 4
            with clock.section(ALL_GATHER_WAIT), clock.collective():
                now[0] += 8
            now[0] += 16
    times = clock.end()
    assert (times.sections[FORWARD], times.sections[BACKWARD], times.other) == (22_000.0, 22_000.0, 1_000.0)
    assert (times.in_collectives, times.compute) == (8_000.0, 36_000.0)


def test_sections_outside_of_a_step_are_not_timed(now):
    clock = StepClock()
    with clock.section(FORWARD):
        now[0] += 1
    clock.begin()
    clock.end()
    with clock.section(FORWARD):
        now[0] += 1
    clock.begin()
    now[0] += 2
    times = clock.end()
    assert times.sections == dict.fromkeys(SECTIONS, 0.0)
    assert times.total == 2_000.0


def test_a_step_that_an_exception_cut_short_leaves_nothing_behind(now):
    clock = StepClock()
    clock.begin()
    clock.enter(FORWARD)
    now[0] += 1
    clock.begin()
    assert clock.end().sections == dict.fromkeys(SECTIONS, 0.0)


def test_of_megatron_cores_timers_those_of_micro_batches_are_sections(now):
    clock = StepClock()
    clock.begin()
    timers = clock.megatron_timers
    timers("forward-backward", log_level=1).start(barrier=True)
    for name, seconds in (
        ("forward-compute", 1),
        ("backward-compute", 2),
        ("forward-recv", 4),
        ("backward-compute", 8),
    ):
        timers(name, log_level=2).start()
        now[0] += seconds
        timers(name).stop()
    timers("forward-backward").stop()
    times = clock.end()
    assert times.sections == dict.fromkeys(SECTIONS, 0.0) | {FORWARD: 1_000.0, BACKWARD: 10_000.0}
    assert times.other == 4_000.0


def test_a_section_that_is_still_open_at_the_end_of_a_step_is_a_mistake(now):
    clock = StepClock()
    clock.begin()
    clock.enter(FORWARD)
    with pytest.raises(AssertionError, match="still open"):
        clock.end()


def test_on_cuda_sections_are_the_streams_times_and_the_device_is_waited_for_twice(now, monkeypatch):
    stream, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.moment = stream[0]

        def elapsed_time(self, later):
            assert len(waits) == 2, "events are read once the device is idle"
            return later.moment - self.moment

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(now[0]))
    clock = StepClock()
    clock.begin()
    with clock.section(FORWARD):
        stream[0] += 3.0
        with clock.section(ALL_GATHER_WAIT):
            stream[0] += 5.0
    stream[0] += 7.0
    now[0] += 1
    times = clock.end()
    assert times.sections == dict.fromkeys(SECTIONS, 0.0) | {FORWARD: 3.0, ALL_GATHER_WAIT: 5.0}
    assert (times.total, times.other) == (1_000.0, 992.0)
