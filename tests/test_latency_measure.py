"""What a time is: models in turns, medians and spread, on every backend; and what is refused before it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError
from lightning_prune.latency import Measurement, backends, compare, measure


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_every_backend_gives_a_time_for_each_round(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2))
    model[1].eval()
    x = torch.randn(2, 3, 4, 4)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = measure(model, x, backend, rounds=4, warm_up=1, batch_size=3, threads=1)
    assert (found.rounds, found.backend, found.device, found.threads, found.batch_size) == (4, backend, "cpu", 1, 3)
    assert min(found.times_ms) > 0
    assert found.ms.low <= found.ms.median <= found.ms.high
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


class Ticking(nn.Module):
    """Lets a clock run for as long as it is said to take; notes the order of calls."""

    def __init__(self, name: str, seconds: float, clock: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.name, self.seconds, self.clock = name, seconds, clock

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        self.clock["now"] += self.seconds
        self.clock["order"] += self.name
        self.clock["input"] = (x.dtype, x.shape, scale.shape, self.training, torch.is_grad_enabled())
        torch.rand(1)
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    made: dict[str, Any] = {"now": 0.0, "order": "", "input": ()}
    monkeypatch.setattr("time.perf_counter", lambda: made["now"])
    return made


def test_models_take_turns_and_another_one_begins_each_round(clock: dict[str, Any]) -> None:
    models = {name: Ticking(name, seconds, clock).double() for name, seconds in zip("abc", (1, 2, 4), strict=True)}
    state = torch.get_rng_state()
    example = {"x": torch.ones(2, 3), "scale": torch.ones(1)}
    found = compare(models, example, rounds=4, warm_up=2, batch_size=5)
    assert clock["order"] == "abcbcacababcbcacab"
    assert {name: one.times_ms for name, one in found.items()} == {
        "a": (1000.0,) * 4,
        "b": (2000.0,) * 4,
        "c": (4000.0,) * 4,
    }
    assert clock["input"] == (torch.float64, (5, 3), (1,), False, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_spread_is_the_interquartile_range_and_ratios_are_taken_round_by_round() -> None:
    one, other = Measurement((1.0, 2.0, 3.0, 4.0, 50.0)), Measurement((2.0, 4.0, 6.0, 8.0, 100.0))
    assert one.ms == (3.0, 2.0, 4.0)
    assert one.relative_to(other) == (0.5, 0.5, 0.5)
    assert str(one) == "3 [2, 4] ms (median and quartiles of 5 rounds; eager on cpu, 1 thread, batch of 1)"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"backend": "onnx"}, "backend='onnx'.*Did you mean 'onnxruntime'", id="backend"),
        pytest.param({"rounds": 0}, "rounds=0", id="rounds"),
        pytest.param({"warm_up": True}, "warm_up=True", id="warm_up"),
        pytest.param({"threads": 1.5}, r"threads=1\.5", id="threads"),
        pytest.param({"batch_size": -1}, "batch_size=-1", id="batch_size"),
        pytest.param({"device": "meta", "backend": "onnxruntime"}, "device='meta' for backend", id="device"),
        pytest.param({"device": "cuda:9"}, "device='cuda:9' to measure on; torch sees no", id="no such device"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=match):
        measure(nn.Linear(2, 2), torch.ones(1, 2), **options)


def test_what_is_no_model_or_is_on_two_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Got \{\} to measure"):
        compare({}, torch.ones(1))
    torn = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match=r"Got a model on \['cpu', 'meta'\]; expected one device"):
        measure(torn, torch.ones(1, 2))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_prune.export.onnx.find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"without onnxscript; expected the extra 'onnx': pip install"):
        measure(nn.Linear(2, 2), torch.ones(1, 2), "onnxruntime")
