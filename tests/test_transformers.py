"""Models of transformers: units as their code allows, tied weights, generation with a cache, and configs that follow.

A third of them; `--all-models` takes all.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelMutator, export_pruned
from lightning_prune.graph.contents import tensors_within
from lightning_prune.ops import dynamic_ops
from lightning_prune.plan import KeepPlan
from tests.compare import assert_same, full, outputs, scattered, zeroed_outputs
from tests.hf_models import HF_MODELS

QUICK = ("bert", "gpt2", "llama", "t5", "swin", "whisper")
# name -> (axis, channels) -> how many such units; what forward returns beside the logits would freeze some
UNITS: dict[str, dict[tuple[str, int], int]] = {
    # the embedding and the pooler; feed-forward and attention of two layers
    "bert": {("channels", 48): 2, ("channels", 96): 2, ("heads", 4): 2, ("head_dim", 12): 2},
    "bert_lm": {("channels", 48): 1, ("channels", 96): 2, ("heads", 4): 2, ("head_dim", 12): 2},
    "distilbert": {("channels", 48): 2, ("channels", 96): 2, ("heads", 4): 2, ("head_dim", 12): 2},
    "roberta": {("channels", 48): 2, ("channels", 96): 2, ("heads", 4): 2, ("head_dim", 12): 2},
    "gpt2": {("channels", 48): 1, ("channels", 96): 2, ("heads", 4): 2, ("head_dim", 12): 2},
    # two queries follow each key; channels of a head rotate in pairs, by frequencies that all layers share
    "llama": {("channels", 48): 1, ("channels", 96): 2, ("heads", 2): 2, ("head_dim", 6): 1},
    "qwen2": {("channels", 48): 1, ("channels", 96): 2, ("heads", 2): 2, ("head_dim", 6): 1},
    "mistral": {("channels", 48): 1, ("channels", 96): 2, ("heads", 2): 2, ("head_dim", 6): 1},
    # a table of positions holds the heads of all layers of a stack together, or zeros in its place
    "t5": {("channels", 48): 1, ("channels", 96): 4, ("heads", 4): 3, ("head_dim", 10): 6},
    "vit": {("channels", 48): 1, ("channels", 96): 2, ("heads", 4): 2, ("head_dim", 12): 2},
    "swin": {
        **{("channels", 24): 1, ("channels", 48): 1, ("channels", 96): 2, ("channels", 192): 2},
        **{("heads", 2): 2, ("heads", 4): 2, ("head_dim", 12): 4},
    },
    "segformer": {
        **{("channels", 16): 2, ("channels", 24): 1, ("channels", 40): 1, ("channels", 48): 1, ("channels", 36): 5},
        **{("channels", 64): 1, ("channels", 96): 1, ("channels", 160): 1, ("channels", 192): 1},
        **{("heads", 2): 1, ("heads", 4): 2, ("head_dim", 12): 2, ("head_dim", 10): 1},
    },
    "convnext": {("channels", n): 2 if n == 80 else 1 for n in (12, 48, 20, 80, 28, 112, 36, 144)},
    "resnet": {
        ("channels", n): k for n, k in ((12, 1), (16, 1), (4, 2), (24, 1), (6, 4), (32, 1), (8, 2), (40, 1), (10, 2))
    },
    # two towers, and what they are projected to
    "clip": {
        **{("channels", 48): 1, ("channels", 96): 2, ("channels", 40): 1, ("channels", 80): 2, ("channels", 28): 1},
        **{("heads", 4): 4, ("head_dim", 12): 2, ("head_dim", 10): 2},
    },
    "whisper": {
        **{("channels", 48): 3, ("channels", 96): 2, ("channels", 84): 2},
        **{("heads", 4): 6, ("head_dim", 12): 6},
    },
    # the hidden width is made of the groups of the convolution over positions
    "wav2vec2": {
        **{("groups", 4): 1, ("channels", 12): 1, ("channels", 20): 2, ("channels", 28): 1, ("channels", 96): 2},
        **{("heads", 4): 2, ("head_dim", 12): 2},
    },
}
FEED_FORWARD = {  # {96} elsewhere
    "whisper": {96, 84},
    "segformer": {64, 96, 160, 192},
    "clip": {96, 80},
}
FEED_FORWARD |= {"swin": {96, 192}, "convnext": {48, 80, 112, 144}, "resnet": {4, 6, 8, 10}}
GENERATING = ("gpt2", "llama", "qwen2", "mistral", "t5", "whisper")
# name -> units that a config cannot describe alone: kept whole
DESCRIBED = {
    "bert": ("*head_dim",),
    "gpt2": ("*head_dim",),
    "llama": ("*head_dim",),
    "t5": ("*head_dim",),
    "vit": ("*head_dim",),
    "qwen2": ("*head_dim",),
    "mistral": ("*head_dim",),
    "distilbert": ("*head_dim",),
    "roberta": ("*head_dim",),
    "bert_lm": ("*head_dim",),
    "swin": ("*head_dim",),
    "convnext": (),
    "resnet": (),
    # one head has all channels of the first stage: they go together in the class, and then the scale is another
    "segformer": ("*head_dim", "segformer.stages.0.patch*", "segformer.stages.0.*attention*"),
    # heads go with the hidden width, which is an output
    "clip": ("*heads", "*head_dim"),
    "wav2vec2": ("*head_dim", "wav2vec2_*in_16"),  # whole groups of the hidden width, that is
    "whisper": ("*heads", "*head_dim", "model.encoder.conv1*", "model.decoder.embed*"),
}
Inputs = dict[str, Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    whole = metafunc.config.getoption("--all-models", default=False)
    for argument, names in (("each", HF_MODELS), ("generating", GENERATING), ("described", DESCRIBED)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, [n for n in names if whole or n in QUICK])


class Head(nn.Module):
    """A model that returns its logits alone, as the `forward` of a LightningModule does."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *values: Tensor) -> Tensor:
        out = self.model(**dict(zip(self.names, values, strict=True)))
        logits: Tensor = out["logits"] if "logits" in out else out["logits_per_image"]
        return logits


class Case(NamedTuple):
    model: Head
    mutator: ChannelMutator
    inputs: Inputs
    values: tuple[Tensor, ...]
    dense: list[Tensor]


def double(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model in float64 and its inputs; the same at every call."""
    torch.manual_seed(0)
    model, _, inputs = HF_MODELS[name]()
    return model.double(), {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


@cache
def prepared(name: str) -> Case:
    net, inputs = double(name)
    model, values = Head(net, inputs), tuple(inputs.values())
    dense = outputs(model, values)
    mutator = ChannelMutator(example_input=values)
    mutator.prepare_from_supernet(model)
    return Case(model, mutator, inputs, values, dense)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return everything that a model returns in eval mode."""
    with torch.no_grad():
        return tensors_within(model.eval()(**inputs))


@pytest.fixture
def case(each: str) -> Iterator[Case]:
    """One preparation serves all tests of a model; each starts with everything kept."""
    found = prepared(each)
    yield found
    found.mutator.apply(full(found.mutator.units))


def ties_of(model: nn.Module) -> set[frozenset[str]]:
    """Return the names under which each tied parameter is known."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def test_units_are_those_that_the_code_allows(each: str, case: Case) -> None:
    assert Counter((u.axis, u.num_channels) for u in case.mutator.units) == UNITS[each]
    assert_same(outputs(case.model, case.values), case.dense)


@cache
def bare(name: str) -> ChannelMutator:
    """Return the mutator of a model with all that it returns."""
    model, inputs = double(name)
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    return mutator


def test_a_model_as_it_is_has_its_feed_forward_widths(each: str) -> None:
    mutator = bare(each)
    assert FEED_FORWARD.get(each, {96}) <= {u.num_channels for u in mutator.units if u.axis == "channels"}
    if each in GENERATING:  # the cache does not hold the heads
        assert "heads" in {u.axis for u in mutator.units}


@pytest.mark.parametrize("seed", [0, 1])
def test_dynamic_equals_exported_and_ties_hold(case: Case, seed: int) -> None:
    case.mutator.apply(scattered(case.mutator.units, seed))
    small = export_pruned(case.model)
    assert not dynamic_ops(small)
    assert sum(p.numel() for p in small.parameters()) == case.mutator.cost().params
    assert ties_of(small) == ties_of(case.model)
    for train in (False, True):
        found = []
        for model in (copy.deepcopy(case.model), small):
            np.random.seed(0)  # Wav2Vec2 hides a part of the sound by it
            found.append(outputs(model, case.values, train=train))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_pruning_equals_zeroing_where_nothing_renormalizes(case: Case) -> None:
    specs = [s for s in case.mutator.graph.units if not (s.renormalizing or s.rescaling)]
    assert specs
    kept = scattered(case.mutator.units).kept
    case.mutator.apply(KeepPlan({s.name: kept[s.name] for s in specs}))
    found = outputs(case.model, case.values)
    torch.testing.assert_close(found, zeroed_outputs(case.model, case.values), rtol=1e-9, atol=1e-9)
    assert not torch.equal(found[0], case.dense[0])


def prompt(inputs: Inputs, batch: int) -> Inputs:
    return {n: x[:batch] for n, x in inputs.items() if not n.startswith("decoder")}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_small_model_generates_with_its_cache(generating: str, batch: int) -> None:
    case = prepared(generating)
    case.mutator.apply(scattered(case.mutator.units))
    net, small = case.model.model.eval(), export_pruned(case.model).model.eval()
    given = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, **prompt(case.inputs, batch)}
    slow = net.generate(use_cache=False, **given)
    for model in (net, small):
        assert torch.equal(model.generate(use_cache=True, **given), slow)
    beams = [model.generate(use_cache=True, num_beams=3, **given) for model in (net, small)]
    assert torch.equal(*beams)
    case.mutator.apply(full(case.mutator.units))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_written_out_gives_the_same_units(name: str) -> None:
    model, inputs = double(name)
    model.set_attn_implementation("eager")
    mutator = ChannelMutator(example_input=inputs)
    mutator.prepare_from_supernet(model)
    assert Counter((u.axis, u.num_channels) for u in mutator.units) == UNITS[name]
    mutator.apply(scattered(mutator.units))
    assert_same(run(model, inputs), run(export_pruned(model), inputs))


# The config follows


@cache
def halved(name: str) -> tuple[nn.Module, ChannelMutator, Inputs]:
    """Return a model in float32, every kind of unit that its config can describe cut to one half."""
    torch.manual_seed(0)
    model, _, inputs = HF_MODELS[name]()
    mutator = ChannelMutator(example_input=inputs, tie_kinds=True)
    mutator.prepare_from_supernet(model)
    mutator.set_choices({"*": 0.5, **dict.fromkeys(DESCRIBED[name], 1.0)})
    return model, mutator, inputs


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    again: nn.Module = type(model).from_pretrained(folder)
    return again


def test_a_small_model_is_saved_and_loaded_by_its_own_class(described: str, tmp_path: Path) -> None:
    model, mutator, inputs = halved(described)
    dense = copy.deepcopy(model.config.to_dict())
    small = export_pruned(model)
    assert model.config.to_dict() == dense
    assert small.config.to_dict() != dense
    assert not [note for note in mutator.report().notes if "config" in note]
    again = reloaded(small, tmp_path)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    assert_same(run(small, inputs), run(again, inputs))
    assert ties_of(again) == ties_of(small)


def test_only_the_numbers_that_must_change_do() -> None:
    model, _, _ = halved("llama")
    before, after = model.config.to_dict(), export_pruned(model).config.to_dict()
    assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {
        "hidden_size": (48, 24),
        "intermediate_size": (96, 48),
        "num_attention_heads": (4, 2),
        "num_key_value_heads": (2, 1),  # and neither the layers nor the id of a token, which are 2 as well
    }


def test_configs_of_all_parts_follow() -> None:
    model, _, _ = halved("t5")
    small = export_pruned(model)
    assert {c.num_heads for c in (small.config, small.encoder.config, small.decoder.config)} == {2}
    assert {c.num_heads for c in (model.config, model.encoder.config, model.decoder.config)} == {4}


@pytest.mark.parametrize(
    ("name", "choices", "reason"),
    [
        ("bert", {"*layer.0.intermediate*": 0.5}, r"with intermediate_size=48: .*layer\.1\.intermediate.*\(96, 48\)"),
        ("bert", {"*head_dim": 0.5}, "is "),
        ("t5", {"*shared*": 0.5}, "takes .* where the dense model takes"),
        ("llama", {"*head_dim": 0.5}, r"`model\.rotary_emb\.inv_freq` was cut, and is not among what is saved"),
    ],
    ids=["layers that differ", "what the config does not say", "a scale that would change", "frequencies"],
)
def test_a_config_that_cannot_describe_the_model_stays(name: str, choices: dict[str, float], reason: str) -> None:
    case = prepared(name)
    case.mutator.set_choices(choices)
    small = export_pruned(case.model)
    assert small.model.config.to_dict() == case.model.model.config.to_dict()
    notes = [note for note in case.mutator.report().notes if "config" in note]
    case.mutator.apply(full(case.mutator.units))
    assert len(notes) == 1
    assert re.match(f"the config of `model` still describes the dense model: .*{reason}", notes[0]), notes


def test_outputs_of_a_model_hold_its_hidden_states() -> None:
    assert [f.reason for f in bare("t5").graph.frozen if (f.tensor, f.dim) == ("shared.weight", 1)] == ["model output"]
