from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import auto_cli
from omegaconf import OmegaConf

from lightning_prune.errors import ConfigError
from lightning_prune.schedule import CURVES, Schedule, cubic, exponential, linear, one_shot, resolve_schedule


def square(progress: float) -> float:
    return progress**2


def kept(schedule: Schedule) -> Schedule:
    """Hand a parsed schedule through, for jsonargparse, which reads the types of a function's arguments."""
    return schedule


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        pytest.param(one_shot, [1.0, 1.0, 1.0, 1.0], id="one_shot"),
        pytest.param(linear, [0.25, 0.5, 0.75, 1.0], id="linear"),
        pytest.param(cubic, [0.578125, 0.875, 0.984375, 1.0], id="cubic"),
        pytest.param(
            exponential, [(1 - math.exp(-3 * i / 4)) / (1 - math.exp(-3)) for i in (1, 2, 3, 4)], id="exponential"
        ),
    ],
)
def test_curve_values(curve: Callable[[float], float], expected: list[float]) -> None:
    assert [curve(i / 4) for i in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-15)


@given(
    kind=st.sampled_from(sorted(CURVES)),
    begin_and_length=st.one_of(
        st.tuples(st.integers(0, 12), st.integers(0, 12)), st.tuples(st.floats(0, 1), st.floats(0, 1))
    ),
    every=st.integers(1, 5),
    max_epochs=st.integers(1, 15),
)
def test_progress_rises_to_exactly_one_and_fractions_inside_the_run(
    kind: str, begin_and_length: tuple[int | float, int | float], every: int, max_epochs: int
) -> None:
    begin, length = begin_and_length
    end = begin + length if isinstance(begin, int) else min(1.0, begin + length * (1 - begin))
    plan = Schedule(kind, begin, end, every).resolve(max_epochs)
    length = max_epochs if isinstance(begin, float) else plan.end
    path = [plan.progress(t) for t in range(length)]
    firings = [t for t in range(length) if plan.fires_at(t)]
    assert path == sorted(path)
    assert all(0.0 <= p <= 1.0 for p in path)
    assert len(firings) == plan.num_firings >= 1
    assert firings[-1] == plan.last <= length - 1
    assert path[plan.last] == path[-1] == 1.0
    assert all(p == 0.0 for p in path[: firings[0]])


def test_linear_is_mmrazor_iterative_pruning() -> None:
    """MMRazor with step_freq=3, prune_times=4 prunes at 0, 3, 6, 9 to 1/4, 2/4, 3/4, 4/4 of the way."""
    plan = Schedule("linear", begin=0, end=12, every=3).resolve(max_epochs=30)
    fired = {t: plan.progress(t) for t in range(30) if plan.fires_at(t)}
    assert fired == {0: 0.25, 3: 0.5, 6: 0.75, 9: 1.0}
    assert plan.progress(5) == 0.5


@pytest.mark.parametrize("kind", sorted(CURVES))
def test_one_epoch_meets_the_target(kind: str) -> None:
    plan = Schedule(kind).resolve(max_epochs=1)
    assert plan.fires_at(0)
    assert plan.progress(0) == 1.0


def test_one_shot_fires_once_at_begin() -> None:
    plan = Schedule("one_shot", begin=3, end=9).resolve(max_epochs=20)
    assert [t for t in range(20) if plan.fires_at(t)] == [3]
    assert (plan.progress(2), plan.progress(3)) == (0.0, 1.0)


@pytest.mark.parametrize("given", [{}, {"end": 1}, {"end": 0.5}], ids=str)
def test_one_shot_does_not_look_at_its_end(given: dict[str, Any]) -> None:
    plan = resolve_schedule({"kind": "one_shot", "begin": 2, **given}).resolve(max_epochs=3)
    assert (plan.begin, plan.num_firings) == (2, 1)
    assert Schedule("one_shot", begin=2, **given).resolve().begin == 2  # in a run without an end


@pytest.mark.parametrize(
    ("schedule", "max_epochs", "expected"),
    [
        pytest.param(Schedule(begin=0.1, end=0.5), 20, ("epoch", 2, 10), id="fractions"),
        pytest.param(Schedule(begin=2, end=7), 20, ("epoch", 2, 7), id="epochs"),
        pytest.param(Schedule(begin=2, end=0.5), 20, ("epoch", 2, 10), id="mixed"),
        pytest.param(Schedule(begin=0.29, end=1.0), 100, ("epoch", 29, 100), id="float rounding"),
        pytest.param(Schedule(begin=0.5, end=0.5), 10, ("epoch", 5, 6), id="empty range fires once"),
        pytest.param(Schedule(begin=5, end=10), 3, ("epoch", 5, 10), id="epochs, in a shorter run"),
        pytest.param(Schedule(begin=1.0, end=1.0), 4, ("epoch", 3, 4), id="end of the run"),
        pytest.param(Schedule(begin=2.0, end=8.0, every=2.0), 9, ("epoch", 2, 8), id="whole floats are epochs"),
    ],
)
def test_resolve_in_epochs(schedule: Schedule, max_epochs: int, expected: tuple[str, int, int]) -> None:
    plan = schedule.resolve(max_epochs, max_steps=1000)
    assert (plan.unit, plan.begin, plan.end) == expected


@pytest.mark.parametrize("max_epochs", [None, -1])
def test_without_epochs_fractions_are_of_steps(max_epochs: int | None) -> None:
    plan = Schedule("linear", begin=0.0, end=0.5, every=25).resolve(max_epochs, max_steps=200)
    assert (plan.unit, [t for t in range(200) if plan.fires_at(t)]) == ("step", [0, 25, 50, 75])


def test_epochs_need_no_limit() -> None:
    plan = Schedule(begin=0.0, end=6).resolve(max_epochs=-1, max_steps=-1)
    assert (plan.unit, plan.begin, plan.last) == ("epoch", 0, 5)


def test_a_function_is_a_curve() -> None:
    plan = Schedule(square, end=4).resolve()
    assert [plan.progress(t) for t in range(4)] == [1 / 16, 4 / 16, 9 / 16, 1.0]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_copies_are_equal(copier: Callable[[Schedule], Schedule]) -> None:
    schedule = Schedule("cubic", end=4)
    assert copier(schedule) == schedule
    assert copier(schedule).resolve(8) == schedule.resolve(8)


def test_jsonargparse_keeps_epochs_and_fractions_apart() -> None:
    schedule = auto_cli(kept, args=["--schedule.kind=linear", "--schedule.end=8", "--schedule.begin=0.25"])
    assert schedule == Schedule("linear", 0.25, 8)
    assert isinstance(schedule.end, int)


def test_jsonargparse_imports_a_function() -> None:
    assert auto_cli(kept, args=["--schedule.kind=math.sqrt"]).curve is math.sqrt


@pytest.mark.parametrize(
    "given",
    [
        pytest.param("linear", id="name"),
        pytest.param({"kind": "linear"}, id="mapping"),
        pytest.param(OmegaConf.create({"kind": "linear"}), id="DictConfig"),
        pytest.param(Schedule("linear"), id="schedule"),
    ],
)
def test_resolve_schedule(given: object) -> None:
    assert resolve_schedule(given) == Schedule("linear")  # type: ignore[arg-type]


def test_resolve_schedule_takes_a_function() -> None:
    assert resolve_schedule(square).curve is square


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"kind": "cubik"}, "kind='cubik'.*Did you mean 'cubic'", id="unknown kind"),
        pytest.param({"begin": -1}, "begin=-1 .*epoch", id="negative epoch"),
        pytest.param({"end": 1.5}, "end=1.5 .*fraction", id="fractional epoch"),
        pytest.param({"end": math.nan}, "end=nan", id="nan"),
        pytest.param({"end": math.inf}, "end=inf", id="inf"),
        pytest.param({"end": True}, "end=True", id="bool"),
        pytest.param({"begin": "0"}, "begin='0'", id="text"),
        pytest.param({"every": 0}, "every=0 .*at least 1", id="every 0"),
        pytest.param({"every": 1.5}, "every=1.5", id="every fraction"),
        pytest.param({"every": True}, "every=True", id="every bool"),
        pytest.param({"begin": 5, "end": 3}, "begin=5 after end=3", id="epochs swapped"),
        pytest.param({"begin": 0.5, "end": 0.3}, "begin=0.5 after end=0.3", id="fractions swapped"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**arguments)  # type: ignore[arg-type]


def test_begin_after_end_once_both_are_epochs() -> None:
    with pytest.raises(ConfigError, match="8 after 5 with max_epochs=10"):
        Schedule(begin=8, end=0.5).resolve(max_epochs=10)


def test_fraction_of_an_endless_run() -> None:
    with pytest.raises(ConfigError, match="without a finite max_epochs or max_steps"):
        Schedule(end=0.5).resolve(max_epochs=-1, max_steps=-1)


def test_epochs_and_fractions_of_steps_do_not_mix() -> None:
    with pytest.raises(ConfigError, match=r"begin=2, end=0\.5.*max_steps=100"):
        Schedule(begin=2, end=0.5).resolve(max_steps=100)


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        pytest.param(lambda p: p / 2, "Got 0.5 .*1.0 at the last firing", id="short of the target"),
        pytest.param(lambda p: 3 * p, "Got 1.5 .*in \\[0, 1\\]", id="beyond the target"),
        pytest.param(lambda p: math.nan, "Got nan", id="nan"),
    ],
)
def test_bad_curve(curve: Callable[[float], float], message: str) -> None:
    plan = Schedule(curve, end=2).resolve()
    with pytest.raises(ConfigError, match=message):
        [plan.progress(t) for t in range(2)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"knd": "linear"}, "key 'knd'.*Did you mean 'kind'", id="unknown key"),
        pytest.param(3, "schedule=3; expected", id="a number"),
    ],
)
def test_resolve_schedule_rejects(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_schedule(given)  # type: ignore[arg-type]
