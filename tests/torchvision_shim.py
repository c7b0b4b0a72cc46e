"""Import torchvision from `.zoo`, also where its compiled operators do not fit this build of torch.

torchvision registers fake kernels for `nms` at import and fails when the operators are not there. Declaring the two
schemas first is enough for its models, which call neither.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

ZOO = Path(__file__).resolve().parent.parent / ".zoo"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARIES: list[torch.library.Library] = []  # a schema lives as long as its library object


@cache
def import_torchvision() -> ModuleType:
    """Return the torchvision package; `.zoo` is searched last, so nothing in it hides an installed package.

    Raises:
        ImportError: torchvision is neither installed nor in `.zoo`; `make .zoo/.installed` puts it there.
    """
    if str(ZOO) not in sys.path:
        sys.path.append(str(ZOO))
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise ImportError("No torchvision; `make .zoo/.installed` installs it beside the environment.") from error
    except (ImportError, OSError, RuntimeError):
        _forget("torchvision")
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        _LIBRARIES.append(library)
        return importlib.import_module("torchvision")


def import_torch_pruning() -> ModuleType:
    """Return the Torch-Pruning package, which imports torchvision.

    Raises:
        ImportError: It is neither installed nor in `.zoo`; `make .zoo/.installed` puts it there.
    """
    import_torchvision()
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise ImportError("No torch_pruning; `make .zoo/.installed` installs it beside the environment.") from error


def _forget(package: str) -> None:
    """Drop a half-imported package, so that the next import starts anew."""
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        del sys.modules[name]
