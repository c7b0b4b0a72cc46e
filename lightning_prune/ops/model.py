"""Dynamic ops of a whole model: find them, make them, take them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_prune.errors import ConfigError
from lightning_prune.ops import activation, attention, conv, embedding, linear, norm, recurrent
from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.generic import DynamicParametrizationList, GenericDynamic
from lightning_prune.ops.made import is_made
from lightning_prune.ops.present import is_left_alone
from lightning_prune.ops.slicing import Cut, same_cuts

__all__ = ["OPS", "convert_", "dynamic_ops", "static_view", "tensor_cuts", "to_static_"]

OPS: dict[type[nn.Module], type[DynamicOp]] = {
    op.static_op: op
    for op in (
        conv.DynamicConv1d,
        conv.DynamicConv2d,
        conv.DynamicConv3d,
        conv.DynamicConvTranspose1d,
        conv.DynamicConvTranspose2d,
        conv.DynamicConvTranspose3d,
        linear.DynamicLinear,
        linear.DynamicBilinear,
        norm.DynamicBatchNorm1d,
        norm.DynamicBatchNorm2d,
        norm.DynamicBatchNorm3d,
        norm.DynamicSyncBatchNorm,
        norm.DynamicLayerNorm,
        norm.DynamicGroupNorm,
        norm.DynamicInstanceNorm1d,
        norm.DynamicInstanceNorm2d,
        norm.DynamicInstanceNorm3d,
        norm.DynamicRMSNorm,
        embedding.DynamicEmbedding,
        activation.DynamicPReLU,
        attention.DynamicMultiheadAttention,
        recurrent.DynamicRNN,
        recurrent.DynamicLSTM,
        recurrent.DynamicGRU,
        recurrent.DynamicRNNCell,
        recurrent.DynamicLSTMCell,
        recurrent.DynamicGRUCell,
    )
}
"""Layer -> its dynamic op. Subclasses of a layer use the same op."""


def convert_(
    module: nn.Module, ops: Mapping[type[nn.Module], type[DynamicOp]] | None = None, generic: bool = False
) -> nn.Module:
    """Turn one module into its dynamic op, in place; its children are not touched.

    Left as they are: scripted modules, and lazy modules before their first input. A layer whose weight somebody else
    makes (parametrisations, hooks of weight norm, spectral norm and pruning) is like a module without an op of its own.

    Args:
        module: Any module.
        ops: More ops, or others, by layer; they come before the library's own.
        generic: Whether a module without an op of its own becomes a `GenericDynamic`; else it stays as it is.

    Returns:
        The same object.

    Example:
        >>> type(convert_(nn.Linear(2, 2))).__name__, type(convert_(nn.ReLU())).__name__
        ('DynamicLinear', 'ReLU')
    """
    if isinstance(module, DynamicOp) or is_left_alone(module):
        return module
    extra = ops or {}
    for cls in type(module).__mro__:
        op = extra.get(cls) or OPS.get(cls)
        if op is not None and not is_made(module, op):
            return op.convert_from(module)
    op = DynamicParametrizationList if isinstance(module, ParametrizationList) else GenericDynamic
    return op.convert_from(module) if generic else module


def dynamic_ops(model: nn.Module) -> dict[str, DynamicOp]:
    """Return the dynamic ops of a model by qualified name; the root is ``""``, a shared module has its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DynamicOp)}


def tensor_cuts(model: nn.Module) -> dict[int, tuple[Tensor, tuple[Cut, ...]]]:
    """Return ``id -> (tensor, cuts)`` of every parameter and buffer that loses entries.

    Raises:
        ConfigError: Two modules share a tensor and want to keep different entries of it.
    """
    found: dict[int, tuple[Tensor, tuple[Cut, ...], str]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            cuts = module._dynamic.cuts(module, name) if isinstance(module, DynamicOp) else ()
            where = f"{prefix}.{name}" if prefix else name
            first = found.setdefault(id(tensor), (tensor, cuts, where))
            if not same_cuts(first[1], cuts):
                raise ConfigError(
                    f"Got one tensor shared by {first[2]!r} and {where!r} that keep different entries; expected the "
                    "same masks on both. Register the same mutables on the axes of every module that shares it."
                )
    return {key: (tensor, cuts) for key, (tensor, cuts, _) in found.items() if cuts}


def to_static_(model: nn.Module) -> nn.Module:
    """Turn every dynamic op of a model into a plain smaller layer, in place.

    Args:
        model: Any model; without dynamic ops nothing happens.

    Returns:
        The same object.

    Raises:
        ConfigError: Masks that no plain layer can have, or that differ between modules that share a tensor. The model
            is as it was.
    """
    ops = dynamic_ops(model)
    tensor_cuts(model)
    for name, op in ops.items():
        try:
            _ = op.integers
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    for op in ops.values():
        op.to_static()
    return model


@contextmanager
def static_view(model: nn.Module) -> Iterator[nn.Module]:
    """Show the dense model for a while: every dynamic op has its original class, tensors and integers.

    Args:
        model: Any model.

    Yields:
        The same object.
    """
    swapped: list[tuple[DynamicOp, type[DynamicOp]]] = []
    try:
        for op in dynamic_ops(model).values():
            op._dynamic.collect_all()
            swapped.append((op, type(op)))
            op.__class__ = op._dynamic.static  # type: ignore[assignment]
        yield model
    finally:
        for op, dynamic in swapped:
            op.__class__ = dynamic
