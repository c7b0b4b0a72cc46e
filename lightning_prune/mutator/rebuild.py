"""Config objects of models that save themselves with one: its numbers follow where they can describe the small model.

A number follows if the class, given the new config, makes exactly the pruned model: the same names and shapes, and in
lockstep with the dense trace the same program. Nothing is taken from the number's name.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.errors import TraceError
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.analyze import certify_rebuilt
from lightning_prune.graph.closure import BoolArray
from lightning_prune.graph.labels import is_labelled
from lightning_prune.graph.sandbox import Sandbox
from lightning_prune.graph.trace import DenseTrace
from lightning_prune.mutables import MutableChannel
from lightning_prune.mutator.numbers import Path, copy_numbers_, is_config, numbers_of, set_number_
from lightning_prune.ops import see_through, static_view

__all__ = ["Prepared", "rebuild_parts", "remember_", "rewrite_configs_"]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Prepared:
    """What a new config is proved with.

    Args:
        graph: The graph of a model.
        trace: Its dense trace.
        masks: Unit name -> mask of its channels.
    """

    graph: ChannelGraph
    trace: DenseTrace
    masks: Mapping[str, MutableChannel]

    def alive(self) -> BoolArray:
        """Return per label whether it lives now."""
        kept = {name: mask.current_mask.nonzero().flatten().numpy() for name, mask in self.masks.items()}
        return self.graph.alive(kept)


_PREPARED: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()


def remember_(model: nn.Module, prepared: Prepared) -> None:
    """Keep what `rewrite_configs_` needs for as long as a model with a config lives, longer than its mutator may."""
    if _parts(model):
        sandbox = Sandbox.like(prepared.trace.sandbox, nn.Module())  # else the entry would hold the model
        _PREPARED[model] = replace(prepared, trace=replace(prepared.trace, sandbox=sandbox))


def rebuild_parts(model: nn.Module, prepared: Prepared) -> tuple[dict[str, nn.Module], list[str]]:
    """Make every part of a model that has a config anew, as it is pruned, from that config with other numbers.

    Args:
        model: Dynamic, or small already. Unchanged.
        prepared: Its graph, trace and masks.

    Returns:
        Name -> the new part, on the meta device, with its new config; and a sentence on each part that cannot be made.
    """
    alive = prepared.alive()
    lengths = _new_lengths(prepared.graph, alive)
    rebuilt, notes = {}, []
    if lengths:
        with static_view(model):
            for name in _parts(model):
                search = _Search(model, name, prepared, alive)
                found = search.run(lengths)
                if found is not None:
                    rebuilt[name] = found
                elif search.failure:
                    where = f"the config of `{name}`" if name else "the config"
                    notes.append(f"{where} still describes the dense model: {search.failure}")
    return rebuilt, notes


def rewrite_configs_(small: nn.Module, model: nn.Module) -> None:
    """Give the configs of a small model the numbers that describe it, where there are such.

    Args:
        small: The pruned copy of `model`; it owns its configs.
        model: A model that a mutator has prepared, or a part of one; nothing happens to the configs of others.
    """
    for name, part in _rebuilt(model).items():
        own = small.get_submodule(name)
        if _shapes(own) == _shapes(part):
            modules = dict(own.named_modules())
            for inner, module in part.named_modules():
                if "config" in module.__dict__ and is_config(modules[inner].__dict__.get("config")):
                    copy_numbers_(module.__dict__["config"], modules[inner].__dict__["config"])


def _rebuilt(model: nn.Module) -> dict[str, nn.Module]:
    """Return the new parts of a model, by their names in it; the model itself may be inside of one."""
    home = _home(model)
    if home is None:
        return {}
    root, prepared, own = home
    found = {}
    for name, part in rebuild_parts(root, prepared)[0].items():
        path = name.split(".") if name else []
        if path[: len(own)] == own:
            found[".".join(path[len(own) :])] = part
        elif own[: len(path)] == path:
            found[""] = part.get_submodule(".".join(own[len(path) :]))
    return found


def _home(model: nn.Module) -> tuple[nn.Module, Prepared, list[str]] | None:
    """Return the prepared model that a module is a part of, and the path to it."""
    for root, prepared in _PREPARED.items():
        for name, module in root.named_modules():
            if module is model:
                return root, prepared, name.split(".") if name else []
    return None


def _parts(model: nn.Module) -> list[str]:
    """Return the names of the outermost modules that save themselves with a config."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and is_config(module.__dict__.get("config")) and hasattr(module, "save_pretrained"):
            found.append(name)
    return found


def _new_lengths(graph: ChannelGraph, alive: BoolArray) -> dict[int, list[int]]:
    """Return `dense length -> lengths after pruning` of the axes that shrink and their factors, most common first."""
    axes = [axis for held in graph.axes.values() for axis in held if is_labelled(axis)]
    axes += [axis for grid in graph.closure.products for axis in grid.axes]
    counts: dict[int, Counter[int]] = {}
    for axis in axes:
        living = int(np.count_nonzero(alive[axis]))
        if living < len(axis):
            counts.setdefault(len(axis), Counter())[living] += 1
    return {size: [new for new, _ in found.most_common()] for size, found in counts.items()}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(module)}


@dataclass(frozen=True)
class _Number:
    """A number of a config, and the value it may get: whether every size that stays does, and how many are wrong."""

    path: Path
    new: int
    keeps: bool
    errors: float


@dataclass
class _Search:
    """Look for the numbers of one config with which its class makes the pruned part.

    Args:
        model: The whole model.
        name: Name of the part.
        prepared: What is known of the model.
        alive: Per label, whether it lives.

    Attributes:
        failure: Why nothing was found; empty where nothing had to be.
    """

    model: nn.Module
    name: str
    prepared: Prepared
    alive: BoolArray
    failure: str = ""

    def run(self, lengths: Mapping[int, Sequence[int]]) -> nn.Module | None:
        """Return the part made from the fewest changed numbers, None if there is none.

        Args:
            lengths: Dense length -> lengths after pruning.
        """
        self.part = self.model.get_submodule(self.name)
        dense, self.pruned = self._expected()
        lost = [n for n in _unsaved(self.part) if dense[n] != self.pruned[n]]
        if dense == self.pruned:
            return None
        if lost:
            self.failure = f"`{lost[0]}` was cut, and is not among what is saved"
            return None
        plain = self._make({})
        if plain is None or _shapes(plain) != dense:
            self.failure = f"{type(self.part).__name__} does not make the dense model from it"
            return None
        found = [self._best(plain, path, lengths[n]) for path, n in numbers_of(self.part.config) if n in lengths]
        every = [number for number in found if number is not None]
        starts = (every, [n for n in every if n.keeps])  # those that change no size that stays may do alone
        choices = [{n.path: n.new for n in numbers} for numbers in starts]
        nearest = min(map(self._narrowed, choices), key=self._errors)
        return self._settled(nearest or choices[0])

    def _expected(self) -> tuple[Shapes, Shapes]:
        """Return the shapes of the part's tensors, dense and pruned."""
        first = {id(t): n for n, t in (*self.model.named_parameters(), *self.model.named_buffers())}
        dense, pruned = {}, {}
        for name, tensor in _tensors(self.part):
            axes = self.prepared.graph.axes.get(first[id(tensor)], tuple(None for _ in tensor.shape))
            pairs = list(zip(axes, tensor.shape, strict=True))
            dense[name] = tuple(len(a) if is_labelled(a) else n for a, n in pairs)
            pruned[name] = tuple(int(np.count_nonzero(self.alive[a])) if is_labelled(a) else n for a, n in pairs)
        return dense, pruned

    def _make(self, choice: Mapping[Path, int], *, values: bool = False) -> nn.Module | None:
        """Return the part as its class makes it, without memory for weights; None if the class refuses.

        Args:
            choice: The numbers that differ from the config.
            values: Whether what is computed has its values, as buffers may; that takes longer.
        """
        try:
            config = copy.deepcopy(self.part.config)
            for path, number in choice.items():
                set_number_(config, path, number)
            without_memory = _WithoutWeights() if values else torch.device("meta")
            with without_memory, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made: nn.Module = type(self.part)(config)
        except Exception as error:  # whatever a class may raise that is given numbers that do not fit
            self.failure = f"{_words(choice)}: {type(error).__name__}: {error}"
            return None
        return made

    def _best(self, plain: nn.Module, path: Path, lengths: Sequence[int]) -> _Number | None:
        """Return the new value of one number that alone comes closest; nothing if it plays no part.

        Many a class refuses a number that does not fit the others: that says nothing against it.
        """
        before, found = _shapes(plain), []
        for new in lengths:
            made = self._make({path: new})
            shapes = before if made is None else _shapes(made)
            if shapes.keys() != before.keys():
                continue  # it says which layers there are
            if made is None or shapes != before or _attributes(made) != _attributes(plain):
                stays = all(shapes[name] == before[name] for name in before if before[name] == self.pruned[name])
                found.append(_Number(path, new, stays, self._errors({path: new})))
        return min(found, key=lambda number: number.errors, default=None)

    def _errors(self, choice: Mapping[Path, int]) -> float:
        """Return how many sizes of the part are wrong with these numbers."""
        made = self._make(choice)
        shapes = {} if made is None else _shapes(made)
        if shapes.keys() != self.pruned.keys():
            return float("inf")
        return sum(a != b for name in shapes for a, b in zip(shapes[name], self.pruned[name], strict=True))

    def _narrowed(self, choice: dict[Path, int]) -> dict[Path, int]:
        """Take back one number after the other while that brings the sizes nearer to the pruned ones."""
        errors = self._errors(choice)
        while errors and choice:
            fewer = [{p: n for p, n in choice.items() if p != path} for path in choice]
            counts = [self._errors(one) for one in fewer]
            if min(counts) >= errors:
                break
            errors, choice = min(counts), fewer[counts.index(min(counts))]
        return choice

    def _settled(self, choice: dict[Path, int]) -> nn.Module | None:
        """Prove the numbers; take back those without which the program agrees for longer."""
        made, steps = self._proved(choice)
        for _ in range(len(choice)):
            if made is not None:
                return self._fewest(choice, made)
            fewer = [{p: n for p, n in choice.items() if p != path} for path in choice]
            results = [self._proved(one) for one in fewer]
            best = max(range(len(fewer)), key=lambda k: results[k][1])
            if results[best][1] <= steps:
                break
            choice, (made, steps) = fewer[best], results[best]
        return self._proved(choice)[0]  # once more, for the failure of the best of them

    def _proved(self, choice: Mapping[Path, int]) -> tuple[nn.Module | None, float]:
        """Return the part made with other numbers if it is the pruned one, and how many ops agree."""
        made = self._make(choice)
        if made is None:
            return None, -1
        shapes = _shapes(made)
        differ = next((n for n in self.pruned if shapes.get(n) != self.pruned[n]), None)
        if differ is not None or len(shapes) != len(self.pruned):
            what = f"`{differ}` is {self.pruned.get(differ or '')}, not {shapes.get(differ or '')}"
            self.failure = f"{_words(choice)}: {what}"
            return None, -1
        try:
            with self._in_place(made) as root, see_through(root):
                certify_rebuilt(self.prepared.graph, self.prepared.trace, self.alive, root, self.name)
        except TraceError as error:
            self.failure = f"{_words(choice)}: {error}"
            return None, getattr(error.__cause__, "step", -1)
        other = self._other_value(choice)
        if other is not None:
            self.failure = f"{_words(choice)}: `{other}` has other values, and is not among what is saved"
            return None, -1
        return made, float("inf")

    def _other_value(self, choice: Mapping[Path, int]) -> str | None:
        """Return the name of a buffer that no state dict holds and that the class fills in another way."""
        unsaved = _unsaved(self.part)
        made = self._make(choice, values=True) if unsaved else None
        return next((n for n, t in unsaved.items() if made is None or not _same(made.get_buffer(n), t)), None)

    def _fewest(self, choice: dict[Path, int], made: nn.Module) -> nn.Module:
        """Take back every number that need not change: it only happens to be equal."""
        for path in list(choice):
            fewer = {p: n for p, n in choice.items() if p != path}
            again, _ = self._proved(fewer)
            if again is not None:
                choice, made = fewer, again
        return made

    @contextmanager
    def _in_place(self, part: nn.Module) -> Iterator[nn.Module]:
        """Show the model with a new part for a while."""
        if not self.name:
            yield part
            return
        parent, _, own = self.name.rpartition(".")
        children = self.model.get_submodule(parent)._modules
        try:
            children[own] = part
            yield self.model
        finally:
            children[own] = self.part


class _WithoutWeights(TorchFunctionMode):
    """Make uninitialized tensors, such as weights, without memory; what is computed has its values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "meta"} if func is torch.empty else kwargs))


def _unsaved(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state dict does not hold: the constructor makes them."""
    saved = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name not in saved}


def _same(made: Tensor, buffer: Tensor) -> bool:
    return not made.is_meta and torch.equal(made.to(buffer.device, buffer.dtype), buffer)


def _attributes(model: nn.Module) -> list[tuple[str, str, Any]]:
    """Return the plain numbers that the modules hold."""
    return [
        (name, attribute, value)
        for name, module in model.named_modules()
        for attribute, value in module.__dict__.items()
        if isinstance(value, int | float | tuple)
    ]


def _words(choice: Mapping[Path, int]) -> str:
    numbers = ", ".join(f"{'.'.join(map(str, path))}={number}" for path, number in choice.items())
    return f"with {numbers}" if numbers else "with no other number"
