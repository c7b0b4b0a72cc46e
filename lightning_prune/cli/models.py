"""From words on a command line to a model and its input."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigError, did_you_mean

__all__ = ["load_model", "make", "make_input"]

_SHAPE = re.compile(r"(?:(?P<name>\w+)=)?(?:(?P<dtype>[a-z]\w*):)?(?P<sizes>\d+(?:x\d+)*)(?:<(?P<below>\d+))?")
IMAGES = "2x3x224x224"


def load_model(model: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a model in eval mode, with random weights where a zoo would download them.

    Args:
        model: ``package.module.Class`` or ``package.module:Class`` (a function that makes a model, or a model, too);
            ``torchvision:resnet50``; ``timm:vit_tiny_patch16_224``; ``hf:`` and the name or folder of a configuration.
        arguments: Of the class or function.

    Raises:
        ConfigError: There is no such model, it cannot be made from the arguments, or it is no module.
        ImportError: Its package is missing.
    """
    made = make(model, arguments)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"Got model {model!r}, which gives {type(made).__name__}; expected a torch module.")
    return made.eval()


def make(path: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """Return what a class or function of that path, or a zoo, makes of the arguments.

    Raises:
        ConfigError: There is no such thing, or it cannot be made from them.
        ImportError: Its package is missing.
    """
    given = dict(arguments or {})
    kind, _, name = path.partition(":")
    try:
        return ZOOS[kind](name, given) if kind in ZOOS else _imported(path, given)
    except ModuleNotFoundError as error:
        if kind not in ZOOS:
            raise
        raise ImportError(f"Got {path!r}, and no package {error.name}: pip install {error.name}") from error
    except (ImportError, ConfigError):
        raise
    except Exception as error:  # of somebody else's class
        raise ConfigError(f"Got {path!r}, which cannot be made from {given}: {error}") from error


def _imported(path: str, given: dict[str, Any]) -> Any:
    module_path, _, name = path.replace(":", ".").rpartition(".")
    if not module_path:
        raise ConfigError(
            f"Got model {path!r}; expected package.module.Class, or one of {', '.join(f'{zoo}:name' for zoo in ZOOS)}."
        )
    module = importlib.import_module(module_path)
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(
            f"Got {name!r} of {module_path}. {did_you_mean(name, [n for n in dir(module) if n[0] != '_'])}"
        )
    return found if isinstance(found, nn.Module) else found(**given)


def _from_torchvision(name: str, given: dict[str, Any]) -> Any:
    return importlib.import_module("torchvision.models").get_model(name, **{"weights": None, **given})


def _from_timm(name: str, given: dict[str, Any]) -> Any:
    return importlib.import_module("timm").create_model(name, **{"pretrained": False, **given})


def _from_hugging_face(name: str, given: dict[str, Any]) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name, **given))


ZOOS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_hugging_face,
}


def make_input(text: str | None, model: nn.Module) -> Any:
    """Return an example input: random numbers of the shapes that a user wrote.

    Args:
        text: Such as "2x3x224x224"; several with commas; of whole numbers below a bound "int64:2x16<1000"; for a
            keyword "input_ids=int64:2x16". None takes the module's `example_input_array`, what a timm model says of
            itself, or two images of 224 pixels.
        model: Which may say itself.

    Raises:
        ConfigError: It is no shape.
    """
    if text is None:
        own = getattr(model, "example_input_array", None)
        if own is not None:
            return own
        size = getattr(model, "default_cfg", {}).get("input_size")
        text = "x".join(map(str, (2, *size))) if size else IMAGES
    parts = [_SHAPE.fullmatch(part.strip()) for part in text.split(",")]
    if None in parts:
        raise ConfigError(f"Got --input {text!r}; expected shapes such as 2x3x224x224 or input_ids=int64:2x16<1000.")
    found = [(part["name"], _random(part)) for part in parts if part is not None]
    if all(name is None for name, _ in found):
        return found[0][1] if len(found) == 1 else tuple(tensor for _, tensor in found)
    if any(name is None for name, _ in found):
        raise ConfigError(f"Got --input {text!r}; expected a name for each input, or for none.")
    return dict(found)


def _random(part: re.Match[str]) -> Tensor:
    sizes = [int(size) for size in part["sizes"].split("x")]
    dtype = getattr(torch, part["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"Got type {part['dtype']!r} of an input; expected one of torch, such as int64.")
    if dtype.is_floating_point:
        return torch.randn(sizes, dtype=dtype)
    return torch.randint(int(part["below"] or 2), sizes, dtype=dtype)
