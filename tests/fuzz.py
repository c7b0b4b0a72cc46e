"""Random networks as data: how they are drawn, run and made smaller."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fuzz_blocks import BLOCKS, IMAGE, TOKENS, VOCABULARY, Block, Pick, Shape, width_of
from tests.zoo_case import randomize_norms_

INPUTS: dict[str, Shape] = {"image": (3, 4, 4), "tokens": (4, 7), "ids": (5,)}
STEMS = {"image": "Conv", "tokens": "Dense", "ids": "Lookup"}  # what reads an input: makes channels that can go
BATCH = 2
PLAIN = {"groups": 1, "kernel": 1, "stride": 1, "dilation": 1, "bias": True, "spelling": "layer"}
WIDEST = 16  # channels that a block still reads
MOST_NODES = 8


@dataclass(frozen=True)
class Node:
    """One block of a network: its class, the values it reads by number, and its options."""

    block: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"node({self.block!r}, {', '.join(map(str, self.inputs))}{options})"


def node(block: str, *inputs: int, **options: Any) -> Node:
    return Node(block, inputs, options)


@dataclass(frozen=True)
class Network:
    """A network: the inputs are the first values, and each node appends what it returns.

    Args:
        inputs: Kind of each input.
        nodes: In the order they run.
        outputs: `(value, kind)`: "pool" and "flatten" end in a linear layer, "as it is" does not.
        seed: Of the weights, and of what is pruned.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[tuple[int, str], ...]
    seed: int = 0


class Head(nn.Module):
    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind != "as it is":
            self.fc = nn.Linear(torch.Size(shape).numel() if kind == "flatten" else width_of(shape), 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "as it is":
            return x
        if self.kind == "flatten":
            return self.fc(x.flatten(1))
        return self.fc(x.mean({IMAGE: (2, 3), TOKENS: (1,)}[x.dim() - 1]) if x.dim() > 2 else x)


class Builder:
    """Make blocks one by one, each for the shapes of the values that it reads."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.values = list(example(inputs))
        self.nodes: list[Node] = []
        self.blocks: list[Block] = []

    @property
    def shapes(self) -> list[Shape]:
        return [tuple(value.shape[1:]) for value in self.values]

    def add(self, node: Node) -> None:
        """Append a block and the values that it returns."""
        read = [self.values[k] for k in node.inputs]
        options = dict(node.options)
        if node.block == "Again":
            options["again"] = self.blocks[options.pop("node")]
        block = BLOCKS[node.block](*(tuple(x.shape[1:]) for x in read), **options).eval()
        with torch.no_grad():
            result = block(*read)
        self.nodes.append(node)
        self.blocks.append(block)
        self.values += result if isinstance(result, tuple) else [result]


class Net(nn.Module):
    """Run a network."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(network.seed)
            builder = Builder(network.inputs)
            for each in network.nodes:
                builder.add(each)
            heads = [Head(builder.shapes[value], kind) for value, kind in network.outputs]
        self.wires = [each.inputs for each in network.nodes]
        self.ends = [value for value, _ in network.outputs]
        self.blocks, self.heads = nn.ModuleList(builder.blocks), nn.ModuleList(heads)
        randomize_norms_(self)

    def values(self, *inputs: Tensor) -> list[Tensor]:
        """Return the inputs and what every block makes."""
        values = list(inputs)
        for wire, block in zip(self.wires, self.blocks, strict=True):
            result = block(*(values[k] for k in wire))
            values += result if isinstance(result, (tuple, list)) else [result]
        return values

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        values = self.values(*inputs)
        return {str(k): head(values[end]) for k, (end, head) in enumerate(zip(self.ends, self.heads, strict=True))}


def example(inputs: Sequence[str]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randint(VOCABULARY, (BATCH, *INPUTS[kind]), generator=generator)
        if kind == "ids"
        else torch.randn(BATCH, *INPUTS[kind], generator=generator)
        for kind in inputs
    )


# Drawing


@st.composite
def networks(draw: st.DrawFn, most_nodes: int = MOST_NODES) -> Network:
    """Draw a network; it shrinks to fewer and simpler nodes."""
    return draw_network(lambda *values: draw(st.sampled_from(values)), most_nodes)


def random_network(seed: int, most_nodes: int = MOST_NODES) -> Network:
    """Return the network of a seed, without a strategy: no two have anything to do with each other."""
    generator = random.Random(seed)
    return draw_network(lambda *values: generator.choice(values), most_nodes)


def draw_network(pick: Pick, most_nodes: int) -> Network:
    """Add a block that fits some of the values so far, again and again; what is simple comes first."""
    inputs = pick(("image",), ("image",), ("tokens",), ("ids",), ("image", "tokens"))
    builder = Builder(inputs)
    for k, kind in enumerate(inputs):
        builder.add(Node(STEMS[kind], (k,), BLOCKS[STEMS[kind]].options(pick, builder.shapes[k])))
    for _ in range(pick(*range(1, most_nodes + 1))):
        fitting = candidates(builder, start=len(inputs))
        families = dict.fromkeys(BLOCKS[name].family for name in fitting)
        family = pick(*families, *(f for f in ("attention",) * 2 if f in families))  # it has the most spellings
        name = pick(*(name for name in fitting if BLOCKS[name].family == family))
        read, given = pick(*fitting[name][:4])  # among the newest values: a network is deep rather than wide
        builder.add(Node(name, read, given or BLOCKS[name].options(pick, *(builder.shapes[k] for k in read))))
    last = len(builder.values) - 1
    kinds = {
        end: [
            "pool",
            *(["flatten"] if builder.values[end].numel() <= 160 else []),
            *(["as it is"] if end < last else []),
        ]
        for end in [last, *range(len(inputs), last)][: pick(1, 1, 2, 3)]
    }
    outputs = tuple((end, pick(*choices)) for end, choices in kinds.items())
    return Network(inputs, tuple(builder.nodes), outputs, pick(*range(100)))


def network_with(name: str, seed: int) -> Network:
    """Return a network around one block, with two values of every kind that it may read."""
    generator = random.Random(seed)
    pick: Pick = lambda *values: generator.choice(values)  # noqa: E731  # as in the other two
    builder = Builder(("image", "tokens"))
    width = pick(4, 8, 12) if name != "Pixels" else pick(4, 8)
    for each in (
        Node("Conv", (0,), {**PLAIN, "out": width}),
        Node("Dense", (1,), {"out": width, "spelling": "layer"}),
        Node("ToVector", (2,), {"spelling": "mean"}),
        Node("Scale", (2,), {"spelling": "flat"}),
        Node("Scale", (3,), {"spelling": "flat"}),
    ):
        builder.add(each)
    read, given = pick(*candidates(builder, start=2)[name])
    builder.add(Node(name, read, given or BLOCKS[name].options(pick, *(builder.shapes[k] for k in read))))
    return Network(("image", "tokens"), tuple(builder.nodes), ((len(builder.values) - 1, "pool"),), seed)


def candidates(builder: Builder, start: int) -> dict[str, list[tuple[tuple[int, ...], Mapping[str, Any]]]]:
    """Return per block what it could read from value `start` on, the newest first, and options that go with that."""
    shapes = builder.shapes
    usable = [k for k in reversed(range(start, len(shapes))) if width_of(shapes[k]) <= WIDEST]
    found: dict[str, list[tuple[tuple[int, ...], Mapping[str, Any]]]] = {}
    for name, block in BLOCKS.items():
        places = [[k for k in usable if not axes or len(shapes[k]) == axes] for axes in block.takes]
        reads = (read for read in itertools.product(*places) if len({*read}) == len(read) > 0)
        found[name] = [(read, {}) for read in reads if block.fits(*(shapes[k] for k in read))]
    found["Again"] = [
        (read, {"node": k})
        for k, (known, block) in enumerate(zip(builder.nodes, builder.blocks, strict=True))
        if known.block not in ("Again", "Lookup") and any(True for _ in block.parameters())
        for read in itertools.permutations(usable, len(known.inputs))
        if [shapes[i] for i in read] == [shapes[i] for i in known.inputs] and read != known.inputs
    ]
    return {name: choices for name, choices in found.items() if choices}


# Making smaller


def shrink(network: Network, fails: Callable[[Network], bool]) -> Network:
    """Return a network that still fails and of which no node and no output can be left out."""
    while True:
        for smaller in simpler(network):
            if fails(smaller):
                network = smaller
                break
        else:
            return network


def simpler(network: Network) -> Iterator[Network]:
    """Yield the networks with one output or one node less; readers of a node that goes read what it read."""
    for output in network.outputs if len(network.outputs) > 1 else ():
        yield replace(network, outputs=(output,))
    for gone in reversed(range(len(network.nodes))):
        smaller = without(network, gone)
        if smaller is not None:
            yield smaller


def without(network: Network, gone: int) -> Network | None:
    """Return the network without a node, None where the rest does not fit any more."""
    source = network.nodes[gone].inputs[0]
    old, new = Builder(network.inputs), Builder(network.inputs)
    moved = {k: k for k in range(len(network.inputs))}
    try:
        for k, each in enumerate(network.nodes):
            first = len(old.values)
            old.add(each)
            made = range(first, len(old.values))
            if k == gone:
                moved |= dict.fromkeys(made, moved[source])
                continue
            options = dict(each.options)
            if each.block == "Again":
                if options["node"] == gone:
                    return None
                options["node"] -= options["node"] > gone
            start = len(new.values)
            new.add(Node(each.block, tuple(moved[i] for i in each.inputs), options))
            moved |= {value: start + k for k, value in enumerate(made)}
        outputs = tuple((moved[value], kind) for value, kind in network.outputs)
        smaller = replace(network, nodes=tuple(new.nodes), outputs=outputs)
        Net(smaller)(*example(network.inputs))
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
        return None
    return smaller
