"""Channel masks: a ``MutableChannel`` owns one, a ``MutableChannelContainer`` tiles one axis from several.

Both are plain Python objects, neither modules nor buffers: what averages, casts or saves a model never touches a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_prune.errors import ConfigError

__all__ = ["KeptIndices", "MaskChanges", "MutableChannel", "MutableChannelContainer", "Span"]


class MaskChanges:
    """Says whether any mask of the process has changed, at the price of one comparison.

    What is derived from masks remembers `latest` and is good as long as that is still the same object; afterwards the
    versions of its own masks tell. It is an object, not a number: nothing can count past it or meet it again.
    """

    latest: ClassVar[object] = object()

    @classmethod
    def note(cls) -> None:
        """Say that a mask has changed; to be called after the change."""
        cls.latest = object()


def _check_count(num_channels: object, name: str) -> int:
    """Return `num_channels` if it is a whole number of at least 1."""
    if not isinstance(num_channels, int) or isinstance(num_channels, bool) or num_channels < 1:
        raise ConfigError(f"Got num_channels={num_channels!r} for {name!r}; expected a whole number of at least 1.")
    return num_channels


class KeptIndices:
    """The ascending positions that remain of one axis, with one copy for each device that asked.

    Args:
        mask: Bool `[full]` on the CPU, True = keep; at least one True.
    """

    __slots__ = ("_on_device", "count", "full", "indices", "start")

    def __init__(self, mask: Tensor) -> None:
        # An index made under inference_mode could not be saved for a later backward.
        with torch.inference_mode(False):
            self.indices = mask.nonzero().flatten()
        self.full = mask.numel()
        self.count = self.indices.numel()
        first, last = int(self.indices[0]), int(self.indices[-1])
        self.start: int | None = first if last - first + 1 == self.count else None
        """First position when the kept ones are a gapless range, else None."""
        self._on_device: dict[torch.device, Tensor] = {self.indices.device: self.indices}

    def on(self, device: torch.device) -> Tensor:
        """Return the positions as Int64 `[count]` on `device`; copied there once."""
        found = self._on_device.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = self._on_device[device] = self.indices.to(device)
        return found

    def __repr__(self) -> str:
        return f"KeptIndices({self.count} of {self.full})"


class MutableChannel:
    """One boolean mask over the C channels of a unit.

    Args:
        num_channels: C, at least 1.
        name: For messages and `repr`.

    Raises:
        ConfigError: `num_channels` is not a whole number of at least 1.

    Example:
        >>> channel = MutableChannel(4, name="conv1")
        >>> channel.current_choice = torch.tensor([True, False, True, False])
        >>> channel
        MutableChannel(name=conv1, num_channels=4, activated_channels: 2)
    """

    def __init__(self, num_channels: int, name: str = "") -> None:
        self.name = name
        self.num_channels = _check_count(num_channels, name)
        self._mask = torch.ones(num_channels, dtype=torch.bool)
        self._version = 0
        self._is_whole = True  # kept beside the mask: code that is compiled may not look into a tensor
        self._cache: tuple[int, KeptIndices | None] | None = None

    @property
    def current_mask(self) -> Tensor:
        """Bool `[C]` on the CPU, True = keep. Read only: write through `current_choice`."""
        return self._mask

    @property
    def current_choice(self) -> Tensor:
        """The mask in force, bool `[C]`; assign another to change it.

        Raises:
            ConfigError: The assigned value is not a bool tensor `[C]` with at least one True.
        """
        return self._mask

    @current_choice.setter
    def current_choice(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (self.num_channels,):
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ConfigError(f"Got {got} as mask of {self.name!r}; expected a bool tensor [{self.num_channels}].")
        new = mask.detach().to("cpu", copy=True)
        if not bool(new.any()):
            raise ConfigError(f"Got a mask without a kept channel for {self.name!r}; at least one must remain.")
        if not torch.equal(new, self._mask):
            self._mask = new
            self._is_whole = bool(new.all())
            self._version += 1
            MaskChanges.note()

    @property
    def activated_channels(self) -> int:
        """How many channels remain, in [1, C]."""
        return int(self._mask.sum())

    @property
    def version(self) -> int:
        """Count of real changes of the mask so far; what is derived from the mask is stale when it moves."""
        return self._version

    def kept_indices(self) -> KeptIndices | None:
        """Return what remains, or None when nothing is cut; worked out once for all axes that it decides alone."""
        if self._cache is None or self._cache[0] != self._version:
            self._cache = (self._version, None if self._is_whole else KeptIndices(self._mask))
        return self._cache[1]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own indices: those of other devices must not travel.
        return {**self.__dict__, "_cache": None}

    def __repr__(self) -> str:
        return (
            f"MutableChannel(name={self.name}, num_channels={self.num_channels}, "
            f"activated_channels: {self.activated_channels})"
        )


@dataclass(frozen=True, eq=False)
class Span:
    """The positions `[start, end)` of an axis, driven by one mutable.

    Args:
        mutable: Owner of the mask.
        start: First position, inclusive.
        end: Last position, exclusive.
        index: Int64 `[end - start]`, position -> channel of the mutable; None is the identity.
    """

    mutable: MutableChannel
    start: int
    end: int
    index: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Bool `[end - start]`, True = keep."""
        mask = self.mutable.current_mask
        return mask if self.index is None else mask[self.index]


class MutableChannelContainer:
    """The mask of one axis of one layer, tiled from the mutables registered on spans of it.

    Positions that no span covers are always kept, so an axis that may not be pruned is a container without mutables.
    Several mutables on exactly the same span make a product axis: a position lives if its channel lives in all of them.

    Args:
        num_channels: Length of the axis, at least 1.
        name: For messages and `repr`.

    Raises:
        ConfigError: `num_channels` is not a whole number of at least 1.

    Example:
        A concat of two layers, the first pruned to its second channel:

        >>> left, right = MutableChannel(2), MutableChannel(3)
        >>> axis = MutableChannelContainer(5)
        >>> axis.register_mutable(left, 0, 2)
        >>> axis.register_mutable(right, 2, 5)
        >>> left.current_choice = torch.tensor([False, True])
        >>> axis.current_mask.int().tolist()
        [0, 1, 1, 1, 1]
        >>> axis
        MutableChannelContainer(name=, num_channels=5, activated_channels: 4)
    """

    def __init__(self, num_channels: int, name: str = "") -> None:
        self.name = name
        self.num_channels = _check_count(num_channels, name)
        self._spans: tuple[Span, ...] = ()
        self._mutables: tuple[MutableChannel, ...] = ()
        self._cache: tuple[int, KeptIndices | None] | None = None

    def register_mutable(self, mutable: MutableChannel, start: int, end: int, index: Tensor | None = None) -> None:
        """Let `mutable` decide the positions `[start, end)`.

        Args:
            mutable: Owner of the mask.
            start: First position, inclusive.
            end: Last position, exclusive.
            index: Int64 `[end - start]`, position -> channel of the mutable (repeat, interleave, product). None is the
                identity, and then the span is as long as the mutable.

        Raises:
            ConfigError: The span lies outside the axis, overlaps another one in part, or does not fit `index`.
        """
        where = f"span [{start}, {end}) of axis {self.name!r}"
        if not 0 <= start < end <= self.num_channels:
            raise ConfigError(f"Got {where}; expected 0 <= start < end <= {self.num_channels}.")
        for span in self._spans:
            if start < span.end and span.start < end and (start, end) != (span.start, span.end):
                raise ConfigError(
                    f"Got {where}, which overlaps [{span.start}, {span.end}) of {span.mutable.name!r} in part; "
                    "expected disjoint spans, or the same one."
                )
        if index is not None:
            index = _check_index(index, end - start, mutable.num_channels, where)
        elif end - start != mutable.num_channels:
            raise ConfigError(
                f"Got {where} for mutable {mutable.name!r} of {mutable.num_channels} channels; expected as many "
                "positions as channels, or an index that maps each position to a channel."
            )
        self._spans = (*self._spans, Span(mutable, start, end, index))
        if all(mutable is not other for other in self._mutables):
            self._mutables = (*self._mutables, mutable)
        MaskChanges.note()

    @property
    def spans(self) -> tuple[Span, ...]:
        """The registered spans, in order of registration."""
        return self._spans

    @property
    def version(self) -> int:
        """Grows whenever the mask of a registered mutable changes, and with every span."""
        version = len(self._spans)
        for mutable in self._mutables:
            version += mutable._version
        return version

    @property
    def current_mask(self) -> Tensor:
        """Bool `[num_channels]` on the CPU, True = keep. A new tensor."""
        mask = torch.ones(self.num_channels, dtype=torch.bool)
        for span in self._spans:
            mask[span.start : span.end] &= span.mask
        return mask

    @property
    def current_choice(self) -> Tensor:
        """The mask in force; read only, the choice belongs to the mutables."""
        return self.current_mask

    def kept_indices(self) -> KeptIndices | None:
        """Return what remains of the axis, or None when nothing is cut.

        Raises:
            ConfigError: Nothing remains.
        """
        if (
            len(self._spans) == 1
            and self._spans[0].index is None
            and self._mutables[0].num_channels == self.num_channels
        ):
            return self._mutables[0].kept_indices()
        version = self.version
        if self._cache is None or self._cache[0] != version:
            if all(mutable._is_whole for mutable in self._mutables):
                self._cache = (version, None)
                return None
            mask = self.current_mask
            if not bool(mask.any()):
                raise ConfigError(
                    f"Got no kept channel on axis {self.name!r} of {self.num_channels}; at least one must remain. "
                    f"Its mutables: {', '.join(repr(m.name) for m in self._mutables)}."
                )
            self._cache = (version, None if bool(mask.all()) else KeptIndices(mask))
        return self._cache[1]

    def kept(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return the kept positions, Int64 `[activated_channels]` ascending on `device`; None when nothing is cut."""
        kept = self.kept_indices()
        return None if kept is None else kept.on(torch.device(device))

    @property
    def is_cut(self) -> bool:
        """Whether a position is removed."""
        return self.kept_indices() is not None

    @property
    def activated_channels(self) -> int:
        """How many positions remain."""
        kept = self.kept_indices()
        return self.num_channels if kept is None else kept.count

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own indices: those of other devices must not travel.
        return {**self.__dict__, "_cache": None}

    def __repr__(self) -> str:
        return (
            f"MutableChannelContainer(name={self.name}, num_channels={self.num_channels}, "
            f"activated_channels: {self.activated_channels})"
        )


def _check_index(index: Tensor, length: int, num_channels: int, where: str) -> Tensor:
    """Return `index` on the CPU if it maps `length` positions into `[0, num_channels)`."""
    if not isinstance(index, Tensor) or index.dtype != torch.long or index.shape != (length,):
        got = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else repr(index)
        raise ConfigError(f"Got index {got} for {where}; expected an int64 tensor [{length}].")
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= num_channels:
        raise ConfigError(f"Got index in [{low}, {high}] for {where}; expected channels in [0, {num_channels}).")
    return index.detach().cpu()
