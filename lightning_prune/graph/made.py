"""Find what the weight of a layer is made of, where it is no parameter: parametrisations and hooks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

__all__ = ["weight_of"]


def weight_of(module: nn.Module) -> Tensor | None:
    """Return the parameter that has the axes of the weight of a layer of torch.

    That is the weight itself; or, where somebody else makes the weight (weight norm, spectral norm, masks, any
    parametrisation), the parameter of the weight's shape that it is made of.

    Args:
        module: Any module.

    Returns:
        None if there is none.
    """
    own = dict(module._parameters)  # a scripted module has no plain dict
    if "weight" in own:
        return own["weight"]
    shape = _shape_of(module)
    sources = [*own.values()]
    lists = getattr(module, "parametrizations", None)
    if isinstance(lists, nn.ModuleDict) and "weight" in lists:
        sources += lists["weight"]._parameters.values()
    return next((t for t in sources if t is not None and tuple(t.shape) == shape), None)


def _shape_of(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of the weight that the sizes of a layer ask for."""
    if isinstance(module, _ConvNd):
        sides = (module.out_channels, module.in_channels // module.groups)
        if module.transposed:
            sides = (module.in_channels, module.out_channels // module.groups)
        return (*sides, *module.kernel_size)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Bilinear):
        return module.out_features, module.in1_features, module.in2_features
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return tuple(module.normalized_shape)
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    names = {_NormBase: "num_features", nn.GroupNorm: "num_channels", nn.PReLU: "num_parameters"}
    return next(((getattr(module, name),) for cls, name in names.items() if isinstance(module, cls)), None)
