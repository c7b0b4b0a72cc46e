from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lightning_prune.errors import ConfigError
from lightning_prune.mutables import MutableChannel, MutableChannelContainer


def mask(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.bool)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.int().tolist()


def test_a_new_channel_keeps_all():
    channel = MutableChannel(3, name="conv")
    assert bits(channel.current_mask) == [1, 1, 1]
    assert channel.activated_channels == 3
    assert channel.version == 0


def test_a_choice_is_copied_and_counted_only_when_it_changes_something():
    channel = MutableChannel(3)
    choice = mask(1, 0, 1)
    channel.current_choice = choice
    choice.fill_(True)
    assert bits(channel.current_choice) == [1, 0, 1]
    assert channel.activated_channels == 2
    assert channel.version == 1
    channel.current_choice = mask(1, 0, 1)
    assert channel.version == 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        pytest.param(mask(0, 0, 0), "without a kept channel", id="nothing kept"),
        pytest.param(mask(1, 0), r"\[2\].*expected a bool tensor \[3\]", id="wrong length"),
        pytest.param(torch.ones(3), "torch.float32", id="not bool"),
        pytest.param([True, False, True], r"\[True, False, True\]", id="not a tensor"),
    ],
)
def test_a_bad_mask_is_refused_and_changes_nothing(choice, message):
    channel = MutableChannel(3, name="conv")
    with pytest.raises(ConfigError, match=message):
        channel.current_choice = choice
    assert channel.activated_channels == 3
    assert channel.version == 0


@pytest.mark.parametrize("num_channels", [0, -1, 2.0, True, "8"])
@pytest.mark.parametrize("cls", [MutableChannel, MutableChannelContainer])
def test_a_bad_length_is_refused(cls, num_channels):
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        cls(num_channels)


def test_positions_that_nothing_covers_are_kept():
    channel, axis = MutableChannel(2), MutableChannelContainer(5)
    axis.register_mutable(channel, 1, 3)
    channel.current_choice = mask(0, 1)
    assert bits(axis.current_mask) == [1, 0, 1, 1, 1]


def test_a_frozen_axis_is_a_container_without_mutables():
    axis = MutableChannelContainer(4)
    assert axis.kept("cpu") is None
    assert not axis.is_cut
    assert axis.activated_channels == 4


def test_the_same_mutable_can_tile_two_spans():
    channel, axis = MutableChannel(2), MutableChannelContainer(4)
    axis.register_mutable(channel, 0, 2)
    axis.register_mutable(channel, 2, 4)
    channel.current_choice = mask(1, 0)
    assert axis.kept("cpu").tolist() == [0, 2]


def test_an_index_maps_positions_to_channels():
    channel, axis = MutableChannel(2), MutableChannelContainer(6)
    axis.register_mutable(channel, 0, 6, index=torch.tensor([0, 0, 0, 1, 1, 1]))
    channel.current_choice = mask(0, 1)
    assert axis.kept("cpu").tolist() == [3, 4, 5]


def test_two_mutables_on_one_span_make_a_product():
    heads, head_dim, axis = MutableChannel(3), MutableChannel(2), MutableChannelContainer(6)
    axis.register_mutable(heads, 0, 6, index=torch.arange(6) // 2)
    axis.register_mutable(head_dim, 0, 6, index=torch.arange(6) % 2)
    heads.current_choice = mask(1, 0, 1)
    head_dim.current_choice = mask(0, 1)
    assert axis.kept("cpu").tolist() == [1, 5]
    assert axis.activated_channels == 2


@pytest.mark.parametrize(
    ("start", "end"),
    [pytest.param(0, 2, id="encloses"), pytest.param(2, 5, id="tail"), pytest.param(2, 3, id="inside")],
)
def test_a_partial_overlap_is_refused(start, end):
    axis = MutableChannelContainer(6, name="in")
    axis.register_mutable(MutableChannel(3, name="first"), 1, 4)
    with pytest.raises(ConfigError, match=r"overlaps \[1, 4\) of 'first' in part"):
        axis.register_mutable(MutableChannel(end - start), start, end)
    assert len(axis.spans) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param((0, 7), "end <= 6", id="beyond the axis"),
        pytest.param((-1, 2), "0 <= start", id="negative"),
        pytest.param((3, 3), "start < end", id="empty"),
        pytest.param((0, 4), "as many positions as channels", id="length without index"),
        pytest.param((0, 4, torch.tensor([0, 1, 2, 3])), r"in \[0, 3\].*\[0, 3\)", id="index out of range"),
        pytest.param((0, 4, torch.tensor([0, 1, 2])), r"int64 tensor \[4\]", id="index too short"),
        pytest.param((0, 4, torch.zeros(4)), "float32", id="index not int64"),
    ],
)
def test_a_span_that_does_not_fit_is_refused(args, message):
    with pytest.raises(ConfigError, match=message):
        MutableChannelContainer(6).register_mutable(MutableChannel(3), *args)


def test_kept_indices_are_made_once_per_version():
    channel, axis = MutableChannel(4), MutableChannelContainer(4)
    axis.register_mutable(channel, 0, 4)
    channel.current_choice = mask(1, 0, 1, 1)
    first = axis.kept("cpu")
    assert axis.kept("cpu") is first
    channel.current_choice = mask(1, 1, 0, 0)
    assert axis.kept("cpu").tolist() == [0, 1]
    channel.current_choice = mask(1, 1, 1, 1)
    assert axis.kept("cpu") is None


def test_a_later_span_is_seen_at_once():
    channel, axis = MutableChannel(2), MutableChannelContainer(4)
    channel.current_choice = mask(0, 1)
    assert axis.kept("cpu") is None
    axis.register_mutable(channel, 0, 2)
    assert axis.kept("cpu").tolist() == [1, 2, 3]
    axis.register_mutable(channel, 2, 4)
    assert axis.kept("cpu").tolist() == [1, 3]


@pytest.mark.parametrize(
    ("choice", "start"),
    [
        pytest.param(mask(1, 1, 0, 0), 0, id="prefix"),
        pytest.param(mask(0, 1, 1, 0), 1, id="middle"),
        pytest.param(mask(1, 0, 1, 0), None, id="scattered"),
    ],
)
def test_a_gapless_range_is_known_by_its_start(choice, start):
    channel, axis = MutableChannel(4), MutableChannelContainer(4)
    axis.register_mutable(channel, 0, 4)
    channel.current_choice = choice
    assert axis.kept_indices().start == start


def test_an_axis_with_nothing_left_is_an_error_that_names_it():
    left, right = MutableChannel(2, name="a"), MutableChannel(2, name="b")
    axis = MutableChannelContainer(2, name="conv.in_channels")
    axis.register_mutable(left, 0, 2)
    axis.register_mutable(right, 0, 2)
    left.current_choice, right.current_choice = mask(1, 0), mask(0, 1)
    with pytest.raises(ConfigError, match=r"conv.in_channels.*'a', 'b'"):
        axis.kept("cpu")


def test_indices_made_in_inference_mode_serve_a_later_backward():
    channel, axis = MutableChannel(3), MutableChannelContainer(3)
    axis.register_mutable(channel, 0, 3)
    with torch.inference_mode():
        channel.current_choice = mask(1, 0, 1)
        axis.kept("cpu")
    weight = torch.ones(3, requires_grad=True)
    weight.index_select(0, axis.kept("cpu")).sum().backward()
    assert weight.grad.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "clone",
    [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(lambda x: pickle.loads(pickle.dumps(x)), id="pickle")],
)
def test_copies_keep_the_sharing_and_lose_the_cache(clone):
    channel = MutableChannel(3, name="unit")
    axes = [MutableChannelContainer(3), MutableChannelContainer(3)]
    for axis in axes:
        axis.register_mutable(channel, 0, 3)
    channel.current_choice = mask(1, 0, 1)
    assert axes[0].kept("cpu") is not None
    first, second = clone(axes)
    assert first.spans[0].mutable is second.spans[0].mutable
    assert first.spans[0].mutable is not channel
    first.spans[0].mutable.current_choice = mask(0, 1, 0)
    assert second.kept("cpu").tolist() == [1]
    assert axes[0].kept("cpu").tolist() == [0, 2]


def test_repr_is_that_of_the_seed():
    assert repr(MutableChannelContainer(3)) == "MutableChannelContainer(name=, num_channels=3, activated_channels: 3)"
