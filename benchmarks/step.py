"""What masks cost while they are masks: a ResNet-20 at half width against the same network built narrow by hand.

Usage: `PYTHONPATH=. python benchmarks/step.py`, or `make bench`.

The dynamic network holds all channels and runs on half of those of every unit, scattered, not the first ones. The
exported one is made of it; the one built by hand has the same weights. A second copy of the latter shows the noise.
Cutting the weights costs the same for any batch, so the smaller the images and the batch, the more it weighs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import compare_times, describe_environment, time_in_turns, write_result
from examples.digits import DigitsResNet
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import to_static_
from lightning_prune.plan import KeepPlan

WIDTH = 16
AIM = 1.15


class Setting(NamedTuple):
    """The batches that a network sees."""

    name: str
    batch: int
    channels: int
    side: int
    rounds: int


SETTINGS = (
    Setting("CIFAR images, batch of 128", 128, 3, 32, 60),
    Setting("digits, batch of 128", 128, 1, 8, 200),
    Setting("digits, batch of 32, as in the demo", 32, 1, 8, 400),
)


def make_resnet(width: int, channels: int) -> nn.Module:
    """Return a ResNet-20 for images of so many channels."""
    model = DigitsResNet(width)
    model.features[0] = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
    return model


def make_networks(images: Tensor) -> dict[str, nn.Module]:
    """Return the network built narrow, twice, the dynamic one and its export, all of the same function."""
    dynamic = make_resnet(WIDTH, images.shape[1])
    mutator = ChannelMutator(example_input=images[:2])
    mutator.prepare_from_supernet(dynamic)
    halves = {u.name: torch.randperm(u.num_channels)[: u.num_channels // 2].sort().values for u in mutator.units}
    assert all(int(kept.diff().max()) > 1 for kept in halves.values()), "the kept channels are to be scattered"
    mutator.apply(KeepPlan({name: tuple(kept.tolist()) for name, kept in halves.items()}))
    exported = to_static_(copy.deepcopy(dynamic))
    by_hand = make_resnet(WIDTH // 2, images.shape[1])
    by_hand.load_state_dict(exported.state_dict())
    networks = {
        "by hand": by_hand,
        "dynamic": dynamic,
        "exported": exported,
        "by hand again": copy.deepcopy(by_hand),
    }
    expected = by_hand.eval()(images)
    assert all(torch.equal(network.eval()(images), expected) for network in networks.values()), "not one function"
    return networks


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Run forward, backward and one step of the optimizer."""
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def forward(model: nn.Module, images: Tensor, training: bool) -> None:
    """Run the forward alone: in training with its graph, else in evaluation without."""
    model.train(training)
    with torch.inference_mode(not training):
        model(images)


def measure(setting: Setting, rounds: int | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the times of one setting, relative to the network built by hand."""
    images = torch.randn(setting.batch, setting.channels, setting.side, setting.side)
    labels = torch.randint(10, (setting.batch,))
    networks = make_networks(images)
    optimizers = {name: torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for name, m in networks.items()}
    kinds: dict[str, Callable[[str], Callable[[], None]]] = {
        "training step": lambda name: partial(train_step, networks[name], optimizers[name], images, labels),
        "forward, training": lambda name: partial(forward, networks[name], images, True),
        "forward, evaluation": lambda name: partial(forward, networks[name], images, False),
    }
    count = rounds or setting.rounds
    return {
        kind: compare_times(time_in_turns({name: make(name) for name in networks}, count), "by hand")
        for kind, make in kinds.items()
    }


def main() -> None:
    """Measure every setting and write `results/step.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=None, help="rounds of each measurement; default: by setting")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    environment = describe_environment()
    results = {setting.name: measure(setting, rounds) for setting in SETTINGS}
    for name, kinds in results.items():
        for kind, rows in kinds.items():
            print(f"{name}: {kind}")
            for network, row in rows.items():
                median, low, high = row["ratio"].values()
                print(f"  {network:14}{row['median_ms']:10.2f} ms  {median:.3f} [{low:.3f}, {high:.3f}]")
    config = {
        "network": f"ResNet-20, width {WIDTH} cut to {WIDTH // 2}, scattered channels",
        "training step": "zero_grad, forward, cross-entropy, backward, SGD with momentum 0.9",
        "aim": f"dynamic training step at most {AIM} of the one built by hand",
        "settings": [setting._asdict() | {"rounds": rounds or setting.rounds} for setting in SETTINGS],
    }
    write_result("step", config, environment, results)


if __name__ == "__main__":
    main()
