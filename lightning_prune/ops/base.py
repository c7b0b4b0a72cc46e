"""What every dynamic op can do: convert from a layer, run on its kept channels, and become a plain layer again."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.errors import ConfigError, did_you_mean
from lightning_prune.mutables import KeptIndices, MutableChannelContainer
from lightning_prune.ops.factory import dynamic_class, new_instance
from lightning_prune.ops.present import Presented, write_integer, write_tensor
from lightning_prune.ops.slicing import shrink_
from lightning_prune.ops.state import DynamicState, integer_with, read_from

__all__ = ["DynamicOp"]

_PLAIN: tuple[frozenset[str], frozenset[str], bool] = (frozenset(), frozenset(), False)


class DynamicOp(nn.Module):
    """A layer that runs with a mutable number of channels, and turns itself into a plain smaller layer.

    Conversion swaps the class of the same module object. Parameters and buffers keep their identity, their dense size
    and their state-dict keys; reading ``weight``, ``groups``, ``running_mean`` and so on gives the kept slice and the
    live number, to the inherited forward and to anybody else. Nothing cut: the very same tensor object, no copy.

    A subclass names its layer in `static_op`, presents attributes with `presented_tensor` and `presented_integer`, and
    fills in the axes of its tensors in `_describe`. It is listed before the layer among the bases.
    """

    static_op: ClassVar[type[nn.Module]]
    """The layer that the class is for; subclasses of it are converted too."""
    aliases: ClassVar[dict[str, str]] = {}
    """Other names for `get_mutable_attr`, such as in_channels for num_features."""
    _recipe: ClassVar[tuple[Any, ...]] = ()
    _dynamic: DynamicState

    # Conversion

    @classmethod
    def convert_from(cls, module: nn.Module) -> DynamicOp:
        """Turn `module` into a dynamic op, in place; outputs do not change by a bit.

        Args:
            module: An instance of `static_op` or of a subclass of it. A dynamic op is returned as it is.

        Returns:
            The same object.

        Raises:
            ConfigError: `module` is no instance of `static_op`, or defines a name that dynamic ops use.
        """
        if isinstance(module, DynamicOp):
            return module
        if not isinstance(module, cls.static_op):
            raise ConfigError(
                f"Got {type(module).__name__} for {cls.__name__}.convert_from; expected {cls.static_op.__name__}. "
                "lightning_prune.ops.convert_ finds the op of a module."
            )
        taken = sorted(_API & _names_of(module))
        if taken:
            raise ConfigError(
                f"Got {type(module).__name__}, which defines {', '.join(taken)}; dynamic ops need that name. Rename it."
            )
        static = type(module)
        module.__dict__["_dynamic"] = DynamicState(static)
        module.__class__ = dynamic_class(cls, static)
        assert isinstance(module, cls), "the class was just swapped"
        module._describe()
        return module

    def _describe(self) -> None:
        """Add the containers, tensor axes and followed integers of a layer that was just converted."""
        raise NotImplementedError(f"{type(self).__name__} does not say which axes its tensors have")

    def _add_axis(self, attr: str, size: int, *, follow: bool = True) -> MutableChannelContainer:
        """Add the container `attr` of `size` positions; the integer of the same name reads its count."""
        container = self._dynamic.containers[attr] = MutableChannelContainer(size)
        if follow:
            self._dynamic.follows[attr] = {None: container}
        return container

    def _add_axes(self, **axes: tuple[str | None, ...]) -> None:
        """Say which container each axis of the tensors has; tensors the layer does not have are skipped."""
        present = {**self._parameters, **self._buffers}
        self._dynamic.axes.update({name: attrs for name, attrs in axes.items() if present.get(name) is not None})

    def to_static(self) -> nn.Module:
        """Become a plain, smaller layer of the original class, in place.

        Every Parameter stays the same object and shrinks; integers take their live value.

        Returns:
            The same object.
        """
        state = self._dynamic
        state.collect_all()
        integers = self.integers
        cuts = {name: state.cuts(self, name) for name in state.axes}
        for name, axes in cuts.items():
            for tensor in (self._parameters.get(name), self._buffers.get(name)):
                if tensor is not None:
                    shrink_(tensor, axes)
        self.__class__ = state.static  # type: ignore[assignment]
        del self.__dict__["_dynamic"]
        self.__dict__.update(integers)
        return self

    # What is mutable

    @property
    def static_type(self) -> type[nn.Module]:
        """The class of the module before conversion."""
        return self._dynamic.static

    @property
    def mutable_attrs(self) -> dict[str, MutableChannelContainer]:
        """Attribute name -> mask of that axis."""
        return dict(self._dynamic.containers)

    def get_mutable_attr(self, attr: str) -> MutableChannelContainer:
        """Return the mask of one axis.

        Args:
            attr: A key of `mutable_attrs`, or ``in_channels`` / ``out_channels`` where the layer has such a side.

        Raises:
            ConfigError: The layer has no such axis.
        """
        found = self._dynamic.containers.get(self.aliases.get(attr, attr))
        if found is None:
            usable = (alias for alias, name in self.aliases.items() if name in self._dynamic.containers)
            valid = dict.fromkeys([*self._dynamic.containers, *usable])
            raise ConfigError(f"Got attribute {attr!r} of {type(self).__name__}. {did_you_mean(attr, valid)}")
        return found

    @property
    def tensor_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Tensor name -> attribute name of each of its axes; None where the axis has no mask."""
        return dict(self._dynamic.axes)

    def axis_container(self, tensor: str, dim: int) -> MutableChannelContainer:
        """Return the mask of one axis of one tensor; made now if the axis has none yet.

        Args:
            tensor: Name of a parameter or buffer of this module.
            dim: Axis of it; negative counts from the end.

        Raises:
            ConfigError: No such tensor or axis; or the axis follows from others, as in a grouped convolution.
        """
        state = self._dynamic
        present = {**self._parameters, **self._buffers}
        full = present.get(tensor)
        where = f"{type(self).__name__}.{tensor}"
        if full is None:
            valid = [name for name, value in present.items() if value is not None]
            raise ConfigError(f"Got tensor {tensor!r} of {type(self).__name__}. {did_you_mean(tensor, valid)}")
        if not -full.dim() <= dim < full.dim():
            raise ConfigError(f"Got axis {dim} of {where}; expected one of {full.dim()} axes.")
        axes = list(state.axes.get(tensor, (None,) * full.dim()))
        dim %= full.dim()
        attr = axes[dim]
        if attr is None:
            attr = axes[dim] = f"{tensor}.{dim}"
            state.containers[attr] = MutableChannelContainer(full.shape[dim])
            state.axes[tensor] = tuple(axes)
            self._present(tensors={tensor}, holds=tensor in self._buffers)
        elif attr not in state.containers:
            raise ConfigError(
                f"Got axis {dim} of {where}, which follows from the masks of the channels; expected one of "
                f"{', '.join(state.containers)}. Register on those."
            )
        return state.containers[attr]

    def follow_integer(self, attr: str, container: MutableChannelContainer, element: int | str | None = None) -> None:
        """Let an integer attribute read the kept count of `container` from now on.

        Args:
            attr: Name of an int, or of a tuple, list, dict or config object that holds it.
            container: Its `num_channels` is the dense value.
            element: Position, key or attribute in that; None for an int.

        Raises:
            ConfigError: No such attribute or element, or its dense value is not the length of the container.
        """
        state = self._dynamic
        dense = state.dense_integer(self, attr)
        where = f"{type(self).__name__}.{attr}" + ("" if element is None else f"[{element}]")
        if element is not None:
            held = read_from(dense, element)
            if held is None:
                raise ConfigError(f"Got {where} to follow, of {dense!r}; expected an element of it.")
            element = element % len(dense) if isinstance(element, int) else element
            dense = held
        if isinstance(dense, bool) or not isinstance(dense, Integral) or dense != container.num_channels:
            raise ConfigError(
                f"Got {where} = {dense!r} to follow; expected the dense {container.num_channels} channels."
            )
        state.follows.setdefault(attr, {})[element] = container
        self._present(integers={attr})

    def follower(self, attr: str, element: int | str | None = None) -> MutableChannelContainer | None:
        """Return the mask whose kept count an integer reads; None where it reads none, or works out its own.

        Args:
            attr: Name of an int, or of what holds it.
            element: Position, key or attribute in that; None for an int.
        """
        return self._dynamic.follows.get(attr, {}).get(element)

    def _present(
        self, *, tensors: set[str] | None = None, integers: set[str] | None = None, holds: bool = False
    ) -> None:
        """Move to a class that presents these attributes as well; drop what was derived from the masks."""
        self._dynamic.collect_all()
        self._dynamic.forget()
        cls = type(self)
        op, static, old_tensors, old_integers, old_holds = cls._recipe or (cls, cls.static_op, *_PLAIN)
        new = {name for name in (tensors or set()) if not isinstance(getattr(cls, name, None), Presented)}
        counts = {name for name in (integers or set()) if not isinstance(getattr(cls, name, None), Presented)}
        holds = holds and bool(new)
        self.__class__ = dynamic_class(op, static, old_tensors | new, old_integers | counts, old_holds or holds)

    @property
    def integers(self) -> dict[str, Any]:
        """Integer attribute -> its live value."""
        return {name: self._dynamic.integer(self, name) for name in self._integer_names()}

    def kept_indices_of(self, tensor: str) -> tuple[Tensor | None, ...]:
        """Return the kept indices of each axis of a tensor: Int64 ascending on the CPU; None where nothing is cut.

        Args:
            tensor: Name of a parameter or buffer of this module.
        """
        by_dim = dict(self._dynamic.cuts(self, tensor))
        axes = self._dynamic.axes.get(tensor, ())
        return tuple(by_dim[dim].indices if dim in by_dim else None for dim in range(len(axes)))

    # For subclasses whose numbers follow from the masks in another way

    def _axis_kept(self, attr: str) -> KeptIndices | None:
        """Return what remains of the axis `attr`; None when nothing is cut."""
        return self._dynamic.containers[attr].kept_indices()

    def _integer_names(self) -> list[str]:
        """Name the integers that may differ from the dense ones."""
        return list(self._dynamic.follows)

    def _live_integer(self, name: str) -> Any:
        """Compute one integer from the masks."""
        dense = self._dynamic.dense_integer(self, name)
        parts = self._dynamic.follows.get(name)
        return integer_with(dense, parts, f"{type(self).__name__}.{name}") if parts else dense

    # What torch and Python call

    def __setattr__(self, name: str, value: Any) -> None:
        presented = getattr(type(self), name, None)
        if not isinstance(presented, Presented):
            super().__setattr__(name, value)
        elif not presented.is_tensor:
            write_integer(self, name, value)
        elif not write_tensor(self, name, value):
            if name in self._parameters or name in self._buffers or isinstance(value, nn.Parameter):
                super().__setattr__(name, value)
            else:  # a replica of nn.DataParallel holds its parameters as plain attributes
                self.__dict__[name] = value

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dynamic.collect_all()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._dynamic.collect_all()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call] # torch does not annotate it

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._dynamic.collect_all()
        reduced = super().__reduce_ex__(protocol)
        recipe = type(self)._recipe
        if not recipe or not isinstance(reduced, tuple):
            return reduced
        return (new_instance, recipe, *reduced[2:])

    def extra_repr(self) -> str:
        """Return what the static class prints, with live numbers."""
        static = self._dynamic.static
        twin = static.__new__(static)
        twin.__dict__.update(self.__dict__, **self.integers)
        return twin.extra_repr()

    def __repr__(self) -> str:
        extra = self.extra_repr()
        lines = extra.split("\n") if extra else []
        children = [f"({name}): {_indented(repr(child))}" for name, child in self._modules.items()]
        axes = [f"({name}): {container!r}" for name, container in self._dynamic.containers.items()]
        attrs = "(mutable_attrs): ModuleDict(" + ("\n    " + "\n    ".join(axes) + "\n  " if axes else "") + ")"
        body = "\n  ".join([*lines, *children, attrs])
        return f"{type(self).__name__}(\n  {body}\n)"


_API = frozenset(name for name in vars(DynamicOp) if not name.startswith("__") and not hasattr(nn.Module, name))


def _names_of(module: nn.Module) -> set[str]:
    """Return which names of dynamic ops a module has; torch looks long for each that it does not have."""
    if type(module).__getattr__ is not nn.Module.__getattr__:  # it may answer to any name
        return {name for name in _API if hasattr(module, name)}
    own = {*module.__dict__, *module._parameters, *module._buffers, *module._modules}
    return own | {name for name in _API if hasattr(type(module), name)}


def _indented(text: str) -> str:
    """Indent every line but the first by two, as torch prints children."""
    return text.replace("\n", "\n  ")
