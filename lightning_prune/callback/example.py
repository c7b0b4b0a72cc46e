"""What the model is traced with: an example input, given, or found in the data that `fit` will see."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.errors import ConfigError, TraceError
from lightning_prune.graph.sandbox import Sandbox
from lightning_prune.mutator import ChannelMutator

__all__ = ["find_example", "find_root", "nothing_to_prune", "raise_with_hint"]

MEND = "Give PruningCallback(example_input=...), or set example_input_array on the module."
EXAMPLES = 2  # batch statistics need two values per channel


def find_root(pl_module: LightningModule, submodule: str | None) -> nn.Module:
    """Return the module that is traced and pruned.

    Args:
        pl_module: The module of the Trainer.
        submodule: Dotted name of a part of it; None is all of it.

    Raises:
        ConfigError: No such part.
    """
    if submodule is None:
        return pl_module
    try:
        return pl_module.get_submodule(submodule)
    except AttributeError as error:
        children = ", ".join(repr(name) for name, _ in pl_module.named_children())
        raise ConfigError(
            f"Got submodule={submodule!r}, which {type(pl_module).__name__} does not have: {error}. Its children: "
            f"{children}."
        ) from error


def find_example(trainer: Trainer, pl_module: LightningModule, root: nn.Module, example_input: Any) -> Any:
    """Return the input that `root` is traced with.

    In this order: `example_input`; `example_input_array` of the module; a batch of two items of the training set. For
    a part of the module it is what the part receives while the module's `forward` runs on that.

    Args:
        trainer: Knows the training data.
        pl_module: Its module.
        root: `pl_module` or a part of it.
        example_input: What the user gave for `root`, or None.

    Returns:
        A tensor, a tuple (positional) or a mapping (keywords).

    Raises:
        ConfigError: There is no usable `forward`, no example, or the batch does not fit `forward`.
    """
    has_forward = is_overridden("forward", pl_module)
    if example_input is not None:
        if root is pl_module and not has_forward:
            raise _no_forward(pl_module)
        return example_input
    if not has_forward:
        raise _no_forward(pl_module)
    example = pl_module.example_input_array
    if example is None:
        example = forward_input(pl_module.forward, _batch(trainer, pl_module))
    return example if root is pl_module else _caught_input(pl_module, root, example)


def nothing_to_prune(mutator: ChannelMutator) -> ConfigError:
    """Return the error for a model without a unit, with the first reasons."""
    reasons = list(dict.fromkeys(frozen.reason for frozen in mutator.graph.frozen))[:3]
    why = f" What froze its channels: {'; '.join(reasons)}." if reasons else ""
    return ConfigError(
        f"Got a {type(mutator.model).__name__} with nothing to prune: no channel between two of its layers is free."
        f"{why} Ignore fewer layers, or prune a model with hidden channels."
    )


def raise_with_hint(error: Exception, pl_module: LightningModule, example: Any) -> None:
    """Raise an error of `setup` again with what may be behind it; return where nothing is known.

    Args:
        error: Raised while the module was traced.
        pl_module: The module.
        example: What it was traced with.

    Raises:
        ConfigError: Layers are made in the module's own `setup`, perhaps.
        TraceError: The example does not fit, perhaps.
    """
    text = str(error)
    if isinstance(error, TraceError):
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
        text = (
            f"Got a failure while {type(pl_module).__name__} was traced with tensors of shapes {shapes}: {text}. {MEND}"
        )
    if isinstance(error, ConfigError | TraceError) and is_overridden("setup", pl_module):
        raise ConfigError(
            f"{text} {type(pl_module).__name__}.setup has not run yet: make layers in __init__ or in configure_model, "
            "not in setup."
        ) from error
    if isinstance(error, TraceError):
        raise TraceError(text) from error


def _no_forward(pl_module: LightningModule) -> ConfigError:
    return ConfigError(
        f"Got {type(pl_module).__name__} without a forward method, so nothing can be traced. Add one, or name "
        "the part to prune and its input: PruningCallback(submodule='net', example_input=torch.randn(2, 3, 32, 32))."
    )


def forward_input(forward: Callable[..., Any], batch: Any) -> Any:
    """Return what of a batch `forward` takes.

    Args:
        forward: Its signature decides.
        batch: A tensor is passed as it is; of a tuple or list the leading items that `forward` requires; of a mapping
            the entries that have a name of its parameters; anything else as it is.

    Returns:
        A tuple (positional) or a mapping (keywords).

    Raises:
        ConfigError: The batch has too few items, or a required entry is missing.

    Example:
        >>> forward_input(lambda x, mask=None: x, ("image", "label"))
        ('image',)
        >>> forward_input(lambda ids, mask: ids, {"ids": 1, "mask": 2, "labels": 3})
        {'ids': 1, 'mask': 2}
    """
    parameters = list(inspect.signature(forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in positional if p.default is p.empty]
    if isinstance(batch, Mapping):
        return _named_input(parameters, required, batch)
    if not isinstance(batch, tuple | list):
        return (batch,)
    if len(batch) < len(required):
        raise ConfigError(
            f"Got a training batch of {len(batch)} items; forward requires {len(required)}: {', '.join(required)}. "
            f"{MEND}"
        )
    return tuple(batch[: max(len(required), 1)])


def _named_input(parameters: Sequence[inspect.Parameter], required: Sequence[str], batch: Mapping[Any, Any]) -> Any:
    """Return the entries of a mapping that have the name of a parameter; or the mapping, if it is the one argument."""
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    found = {name: batch[name] for name in names if name in batch}
    missing = [name for name in required if name not in found]
    if not found and len(required) <= 1 and names:
        return (batch,)
    if missing:
        raise ConfigError(
            f"Got a training batch with keys {sorted(map(str, batch))}; forward requires {', '.join(missing)} too. "
            f"{MEND}"
        )
    return found


def _batch(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Return a small training batch as `forward` would see it, on the CPU; random numbers are as if never drawn."""
    with isolate_rng():
        try:
            batch = tree_map(_batch_of, trainer.fit_loop._data_source.dataloader())
            for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
                source = pl_module if is_overridden(hook, pl_module) else trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
                if source is not None and is_overridden(hook, source):
                    batch = getattr(source, hook)(batch, 0)
        except Exception as error:  # of the user's data
            late = " Data that LightningModule.setup makes does not exist yet." if _sets_up(pl_module) else ""
            raise ConfigError(
                f"Got {type(error).__name__} while making an example batch of the training data: {error}.{late} {MEND}"
            ) from error
    return batch


def _sets_up(pl_module: LightningModule) -> bool:
    return is_overridden("setup", pl_module)


def _batch_of(loader: Any) -> Any:
    """Return a batch of two items of one loader; a loader over a stream, or of another kind, gives its first batch."""
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return _first_of(loader)
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[0])
    return loader.collate_fn([dataset[index % len(dataset)] for index in range(EXAMPLES)])


def _first_of(loader: Any) -> Any:
    """Return the first batch; a loader that knows how far it is stands where it stood."""
    state = copy.deepcopy(loader.state_dict()) if isinstance(loader, _Stateful) else None
    batch = next(iter(loader))
    if isinstance(loader, _Stateful):
        loader.load_state_dict(state or {})
    return batch


class _Caught(Exception):  # noqa: N818  # ends a forward early, and carries what was caught; no error
    pass


def _caught_input(pl_module: LightningModule, root: nn.Module, example: Any) -> Any:
    """Return what `root` receives while the whole module runs on an example; nothing of the run remains."""
    caught: tuple[Any, ...] = ()

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Caught(args, kwargs)  # the sandbox empties any list that a hook fills

    args, kwargs = _split(example)
    handle = root.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        Sandbox(pl_module, fake=False).run({}, lambda: pl_module(*args, **kwargs), nullcontext(), train=False)
    except _Caught as found:
        caught = found.args
    except Exception as error:  # of the user's forward
        raise TraceError(f"Got {type(error).__name__} while forward ran on the example input: {error}") from error
    finally:
        handle.remove()
    if not caught:
        raise ConfigError(
            f"Got a submodule of type {type(root).__name__} that {type(pl_module).__name__}.forward does not call. "
            "Give its own input: PruningCallback(submodule=..., example_input=...)."
        )
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, caught)
    if not kwargs:
        return args
    if args:  # a mapping can hold both once the positional ones have names
        bound = inspect.signature(root.forward).bind(*args, **kwargs)
        kwargs = dict(bound.arguments)
    return kwargs


def _split(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})
