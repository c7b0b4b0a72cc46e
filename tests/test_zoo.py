"""The zoo itself: its models run, are reproducible, and their hand-written units name spans that exist."""

from __future__ import annotations

import re

import pytest
import torch

from tests.zoo import ZOO, Case

CASES = [pytest.param(case, id=name) for name, case in ZOO.items()]


@pytest.mark.parametrize("case", CASES)
def test_weights_and_inputs_do_not_depend_on_the_global_seed(case: Case) -> None:
    torch.manual_seed(1)
    first, inputs = case.make(), case.inputs()
    torch.manual_seed(2)
    second, again = case.make(), case.inputs()
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key
    assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))


@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
@pytest.mark.parametrize("case", CASES)
def test_both_input_sizes_run_in_float64(case: Case, training: bool) -> None:
    module = case.make().double().train(training)
    for inputs in (case.inputs(), case.larger_inputs()):
        module(*[x.double() if x.is_floating_point() else x for x in inputs])


@pytest.mark.parametrize("case", CASES)
def test_each_unit_names_a_span_of_a_layer(case: Case) -> None:
    module = case.make()
    for name, channels in case.units.items():
        match = re.fullmatch(r"(.+)_\((\d+), (\d+)\)_out_\d+_in_\d+(?:_heads|_head_dim|_groups)?", name)
        assert match, name
        start, end = int(match[2]), int(match[3])
        sizes = {tensor.shape[0] for tensor in module.get_submodule(match[1]).parameters()}
        sizes |= {size for tensor in module.get_submodule(match[1]).parameters() for size in tensor.shape[:2]}
        assert (end - start) % channels == 0
        assert any(start < end <= size for size in sizes), name


@pytest.mark.parametrize("case", CASES)
def test_no_norm_is_trivial(case: Case) -> None:
    for layer in case.make().modules():
        if "Norm" in type(layer).__name__:
            for tensor in layer.state_dict().values():
                assert not tensor.is_floating_point() or len(tensor.unique()) == tensor.numel()


def test_the_zoo_is_wide() -> None:
    assert len(ZOO) >= 23
