"""Classes made at run time: a dynamic op for a subclass of a known layer, or with more presented attributes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_prune.ops.present import holding_buffers, presented_integer, presented_tensor

__all__ = ["dynamic_class", "new_instance"]


_MADE: dict[tuple[Any, ...], type[Any]] = {}


def dynamic_class(
    op: type[Any],
    static: type[nn.Module],
    tensors: frozenset[str] = frozenset(),
    integers: frozenset[str] = frozenset(),
    holds: bool = False,
) -> type[Any]:
    """Return the subclass of `op` and `static` that presents some attributes more.

    Args:
        op: A dynamic op class.
        static: The class of the module before conversion.
        tensors: Parameters and buffers to present beyond those of `op`.
        integers: Integer attributes to present beyond those of `op`.
        holds: Whether a presented buffer may change during forward.

    Returns:
        Always the same class for the same arguments; `op` itself when it needs nothing more.

    Example:
        >>> from lightning_prune.ops import DynamicLinear
        >>> class Readout(nn.Linear):
        ...     pass
        >>> [cls.__name__ for cls in dynamic_class(DynamicLinear, Readout).__mro__[:4]]
        ['DynamicReadout', 'DynamicLinear', 'DynamicOp', 'Readout']
    """
    if static is op.static_op and not (tensors or integers or holds):
        return op
    recipe = (op, static, tensors, integers, holds)
    found = _MADE.get(recipe)
    if found is None:
        found = _MADE[recipe] = _make_class(*recipe)
    return found


def _make_class(
    op: type[Any], static: type[nn.Module], tensors: frozenset[str], integers: frozenset[str], holds: bool
) -> type[Any]:
    """Make the class that `dynamic_class` returns."""
    bases = (op,) if static is op.static_op else (op, static)
    name = op.__name__ if static is op.static_op else f"Dynamic{static.__name__}"
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"Dynamic form of {static.__module__}.{static.__qualname__}.",
        "_recipe": (op, static, tensors, integers, holds),
    }
    if hasattr(static, "__deepcopy__"):
        body["__deepcopy__"] = _collecting(static.__deepcopy__)
    body.update({attr: presented_tensor(attr) for attr in tensors})
    body.update({attr: presented_integer(attr) for attr in integers})
    made: Any = types.new_class(name, bases, exec_body=lambda namespace: namespace.update(body))
    if holds:
        made.forward = holding_buffers(made.forward)
    made_class: type[Any] = made
    return made_class


def _collecting(deepcopy: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `__deepcopy__` before which lent buffers are written back, as before every other copy."""

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        self._dynamic.collect_all()
        return deepcopy(self, memo)

    return copied


def new_instance(*recipe: Any) -> Any:
    """Return an empty instance of `dynamic_class(*recipe)`: how pickles and copies find the class again."""
    made: Any = dynamic_class(*recipe)
    return made.__new__(made)
