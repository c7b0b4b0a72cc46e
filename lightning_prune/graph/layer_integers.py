"""The integers of torch's own layers: which axis each follows is known, and need not be learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.graph.channel_graph import Follower
from lightning_prune.graph.holders import Element
from lightning_prune.graph.labels import Axis, LabelSpace, is_labelled
from lightning_prune.graph.made import weight_of
from lightning_prune.graph.trace import DenseTrace

__all__ = ["known_followers"]

_NAMES = {  # of torch's plain layers: int -> axis of the weight
    "out_features": 0,
    "in_features": 1,
    "num_features": 0,
    "embedding_dim": 1,
    "num_parameters": 0,
}
_PLAIN = (nn.Linear, _NormBase, nn.Embedding, nn.EmbeddingBag, nn.PReLU)


def known_followers(trace: DenseTrace) -> list[Follower]:
    """Return the integers of torch's own layers: those their forward uses, and those only a stranger reads."""
    found = []
    model = trace.sandbox.model
    first = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    for name, module in model.named_modules():
        owner = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
        own = {n: trace.axes.get(first.get(id(p), ""), ()) for n, p in dict(owner._parameters).items()}
        axes = trace.axes.get(first.get(id(weight_of(owner)), ""), ())
        for attribute, element, axis in (
            *_recurrent(module, own),
            *(_table(trace.space, module, axes) if axes else ()),
        ):
            value = module.__dict__.get(attribute)
            if is_labelled(axis) and (value if element is None else value[element]) == len(axis):
                found.append(Follower(name, attribute, element, axis))
    return found


def _table(space: LabelSpace, module: nn.Module, axes: Sequence[Axis]) -> Iterator[tuple[str, Element, Axis]]:
    """Yield `(attribute, element, axis)`; of multi-head attention the axes are those of its output projection."""
    if isinstance(module, nn.MultiheadAttention):
        heads, head_dim = space.split(axes[1], (module.num_heads, module.head_dim))
        yield from (("num_heads", None, heads), ("head_dim", None, head_dim))
    elif isinstance(module, _ConvNd):
        yield from _of_convolution(space, module, axes)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        yield from (("normalized_shape", k, axis) for k, axis in enumerate(axes))
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", None, axes[0]
        if module.num_groups == module.num_channels:
            yield "num_groups", None, axes[0]
    elif isinstance(module, _PLAIN):
        yield from ((attribute, None, axes[d]) for attribute, d in _NAMES.items() if attribute in module.__dict__)


def _of_convolution(space: LabelSpace, module: _ConvNd, axes: Sequence[Axis]) -> Iterator[tuple[str, Element, Axis]]:
    whole, part = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
    yield whole, None, axes[0]
    if module.groups == 1:
        yield part, None, axes[1]
        return
    groups = space.split(axes[0], (module.groups, len(axes[0]) // module.groups))[0]
    yield "groups", None, groups
    inner = [axis for axis in (groups, axes[1]) if is_labelled(axis)]
    if inner:
        yield part, None, space.merge(inner)


def _recurrent(module: nn.Module, axes: Mapping[str, Sequence[Axis]]) -> Iterator[tuple[str, Element, Axis]]:
    """Yield the sizes of a recurrent layer or cell, from the axes of its first weights."""
    suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
    ih, hh, hr = (axes.get(f"weight_{kind}{suffix}") for kind in ("ih", "hh", "hr"))
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and ih and hh:
        yield "input_size", None, ih[1]
        yield "proj_size" if hr else "hidden_size", None, hh[1]
        if hr:
            yield "hidden_size", None, hr[1]
