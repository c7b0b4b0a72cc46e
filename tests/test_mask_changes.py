"""What is derived from masks is worked out again when one of them has changed, and only then."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_prune.mutables import MutableChannel, MutableChannelContainer
from lightning_prune.ops import convert_

FIRST, LAST = torch.tensor([True, False, False]), torch.tensor([False, False, True])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the versions that are asked for."""
    seen: list[int] = []
    version: Any = MutableChannelContainer.version

    def counted(self: MutableChannelContainer) -> int:
        seen.append(version.fget(self))
        return seen[-1]

    monkeypatch.setattr(MutableChannelContainer, "version", property(counted))
    return seen


def make_norm(mutable: MutableChannel | None = None) -> Any:
    norm: Any = nn.BatchNorm2d(3)
    norm.weight.data.copy_(torch.tensor([2.0, 3.0, 4.0]))
    convert_(norm)
    if mutable is not None:
        norm.get_mutable_attr("num_features").register_mutable(mutable, 0, 3)
    return norm


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 4, 4)


@pytest.mark.parametrize("mask", [pytest.param(torch.ones(3).bool(), id="whole"), pytest.param(FIRST, id="cut")])
def test_a_forward_asks_no_mask_while_none_changes(mask: Tensor, reads: list[int]) -> None:
    mutable = MutableChannel(3)
    norm = make_norm(mutable)
    mutable.current_choice = mask
    x = images(int(mask.sum()))
    norm(x)
    reads.clear()
    norm(x)
    assert not reads


def test_a_change_elsewhere_costs_a_look_and_drops_nothing(reads: list[int]) -> None:
    mutable, other = MutableChannel(3), MutableChannel(3)
    norm = make_norm(mutable)
    mutable.current_choice = FIRST
    cuts = norm._dynamic.cuts(norm, "weight")
    other.current_choice = LAST
    reads.clear()
    assert norm._dynamic.cuts(norm, "weight") is cuts
    assert reads
    reads.clear()
    assert norm._dynamic.cuts(norm, "weight") is cuts
    assert not reads


def test_the_same_mask_again_is_no_change(reads: list[int]) -> None:
    mutable = MutableChannel(3)
    norm = make_norm(mutable)
    mutable.current_choice = FIRST
    norm(images(1))
    reads.clear()
    mutable.current_choice = FIRST.clone()
    norm(images(1))
    assert not reads


def test_a_span_that_comes_later_is_seen() -> None:
    norm, mutable = make_norm(), MutableChannel(3)
    mutable.current_choice = FIRST
    assert norm.num_features == 3
    norm.get_mutable_attr("num_features").register_mutable(mutable, 0, 3)
    assert norm.num_features == len(norm.weight) == len(norm.running_mean) == 1


def by_pickle(held: Any) -> Any:
    return pickle.loads(pickle.dumps(held))


@pytest.mark.parametrize("twin", [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(by_pickle, id="pickle")])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_copy_sees_the_changes_of_its_own_masks(twin: Callable[[Any], Any], is_first: bool) -> None:
    mutable = MutableChannel(3)
    norm = make_norm(mutable)
    mutable.current_choice = FIRST
    norm(images(1))
    other_norm, other = twin((norm, mutable))
    changed, changed_norm, kept_norm = (other, other_norm, norm) if is_first else (mutable, norm, other_norm)
    assert len(other_norm.weight) == 1
    changed.current_choice = ~FIRST
    assert len(changed_norm.weight) == changed_norm.num_features == 2
    assert len(kept_norm.weight) == kept_norm.num_features == 1


def test_a_shallow_copy_follows_the_masks_that_it_shares() -> None:
    mutable = MutableChannel(3)
    norm = make_norm(mutable)
    norm(images())
    twin = copy.copy(norm)
    mutable.current_choice = FIRST
    assert len(twin.weight) == len(norm.weight) == twin.num_features == 1


def test_statistics_written_while_it_was_cut_are_there_once_it_is_whole() -> None:
    mutable = MutableChannel(3)
    norm = make_norm(mutable)
    mutable.current_choice = FIRST | LAST
    norm.running_mean.copy_(torch.tensor([5.0, 7.0]))
    mutable.current_choice = torch.ones(3, dtype=torch.bool)
    assert norm.eval()(images()).shape[1] == 3
    assert norm.running_mean.tolist() == [5.0, 0.0, 7.0]


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
def test_compiled_code_notices_a_mask_that_nobody_settled() -> None:
    mutable = MutableChannel(3)
    norm = make_norm(mutable)
    compiled = torch.compile(norm, backend="eager")
    for mask in (FIRST, LAST, FIRST | LAST):
        mutable.current_choice = mask
        if mask is FIRST:
            norm._dynamic.settle(norm)
        x = images(int(mask.sum()))
        assert torch.equal(compiled(x), make_cut(norm)(x))


@pytest.mark.usefixtures("_fresh")
def test_a_layer_that_is_whole_compiles_at_once_without_a_break() -> None:
    norm = make_norm(MutableChannel(3))
    x = images()
    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), make_cut(norm)(x))


@pytest.mark.usefixtures("_fresh")
def test_compiled_code_is_made_anew_for_its_own_masks_alone() -> None:
    mutable, other, counter = MutableChannel(3), MutableChannel(3), CompileCounter()
    norm = make_norm(mutable)
    compiled = torch.compile(norm, backend=counter)
    for frames, changed, mask in ((1, mutable, FIRST), (1, other, LAST), (2, mutable, LAST), (2, other, FIRST)):
        changed.current_choice = mask
        if changed is mutable:
            norm._dynamic.settle(norm)
        x = images(1)
        assert torch.equal(compiled(x), make_cut(norm)(x))
        assert counter.frame_count == frames


def make_cut(norm: Any) -> nn.Module:
    """Return the plain layer that a copy becomes."""
    small: nn.Module = copy.deepcopy(norm).to_static()
    return small
