"""Run a model for its ops alone: on fake tensors, and without leaving a trace of the trace."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.graph.contents import named_tensors, tensors_within
from lightning_prune.graph.fakes import FakeMode
from lightning_prune.graph.generators import global_generators, own_generators
from lightning_prune.graph.held import Held
from lightning_prune.graph.memos import find_memos
from lightning_prune.graph.results import Results
from lightning_prune.graph.snapshot import Snapshot, do_nothing, reset_caches

__all__ = ["Sandbox"]


def _is_object(value: Any) -> bool:
    """Return whether a value has a class of its own: neither a tensor nor a container nor plain data."""
    plain = (Tensor, Mapping, list, tuple, set, str, bytes, int, float, type)
    return not isinstance(value, plain) and not is_dataclass(value) and hasattr(value, "__dict__")


def _forward_names(model: nn.Module) -> set[str]:
    """Return the names of all arguments that the model or a part of it takes."""
    names: set[str] = set()
    for cls in {type(module) for module in model.modules()}:
        with suppress(TypeError, ValueError):  # a forward that is not Python has no signature
            names.update(inspect.signature(cls.forward).parameters)
    return names


@dataclass
class Sandbox:
    """Holds the fake mode and puts everything back after each run.

    Args:
        model: The model; its state is the same before and after every run.
        fake: Whether tensors are fake. Models that read values need real ones.
        inference: Whether to run in inference mode, where composite ops stay whole. Models that derive need the other.
        caches: `(module name, attribute) -> what it was before` of attributes that runs changed: lazy caches.
        states: Names of results that only go back into the model (see `outputs`).
    """

    model: nn.Module
    fake: bool = True
    inference: bool = True
    caches: dict[tuple[str, str], Any] = field(default_factory=dict)
    states: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mode = FakeMode()
        self._results = Results(self.mode)
        self._fakes: dict[tuple[int, torch.dtype, tuple[int, ...]], Tensor] = {}
        self._found = {name: (t.dtype, t.device) for name, t in named_tensors(self.model).items()}
        self._moved: dict[str, Tensor] = {}
        self.memos = find_memos(self.model)

    @classmethod
    def like(cls, other: Sandbox, model: nn.Module) -> Sandbox:
        """Return a sandbox for another model whose tensors stand for those of the same name, on their devices."""
        sandbox = cls(model, other.fake, other.inference)
        sandbox._found = other._found
        return sandbox

    @property
    def results(self) -> Results | None:
        """What ops on fake tensors returned, None on real ones."""
        return self._results if self.fake else None

    def without_gradients(self) -> AbstractContextManager[None]:
        """Return the context in which stand-ins are made and the model runs."""
        return torch.inference_mode() if self.inference else torch.no_grad()

    def outputs(self, output: Any) -> list[Tensor]:
        """Return the tensors of an output whose sizes somebody may rely on.

        Left out is what the model hands on to itself: an object, neither tensor nor container, under a name that is
        also an argument of a forward in it, such as the key-value cache `past_key_values`. It shrinks with the model.

        Args:
            output: What forward returned: any object that holds tensors.
        """
        if isinstance(output, Mapping):
            named = dict(output)
        else:
            named = {f.name: getattr(output, f.name) for f in fields(output)} if is_dataclass(output) else {}
        objects = [name for name, value in named.items() if _is_object(value)]
        states = set(objects) & _forward_names(self.model) if objects else set()
        found = tensors_within([value for name, value in named.items() if name not in states])
        if not (states and found):
            return tensors_within(output)
        self.states.update(dict.fromkeys(sorted(states)))
        return found

    def as_found(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the model with the dtype and device it had at first: the example input has not moved.

        Args:
            name: Its qualified name.
            tensor: What the model holds now.
        """
        dtype, device = self._found.get(name, (tensor.dtype, tensor.device))
        if (tensor.dtype, tensor.device) == (dtype, device):
            return tensor
        if not self.fake:
            moved = tensor.detach().to(device, dtype)
            return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        if name not in self._moved:
            self._moved[name] = self.mode.make(dtype, device, tensor.shape)
            if isinstance(tensor, nn.Parameter):
                self._moved[name]._is_param = True  # what isinstance(x, nn.Parameter) looks at
        return self._moved[name]

    def make_like(self, tensor: Tensor) -> Tensor:
        """Return a stand-in for a tensor: fake, or a copy that a run may change."""
        if self.fake:
            return self._fake(tensor, tensor.shape)
        copy = tensor.detach().clone()
        return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy

    def make_sized(self, tensor: Tensor, shape: Sequence[int], kept: Callable[[int], Tensor]) -> Tensor:
        """Return a stand-in for the kept slice of a tensor.

        Args:
            tensor: The dense tensor.
            shape: Shape of the slice.
            kept: Axis -> Int64 indices that remain; asked only where real data is needed.
        """
        if self.fake:
            return self._fake(tensor, shape)
        small = tensor.detach().clone()
        for d, size in enumerate(shape):
            small = small if size == small.shape[d] else small.index_select(d, kept(d).to(small.device))
        return nn.Parameter(small, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small

    def _fake(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a fake tensor; it holds no data that a run could change, so one serves all runs."""
        if tensor.layout != torch.strided or (not tensor.is_contiguous() and tuple(shape) == tuple(tensor.shape)):
            return self.mode.from_tensor(tensor)
        key = (id(tensor), tensor.dtype, tuple(shape))
        if key not in self._fakes:
            fake = self._fakes[key] = self.mode.like(tensor, shape)
            if isinstance(tensor, nn.Parameter):
                fake._is_param = True  # what isinstance(x, nn.Parameter) looks at
        return self._fakes[key]

    def inputs(self, tree: Any) -> Any:
        """Return the example input with stand-ins for its tensors."""

        def stand_in(leaf: Any) -> Any:  # a new one each time: a model may reshape its input in place
            if not isinstance(leaf, Tensor):
                return leaf
            plain = self.fake and leaf.layout == torch.strided and leaf.is_contiguous()
            return self.mode.like(leaf, leaf.shape) if plain else self.make_like(leaf)

        return tree_map(stand_in, tree)

    def run(
        self,
        tensors: Mapping[int, Tensor],
        call: Callable[[], Any],
        observer: Any,
        *,
        train: bool,
        attributes: Mapping[tuple[str, str], Any] | None = None,
    ) -> Any:
        """Call the model on stand-ins under a dispatch mode, then put everything back.

        Args:
            tensors: `id(parameter or buffer) -> stand-in`.
            call: Runs the model.
            observer: The dispatch mode that watches.
            train: Run in train mode, else in eval mode.
            attributes: `(module name, attribute) -> value` to set for this run.

        Returns:
            What `call` returned.
        """
        rewritten: dict[str, list[str]] = {}
        for name, attribute in attributes or ():
            rewritten.setdefault(name, []).append(attribute)
        restored = self._restored(rewritten)
        with self.without_gradients(), _quiet(), self.memos.left_out(), restored as modules:
            reset_caches(self.model, self.caches)  # the model may have run meanwhile
            observer.stand_ins = tensors
            for module in modules.values():
                if isinstance(module, torch.jit.ScriptModule):  # its tensors are out of reach, and frozen for that
                    module.training = train
                    continue
                if isinstance(module, nn.DataParallel):
                    module.__dict__["device_ids"] = []  # no copies on other devices
                module.__dict__["training"] = train
                for store in ("_parameters", "_buffers"):
                    held = Held(module.__dict__[store], tensors)
                    module.__dict__[store] = held if self.fake else held.stand_ins()  # real ones may not be changed
                if "_flat_weights" in module.__dict__:  # an RNN reads its parameters from this list
                    listed = module.__dict__["_flat_weights"]
                    module.__dict__["_flat_weights"] = [t if t is None else tensors.get(id(t), t) for t in listed]
                    module.__dict__["flatten_parameters"] = do_nothing  # it moves the memory of real weights
            for (name, attribute), value in (attributes or {}).items():
                modules[name].__dict__[attribute] = value
            if self.fake:
                with self.mode, observer:
                    return call()
            with observer:
                return call()

    @contextmanager
    def _restored(self, rewritten: Mapping[str, Sequence[str]]) -> Iterator[dict[str, nn.Module]]:
        """Put back every module's attributes and their containers, note which changed, and restore all RNG."""
        named = dict(self.model.named_modules())
        scripted = [m for m in named.values() if isinstance(m, torch.jit.ScriptModule)]
        flags = [m.training for m in scripted]
        buffers = [(b, b.detach().clone()) for m in scripted for b in m.buffers(recurse=False)]
        snapshots = [Snapshot(n, m) for n, m in named.items() if not isinstance(m, torch.jit.ScriptModule)]
        generators = [*global_generators(), *own_generators(v for s in snapshots for v in s.objects)]
        try:
            for generator in generators:
                generator.seed(0)  # of every run: a model that skips blocks at random skips the same ones
            yield named
        finally:
            for generator in generators:
                generator.restore()
            for module, flag in zip(scripted, flags, strict=True):
                module.training = flag
            for buffer, values in buffers:
                buffer.detach().copy_(values)
            changed = [s for s in snapshots if s.put_back(rewritten.get(s.name, ()), self._note_change)]
            for snapshot in changed:
                snapshot.refill()

    def _note_change(self, name: str, changed: Mapping[str, Any]) -> None:
        """Remember what was in attributes that a run changed: they are lazy caches."""
        for key, value in changed.items():
            self.caches.setdefault((name, key), value)


@contextmanager
def _quiet() -> Iterator[None]:
    """No fused fast paths or compiled code, which hide the structure; no log of the errors that are provoked."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    fast = torch.backends.mha.get_fastpath_enabled()
    disabled, log.disabled = log.disabled, True
    torch.backends.mha.set_fastpath_enabled(False)
    # code that was compiled needs this module, so without it nothing is; to import it takes seconds
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with eager:
            yield
    finally:
        log.disabled = disabled
        torch.backends.mha.set_fastpath_enabled(fast)
