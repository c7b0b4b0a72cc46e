"""Criteria of activations and of their gradients: worked out by hand, and against autograd's own gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.errors import PlanError
from lightning_prune.graph.contents import tensors_within
from lightning_prune.importance import Importance, resolve_importance
from lightning_prune.importance.axes import readers_of
from lightning_prune.importance.observer import LossScale, MeansObserver
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import to_static_
from lightning_prune.units import MutableChannelUnit
from tests.by_hand import joined, linear, span, unit
from tests.compare import double, scattered
from tests.zoo import ZOO

SEEN = [[1.0, 0.0, -3.0], [3.0, 0.0, 4.0]]  # mean absolute 2, 0, 3.5; mean square 5, 0, 12.5; not zero 1, 0, 1
WEIGHTS = [[2.0, 1.0, 1.0], [0.0, -1.0, -3.0]]  # absolute sums 2, 2, 4


def watching(importance: Any, *units: MutableChannelUnit) -> MeansObserver:
    found = resolve_importance(importance)
    assert isinstance(found, Importance)
    observer = found.observer(units)
    assert observer is not None
    return observer


def run(observer: MeansObserver, layers: Sequence[nn.Module], values: Any, scale: LossScale | None = None) -> None:
    """Show each layer the values, one batch of one backward; the loss is the mean of all outputs."""
    handles = observer.attach()
    x = torch.as_tensor(values, dtype=torch.float64).requires_grad_()
    total = torch.stack([layer(x).flatten(1).sum(1) for layer in layers]).sum(0)
    (total.mean() * (scale.factor if scale else 1.0)).backward()
    observer.after_backward(scale or LossScale())
    for handle in handles:
        handle.remove()


def scores(observer: MeansObserver, one: MutableChannelUnit) -> list[float]:
    found: list[float] = observer.scores([one], "local")[one.name].tolist()
    return found


# Activations


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("activation", [2.0, 0.0, 3.5], id="activation"),
        pytest.param("apoz", [1.0, 0.0, 1.0], id="apoz"),
        pytest.param("wanda", [2 * math.sqrt(5), 0.0, 4 * math.sqrt(12.5)], id="wanda"),
    ],
)
def test_of_one_reader(name: str, expected: list[float]) -> None:
    reader = linear(WEIGHTS)
    one = joined(3, reads=[reader])
    observer = watching(name, one)
    run(observer, [reader], SEEN)
    assert scores(observer, one) == pytest.approx(expected)


def test_batches_are_averaged_by_their_size() -> None:
    reader = linear(WEIGHTS)
    one = joined(3, reads=[reader])
    observer = watching("activation", one)
    run(observer, [reader], SEEN)
    run(observer, [reader], [[8.0, 3.0, 2.0]])
    assert scores(observer, one) == [4.0, 1.0, 3.0]
    observer.reset()
    run(observer, [reader], [[8.0, 3.0, 2.0]])
    assert scores(observer, one) == [8.0, 3.0, 2.0]


@pytest.mark.parametrize(("reduction", "expected"), [("mean", [3.0, 1.5, 2.0]), ("max", [4.0, 3.0, 3.5])])
def test_readers_are_combined(reduction: str, expected: list[float]) -> None:
    first, second = linear(WEIGHTS), linear(WEIGHTS)
    one = joined(3, reads=[first, second])
    observer = watching({"name": "activation", "reduction": reduction}, one)
    handles = observer.attach()
    first(torch.tensor(SEEN, dtype=torch.float64))
    second(torch.tensor([[4.0, 3.0, 0.5]], dtype=torch.float64))
    for handle in handles:
        handle.remove()
    assert scores(observer, one) == expected


def test_places_of_an_image_and_tokens_count_alike() -> None:
    image, tokens = nn.Conv2d(3, 2, 1).double(), linear(WEIGHTS)
    for reader, values in ((image, torch.tensor(SEEN).T.view(1, 3, 2, 1)), (tokens, torch.tensor(SEEN).view(1, 2, 3))):
        one = joined(3, reads=[reader])
        observer = watching("activation", one)
        run(observer, [reader], values)
        assert scores(observer, one) == [2.0, 0.0, 3.5]


def test_positions_of_one_channel_are_averaged() -> None:
    reader = linear([[1.0] * 6])  # a flatten: two columns for each channel
    one = joined(3, reads=[reader])
    observer = watching("activation", one)
    run(observer, [reader], [[1.0, 3.0, 0.0, -2.0, 4.0, 4.0]])
    assert scores(observer, one) == [2.0, 1.0, 4.0]


def test_the_input_may_be_a_keyword() -> None:
    reader = linear(WEIGHTS)
    one = joined(3, reads=[reader])
    for name in ("activation", "fisher"):
        observer = watching(name, one)
        handles = observer.attach()
        x = torch.tensor(SEEN, dtype=torch.float64, requires_grad=True)
        reader(input=x).sum().backward()
        observer.after_backward(LossScale())
        for handle in handles:
            handle.remove()
        assert scores(observer, one)[2] > 0


def test_removed_channels_carry_on_from_their_last_score() -> None:
    reader = linear(WEIGHTS)
    one = joined(3, reads=[reader])
    observer = watching("activation", one)
    run(observer, [reader], SEEN)
    assert scores(observer, one) == [2.0, 0.0, 3.5]
    observer.reset()
    one.keep([0, 1])
    run(observer, [reader], [[1.0, 0.5]])  # what remains has gone from 2 to 1.5 in sum
    assert scores(observer, one) == [1.0, 0.5, 3.5 * 0.75]


@pytest.mark.parametrize("name", ["activation", "apoz", "wanda", "fisher"])
def test_a_unit_that_no_such_layer_reads_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=rf"unit 'unit_\(0, 3\)', which no convolution or linear.*'{name}'"):
        watching(name, unit(3, [span(linear([[1.0]] * 3))]))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        pytest.param("activation", "no activations at 'reader1'", id="activation"),
        pytest.param("fisher", "no gradient at the inputs of 'reader0', 'reader1'", id="fisher"),
    ],
)
def test_layers_that_were_not_called_are_named(name: str, what: str) -> None:
    reader, idle = linear(WEIGHTS), linear(WEIGHTS)
    one = joined(3, reads=[reader, idle])
    observer = watching(name, one)
    handles = observer.attach()
    reader(torch.tensor(SEEN, dtype=torch.float64))  # no gradient flows into it
    for handle in handles:
        handle.remove()
    observer.after_backward(LossScale())
    with pytest.raises(PlanError, match=f"Got {what}; importance '{name}' expects"):
        observer.scores([one])


def test_activations_that_are_not_finite_name_the_unit() -> None:
    reader = linear(WEIGHTS)
    one = joined(3, reads=[reader])
    observer = watching("activation", one)
    run(observer, [reader], [[1.0, math.inf, 0.0]])
    with pytest.raises(PlanError, match=r"Got score inf for channel 1 of unit 'unit_\(0, 3\)'"):
        observer.scores([one])


# Group Fisher


def test_fisher_of_one_reader() -> None:
    """Column sums of the weights 2, 0, -2; gate of example n is x[n] times them: 2, 0, 6 and 6, 0, -8."""
    reader = linear(WEIGHTS)
    one = joined(3, reads=[reader])
    observer = watching("fisher", one)
    run(observer, [reader], SEEN)
    assert scores(observer, one) == [20.0, 0.0, 50.0]
    run(observer, [reader], [[1.0, 5.0, 1.0]])  # gates 2, 0, -2; three examples in all
    assert scores(observer, one) == pytest.approx([44 / 3, 0.0, 104 / 3])


def test_gates_add_up_over_readers_before_they_are_squared() -> None:
    first, second = linear(WEIGHTS), linear([[-2.0, 1.0, 0.0]])  # column sums together 0, 1, -2
    one = joined(3, reads=[first, second])
    observer = watching("fisher", one)
    run(observer, [first, second], SEEN)
    assert scores(observer, one) == [0.0, 0.0, 50.0]


@pytest.mark.parametrize(
    "scale", [LossScale(1024.0, may_overflow=True), LossScale(0.25)], ids=["scaler", "accumulated"]
)
def test_the_scale_of_the_loss_is_divided_out(scale: LossScale) -> None:
    reader = linear(WEIGHTS)
    one = joined(3, reads=[reader])
    observer = watching("fisher", one)
    run(observer, [reader], SEEN, scale)
    assert scores(observer, one) == [20.0, 0.0, 50.0]


def test_a_backward_that_overflows_is_not_seen() -> None:
    reader = linear(WEIGHTS)
    one = joined(3, reads=[reader])
    observer = watching("fisher", one)
    run(observer, [reader], SEEN)
    run(observer, [reader], SEEN, LossScale(math.inf, may_overflow=True))
    assert scores(observer, one) == [20.0, 0.0, 50.0]


def test_windows_are_folded_into_their_examples() -> None:
    """Reader 1 sees each of two examples as two windows of one row; alone it would count four examples."""
    whole, windows = linear(WEIGHTS), linear(WEIGHTS)
    one = joined(3, reads=[whole, windows])
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for folded in (x, x.view(4, 1, 3)):
        observer = watching("fisher", one)
        handles = observer.attach()
        (whole(x).square().mean() + windows(folded).square().mean()).backward()
        observer.after_backward(LossScale())
        for handle in handles:
            handle.remove()
        found.append(scores(observer, one))
    assert found[0] == pytest.approx(found[1])


def test_inputs_without_a_common_batch_are_refused() -> None:
    two, three = linear(WEIGHTS), linear(WEIGHTS)
    one = joined(3, reads=[two, three])
    observer = watching("fisher", one)
    handles = observer.attach()
    a, b = (torch.ones(n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 3))
    (two(a).sum() + three(b).sum()).backward()
    for handle in handles:
        handle.remove()
    with pytest.raises(PlanError, match=r"3 and 2 entries on the first axes .* unit 'unit_\(0, 3\)'"):
        observer.after_backward(LossScale())


class Gated(nn.Module):
    """A channel that two layers read behind a gate; gates of 1 change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = F.silu(self.norm(self.make(x)))
        x = x if gate is None else x * gate[:, :, None, None]
        return torch.tanh(self.left(x) * self.right(x)).mean((1, 2, 3))


def test_fisher_is_the_mean_square_of_the_gradients_of_gates() -> None:
    model = Gated().double()
    images, gates = torch.randn(5, 2, 8, 8).double(), torch.ones(5, 6, dtype=torch.float64, requires_grad=True)
    model(images, gates).sum().backward()  # each example has a gate of its own: all their gradients at once
    assert gates.grad is not None
    expected = gates.grad.square().mean(0)
    mutator = ChannelMutator(example_input=images)
    mutator.prepare_from_supernet(model)
    one = mutator.units[0]
    observer = watching("fisher", one)
    handles = observer.attach()
    model(images).mean().backward()
    for handle in handles:
        handle.remove()
    observer.after_backward(LossScale())
    assert scores(observer, one) == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["activation", "fisher"])
def test_watching_changes_no_bit(name: str) -> None:
    model = Gated()
    images = torch.randn(5, 2, 8, 8)
    mutator = ChannelMutator(example_input=images)
    mutator.prepare_from_supernet(model)
    observer = watching(name, mutator.units[0])
    found = []
    for watched in (False, True):
        statistics = {key: value.clone() for key, value in model.named_buffers()}
        handles = observer.attach() if watched else []
        random = torch.get_rng_state()
        loss = model(images).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for handle in handles:
            handle.remove()
        observer.after_backward(LossScale())
        assert torch.equal(random, torch.get_rng_state())
        found.append([loss.detach(), *gradients, *(b.clone() for b in model.buffers())])
        for key, value in model.named_buffers():
            value.copy_(statistics[key])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


# Every topology of the zoo, dynamic and small


CRITERIA = ("taylor", "fisher", "activation")
TOKENS_FIRST = ("multihead", "fisher")  # torch's own attention has its tokens first, and `fisher` wants the examples
TRIED = [(name, each) for name, case in ZOO.items() for each in CRITERIA if case.units and (name, each) != TOKENS_FIRST]


def test_fisher_says_that_the_first_axis_is_not_that_of_the_examples() -> None:
    case = ZOO["multihead"]
    model, inputs = case.make().double(), double(case.inputs())
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    observer = watching("fisher", *(unit for unit in mutator.units if readers_of(unit)))
    mutator.apply(scattered(mutator.units))
    with pytest.raises(PlanError, match="Got 9 and 2 entries on the first axes"):
        watch(observer, model, inputs)


@pytest.mark.parametrize(("topology", "criterion"), TRIED)
def test_a_small_model_shows_what_the_masked_one_does(topology: str, criterion: str) -> None:
    case = ZOO[topology]
    model, inputs = case.make().double(), double(case.inputs())
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    units = [one for one in mutator.units if criterion == "taylor" or readers_of(one)]
    if len(units) < len(mutator.units):  # read by functions, recurrent layers or parametrised ones
        with pytest.raises(PlanError, match="which no convolution or linear layer reads"):
            watching(criterion, *mutator.units)
    observer = watching(criterion, *units)
    mutator.apply(scattered(mutator.units))
    found = []
    for _ in range(2):
        watch(observer, model, inputs)
        found.append(observer.scores(units))
        observer.reset()
        to_static_(model)
    assert not units or any(scores.any() for scores in found[0].values())
    for one in units:
        mask = one.mutable.current_mask
        masked, small = (each[one.name][mask] for each in found)
        torch.testing.assert_close(masked, small, rtol=1e-5, atol=0.0)


def watch(observer: MeansObserver, model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """One step in train mode; dropout draws the same every time."""
    torch.manual_seed(0)
    model.train().zero_grad()
    handles = observer.attach()
    torch.stack([output.square().mean() for output in tensors_within(model(*inputs))]).sum().backward()
    observer.after_backward(LossScale())
    observer.before_step({id(p) for p in model.parameters()}, LossScale())
    for handle in handles:
        handle.remove()
