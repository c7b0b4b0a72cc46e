"""Make a new plain, small model out of a supernet."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from lightning_prune.mutator.arguments import check_module
from lightning_prune.mutator.preview import detached
from lightning_prune.mutator.rebuild import rewrite_configs_
from lightning_prune.ops import to_static_
from lightning_prune.ops.structure import remember_structure_, structure_of

__all__ = ["export_pruned"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def export_pruned(model: ModelT) -> ModelT:
    """Return a new model of plain layers with only the kept channels; `model` is left alone.

    The new model gives the same outputs, bit for bit where the kernels round alike, and contains no class of this
    library. It remembers its structure, which `lightning_prune.checkpoint.structure_of` returns: save that under the
    key ``lightning_prune`` beside the ``state_dict``, and `load_pruned` can rebuild the model from its class.

    A model that saves itself with a config (`save_pretrained`) gets a config that describes the small model, where its
    class can make the very same model from one: layers of a kind are equally wide (`ChannelMutator(tie_kinds=True)`)
    and no scale changes. Else the config stays that of the dense model, and `ChannelMutator.report` says why. The
    model must have been traced in this process.

    Args:
        model: Any model; one without dynamic ops is copied.

    Returns:
        A deep copy, with shrunk tensors and integers.

    Raises:
        ConfigError: `model` is no module, or its masks describe no plain layer, or differ between modules that share a
            tensor.

    Example:
        >>> import torch
        >>> from lightning_prune.mutables import MutableChannel
        >>> from lightning_prune.ops import convert_
        >>> layer, unit = convert_(nn.Linear(4, 2)), MutableChannel(4)
        >>> layer.get_mutable_attr("in_channels").register_mutable(unit, 0, 4)
        >>> unit.current_choice = torch.tensor([True, False, False, True])
        >>> export_pruned(layer)
        Linear(in_features=2, out_features=2, bias=True)
    """
    check_module(model, "to export")
    small = copy.deepcopy(model, detached(model))
    structure = structure_of(small)
    to_static_(small)
    remember_structure_(small, structure)
    rewrite_configs_(small, model)
    return small
