"""Recurrent layers and cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_prune.mutables import KeptIndices, MutableChannelContainer
from lightning_prune.ops.base import DynamicOp
from lightning_prune.ops.present import on_full, presented_integer, presented_tensor

__all__ = ["DynamicGRU", "DynamicGRUCell", "DynamicLSTM", "DynamicLSTMCell", "DynamicRNN", "DynamicRNNCell"]

_GATES = {"LSTM": 4, "GRU": 3}
_HELD = "_held_weights"


class _DynamicGates(DynamicOp):
    """What layers and cells share: `gates`, the rows of their weights, are copies of the hidden channels.

    A mask registered on `hidden_size` alone reaches them. So does one on the outputs (`proj_size` with a projection,
    else `hidden_size`) what reads them: later layers by `layer_inputs`, a copy for each direction, and the next step
    by `state` with a projection.
    """

    aliases = {"in_channels": "input_size", "out_channels": "hidden_size"}  # noqa: RUF012 - ClassVar in the base
    input_size: Any = presented_integer("input_size")
    hidden_size: Any = presented_integer("hidden_size")
    reset_parameters: Any = on_full("reset_parameters")

    def _axis_kept(self, attr: str) -> KeptIndices | None:
        own, source = self._dynamic.containers[attr], self._source_of(attr)
        if own.spans or not source.is_cut:
            return own.kept_indices()
        return KeptIndices(source.current_mask.repeat(own.num_channels // source.num_channels))

    def _source_of(self, attr: str) -> MutableChannelContainer:
        """Return the mask that an axis without spans of its own is copies of."""
        containers = self._dynamic.containers
        outputs = "proj_size" if "proj_size" in containers else "hidden_size"
        return containers[{"gates": "hidden_size", "state": outputs, "layer_inputs": outputs}.get(attr, attr)]


def _listed(module: Any) -> list[Any]:
    """Return the kept slices in the order in which torch takes them; cut once in a forward.

    Torch chooses kernels by `requires_grad` even without gradients, so slices have that of their parameters; one made
    in inference mode would lose it on the way.
    """
    fields = module.__dict__
    if _HELD in fields:
        return list(fields[_HELD])
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _listed(module)
    parts = []
    for name in fields["_flat_weights_names"]:
        full: Any = fields["_parameters"].get(name)
        part: Any = getattr(module, name, None)
        if type(full) is nn.Parameter and full.requires_grad and not (part.requires_grad or part.is_inference()):
            part.requires_grad = True
        parts.append(part)
    return parts


def _set_listed(module: Any, weights: list[Any]) -> None:
    module.__dict__["_flat_weights"] = weights


class _DynamicRecurrent(_DynamicGates):
    """What the layers share: their weights, whose names depend on the number of layers, are read from a list."""

    proj_size: Any = presented_integer("proj_size")
    flatten_parameters: Any = on_full("flatten_parameters")
    _init_flat_weights: Any = on_full("_init_flat_weights")
    _flat_weights: Any = property(_listed, _set_listed)

    def _describe(self) -> None:
        fields = self.__dict__
        self._add_axis("input_size", fields["input_size"])
        self._add_axis("hidden_size", fields["hidden_size"])
        outputs = "proj_size" if fields["proj_size"] else "hidden_size"
        if fields["proj_size"]:
            self._add_axis("proj_size", fields["proj_size"])
            self._add_axis("state", fields["proj_size"], follow=False)
        self._add_axis("gates", _GATES.get(fields["mode"], 1) * fields["hidden_size"], follow=False)
        if fields["num_layers"] > 1:
            self._add_axis("layer_inputs", (2 if fields["bidirectional"] else 1) * fields[outputs], follow=False)
        for name in fields["_flat_weights_names"]:
            axes = {
                "weight_ih": ("gates", "input_size" if "_l0" in name else "layer_inputs"),
                "weight_hh": ("gates", "state" if fields["proj_size"] else "hidden_size"),
                "weight_hr": (outputs, "hidden_size"),
            }
            self._add_axes(**{name: axes.get(name.partition("_l")[0], ("gates",))})
        self._present(tensors=set(fields["_flat_weights_names"]))

    def _update_flat_weights(self) -> None:
        """Do nothing: the list is always that of the current weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the kept channels; arguments and results are those of the static class."""
        self.__dict__[_HELD] = self._flat_weights
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__[_HELD]

    def to_static(self) -> nn.Module:
        """Become the static layer, its list of weights and their memory in order."""
        module = super().to_static()
        assert isinstance(module, nn.RNNBase), "the class was just put back"
        module._init_flat_weights()
        return module


class DynamicRNN(_DynamicRecurrent, nn.RNN):
    """`torch.nn.RNN` that runs on its kept channels."""

    static_op = nn.RNN


class DynamicLSTM(_DynamicRecurrent, nn.LSTM):
    """`torch.nn.LSTM` that runs on its kept channels; with `proj_size` the outputs have a mask of their own.

    Example:
        >>> import torch
        >>> from lightning_prune.mutables import MutableChannel
        >>> lstm, unit = DynamicLSTM.convert_from(nn.LSTM(3, 4, bidirectional=True)), MutableChannel(4)
        >>> lstm.get_mutable_attr("hidden_size").register_mutable(unit, 0, 4)
        >>> unit.current_choice = torch.tensor([True, False, True, False])
        >>> lstm(torch.zeros(5, 2, 3))[0].shape
        torch.Size([5, 2, 4])
        >>> lstm.to_static()
        LSTM(3, 2, bidirectional=True)
    """

    static_op = nn.LSTM


class DynamicGRU(_DynamicRecurrent, nn.GRU):
    """`torch.nn.GRU` that runs on its kept channels."""

    static_op = nn.GRU


class _DynamicCell(_DynamicGates):
    """What the cells share."""

    weight_ih: Any = presented_tensor("weight_ih")
    weight_hh: Any = presented_tensor("weight_hh")
    bias_ih: Any = presented_tensor("bias_ih")
    bias_hh: Any = presented_tensor("bias_hh")

    def _describe(self) -> None:
        self._add_axis("input_size", self.__dict__["input_size"])
        self._add_axis("hidden_size", self.__dict__["hidden_size"])
        self._add_axis("gates", self._parameters["weight_hh"].shape[0], follow=False)  # type: ignore[union-attr]
        self._add_axes(weight_ih=("gates", "input_size"), weight_hh=("gates", "hidden_size"))
        self._add_axes(bias_ih=("gates",), bias_hh=("gates",))


class DynamicRNNCell(_DynamicCell, nn.RNNCell):
    """`torch.nn.RNNCell` that runs on its kept channels."""

    static_op = nn.RNNCell


class DynamicLSTMCell(_DynamicCell, nn.LSTMCell):
    """`torch.nn.LSTMCell` that runs on its kept channels."""

    static_op = nn.LSTMCell


class DynamicGRUCell(_DynamicCell, nn.GRUCell):
    """`torch.nn.GRUCell` that runs on its kept channels."""

    static_op = nn.GRUCell
