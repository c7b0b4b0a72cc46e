"""Layers whose weight is made of other parameters: parametrisations, weight and spectral norm, masks of torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_prune.checkpoint import KEY, load_pruned, structure_of
from lightning_prune.compact import compact_
from lightning_prune.errors import ConfigError
from lightning_prune.export import export_pruned
from lightning_prune.mutator import ChannelMutator
from lightning_prune.ops import dynamic_ops
from lightning_prune.plan import KeepPlan
from tests.compare import assert_same, scattered
from tests.made import Sinh, parametrized, sizes
from tests.partial import Net, assert_pruned_alike, chain, check, conv, image, parts, run

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


Wrap = Callable[[nn.Module], nn.Module]


class Scaled(nn.Module):
    """Multiplies each output channel by a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, 1, 1, 1)


def equalized(layer: nn.Module) -> nn.Module:
    """Make the weight in a hook of nobody's, as equalised learning rates do."""
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.weight = weight.detach()
    layer.register_forward_pre_hook(lambda module, inputs: setattr(module, "weight", module.weight_orig * 0.3))
    return layer


def masked(layer: nn.Module) -> nn.Module:
    prune.ln_structured(layer, "weight", 0.25, n=2, dim=0)
    prune.l1_unstructured(layer, "weight", 0.3)
    return prune.l1_unstructured(layer, "bias", 3)


# name -> how the weight of the body is made, and which of the units `stem` and `body` are renormalizing
FORMS: dict[str, tuple[Wrap, tuple[bool, bool]]] = {
    "weight norm": (parametrizations.weight_norm, (True, False)),
    "weight norm, inputs": (lambda m: parametrizations.weight_norm(m, dim=1), (False, True)),
    "weight norm, all": (lambda m: parametrizations.weight_norm(m, dim=None), (True, True)),
    "weight norm, hook": (nn.utils.weight_norm, (True, False)),
    "spectral norm": (parametrizations.spectral_norm, (True, True)),
    "spectral norm, hook": (nn.utils.spectral_norm, (True, True)),
    "spectral norm of weight norm": (
        lambda m: parametrizations.spectral_norm(parametrizations.weight_norm(m)),
        (True, True),
    ),
    "masks": (masked, (False, False)),
    "any function": (lambda m: parametrized(m, Sinh()), (False, False)),
    "with a parameter": (lambda m: parametrized(m, Scaled(12)), (False, False)),
    "two, one of the bias": (lambda m: parametrized(parametrized(m, Sinh()), Sinh(), "bias"), (False, False)),
    "hook of nobody's": (equalized, (False, False)),
}


EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def made(form: str) -> nn.Module:
    return Net(chain, **parts(body=FORMS[form][0](conv(8, 12)))).double()


def pruned(form: str) -> tuple[nn.Module, ChannelMutator]:
    model = made(form)
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    mutator.apply(scattered(mutator.units))
    return model, mutator


@EVERY_FORM
def test_a_made_weight_is_cut_like_any_other(form: str) -> None:
    mutator = ChannelMutator(example_input=image())
    model = made(form)
    mutator.prepare_from_supernet(model)
    assert {u.name.split("_out")[0]: u.num_channels for u in mutator.units} == {"stem_(0, 8)": 8, "body_(0, 12)": 12}
    assert tuple(u.renormalizing for u in mutator.units) == FORMS[form][1]
    names = {u.name: u.num_channels for u in mutator.units}
    check(made(form), (image(),), names)


@EVERY_FORM
def test_the_small_layer_is_of_the_same_kind(form: str) -> None:
    model, _ = pruned(form)
    small, plain = export_pruned(model), made(form)
    stem, body = sizes(small)
    assert type(small.body).__mro__[1:] == type(plain.body).__mro__[1:]
    assert (small.body.in_channels, small.body.out_channels) == (stem, body)
    if form != "hook of nobody's":  # which makes its weight at the next forward
        assert small.body.weight.shape == (body, stem, 3, 3)
    assert list(small.state_dict()) == list(plain.state_dict())
    assert f"{stem}, {body}, kernel_size" in repr(small.body)


@EVERY_FORM
def test_it_trains_as_the_small_one_does(form: str) -> None:
    model, _ = pruned(form)
    twin = export_pruned(model)
    results = []
    for network in (model, twin):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        for seed in range(3):
            network.train()(image(seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if network is model:
            compact_(model, optimizer)
            network(image()).square().mean().backward()
            optimizer.step()
        else:
            network(image()).square().mean().backward()
            optimizer.step()
        results.append(network.state_dict().values())
    assert_same(*results)
    assert not dynamic_ops(model)
    assert sizes(model) == sizes(twin)


@EVERY_FORM
@pytest.mark.parametrize("small", [pytest.param(True, id="small file"), pytest.param(False, id="full-sized file")])
def test_it_loads_into_a_new_model(form: str, small: bool, tmp_path: Path) -> None:
    model, _ = pruned(form)
    saved = export_pruned(model) if small else model
    torch.save({"state_dict": saved.state_dict(), KEY: structure_of(saved)}, tmp_path / "made.ckpt")
    loaded = load_pruned(tmp_path / "made.ckpt", made(form).eval())
    if form.endswith("hook"):
        assert loaded.body.weight.shape[1::-1] == sizes(loaded), "before any forward"
    assert_same(run(loaded, (image(),)), run(model, (image(),)))
    assert loaded.body.weight.shape[1::-1] == sizes(loaded)


@EVERY_FORM
def test_it_is_rebuilt_from_its_written_structure(form: str) -> None:
    model, mutator = pruned(form)
    other = ChannelMutator.from_config(mutator.config_template(with_channels=True))
    twin = made(form)
    twin.load_state_dict(model.state_dict())
    other.prepare_from_supernet(twin)
    other.apply(mutator.current_plan())
    assert_same(run(twin, (image(),)), run(model, (image(),)))


@EVERY_FORM
def test_default_choices_score_it(form: str) -> None:
    model, mutator = pruned(form)
    mutator.set_choices({"stem*": 0.5, "body*": 0.25})
    assert [unit.activated_channels for unit in mutator.units] == [4, 3]
    assert_pruned_alike(model, (image(),))


def test_weight_norm_is_scored_by_its_lengths() -> None:
    model = made("weight norm")
    with torch.no_grad():
        model.body.parametrizations.weight.original0.view(-1).copy_(torch.arange(12).roll(5))
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    mutator.set_choices({"body*": 4})
    assert mutator.units[1].mutable.current_mask.nonzero().flatten().tolist() == [1, 2, 3, 4]


@EVERY_FORM
def test_the_first_channels_are_cut_in_place(form: str) -> None:
    """Kept entries that are a view of the whole: what is written to them is there already."""
    model, mutator = pruned(form)
    mutator.apply(KeepPlan({u.name: tuple(range(u.num_channels - 2)) for u in mutator.units}))
    assert_pruned_alike(model, (image(),))


# What torch does to made weights goes on working


def test_parametrisations_are_removed_from_the_small_model() -> None:
    model, _ = pruned("weight norm")
    small = export_pruned(model)
    expected = run(small, (image(),))
    parametrize.remove_parametrizations(small.body, "weight")
    assert type(small.body) is nn.Conv2d
    assert_same(run(small, (image(),)), expected)


def test_masks_are_made_final_in_the_small_model() -> None:
    model, mutator = pruned("masks")
    stem, body = (unit.mutable.current_mask for unit in mutator.units)
    small = export_pruned(model)
    assert torch.equal(small.body.weight_mask, model.state_dict()["body.weight_mask"][body][:, stem])
    expected = run(small, (image(),))
    prune.remove(small.body, "weight")
    assert list(small.body._parameters) == ["bias_orig", "weight"]
    assert_same(run(small, (image(),)), expected)


def test_a_made_weight_takes_assignments_of_the_kept_size() -> None:
    model, _ = pruned("weight norm")
    removed = copy.deepcopy(model.state_dict())
    new = torch.randn_like(model.body.weight)
    model.body.weight = new
    torch.testing.assert_close(model.body.weight, new, rtol=0, atol=1e-12)
    torch.testing.assert_close(export_pruned(model).body.weight, new, rtol=0, atol=1e-12)
    name = "body.parametrizations.weight.original1"
    assert 0 < int((model.state_dict()[name] == removed[name]).sum()) < removed[name].numel()
    with pytest.raises(ConfigError, match=r"original0 of size \[12, 1, 1, 1\]; expected the kept size"):
        model.body.weight = torch.randn(12, 8, 3, 3).double()


def test_a_made_weight_without_an_inverse_refuses_assignments() -> None:
    model, _ = pruned("with a parameter")
    with pytest.raises(ConfigError, match="a tensor that Scaled makes, which has no inverse"):
        model.body.weight = torch.zeros_like(model.body.weight)


def test_power_iteration_goes_on_in_the_kept_entries() -> None:
    model, mutator = pruned("spectral norm")
    name = "body.parametrizations.weight.0._u"
    before = model.state_dict()[name].clone()
    for seed in range(3):
        run(model, (image(seed=seed),), train=True)
    changed = model.state_dict()[name] != before
    assert torch.equal(changed, mutator.units[1].mutable.current_mask)
    kept = model.state_dict()[name][changed]
    torch.testing.assert_close(kept.norm(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("form", ["weight norm, hook", "spectral norm, hook", "masks", "hook of nobody's"])
def test_a_weight_with_a_history_does_not_hinder_export(form: str) -> None:
    model, _ = pruned(form)
    model(image())
    assert not model.body.weight.is_leaf
    assert_pruned_alike(model, (image(),))


def test_a_copy_has_what_was_written_to_a_kept_buffer() -> None:
    model = Net(chain, **parts(norm=parametrized(nn.BatchNorm2d(8), Sinh()))).double()
    mutator = ChannelMutator(example_input=image())
    mutator.prepare_from_supernet(model)
    mutator.apply(KeepPlan({mutator.units[0].name: (1, 4, 6)}))
    model.norm.running_mean.add_(3.0)
    twin = copy.deepcopy(model)
    assert twin.state_dict()["norm.running_mean"].tolist() == [0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 3.0, 0.0]
