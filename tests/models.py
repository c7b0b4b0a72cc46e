"""The real models that the library is tried on: torchvision's, timm's and transformers', with random weights.

A name is `library:model`. A builder returns the model and what to call it on: two of the smallest images that show the
structure, 64 pixels on a side unless the network asks for another; or one of full size.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.torchvision_shim import ZOO, import_torchvision
from tests.zoo_case import randomize_norms_

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Builder = Callable[..., Example]

SIDE = 64
FULL_SIDE = 224
CLASSES = 7
# torchvision: where 64 pixels do not fit, or cost too much
SIDES = {
    "inception_v3": 299,
    "maxvit_t": 224,
    "vit_h_14": 56,
    "regnet_y_128gf": 32,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}
DETECTION = (
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
)
# timm: name -> side, and whether the constructor must be told
TIMM = {
    "vit_tiny_patch16_224": (64, True),
    "deit_tiny_patch16_224": (64, True),
    "swin_tiny_patch4_window7_224": (64, True),
    "convnext_atto": (64, False),
    "convnextv2_atto": (64, False),
    "mobilevit_xxs": (64, False),
    "efficientformer_l1": (224, False),
    "poolformer_s12": (64, False),
    "mixer_s16_224": (64, True),
    "resmlp_12_224": (64, True),
    "levit_128s": (128, True),
    "efficientnet_b0": (64, False),
    "regnetx_002": (64, False),
    "resnest14d": (64, False),
    "res2net50_26w_4s": (64, False),
    "hrnet_w18_small": (64, False),
    "dla34": (64, False),
    "ghostnet_100": (64, False),
    "mobilenetv4_conv_small": (64, False),
    "nfnet_f0": (64, False),
    "beit_base_patch16_224": (64, True),
    "eva02_tiny_patch14_224": (56, True),
    "maxvit_tiny_tf_224": (64, True),
    "coatnet_0_224": (64, True),
    "edgenext_xx_small": (64, False),
    "fastvit_t8": (64, False),
    "repvgg_a0": (64, False),
    "tnt_s_patch16_224": (64, True),
    "xcit_nano_12_p8_224": (64, True),
    "volo_d1_224": (64, True),
}


QUICK_TIMM = (
    "vit_tiny_patch16_224",
    "convnextv2_atto",
    "poolformer_s12",
    "mixer_s16_224",
    "regnetx_002",
    "resnest14d",
    "ghostnet_100",
    "mobilenetv4_conv_small",
    "eva02_tiny_patch14_224",
    "edgenext_xx_small",
    "repvgg_a0",
    "xcit_nano_12_p8_224",
)
QUICK_TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_fpn",
)


class Detector(nn.Module):
    """The trained parts of a detector, without anchors, matching and suppression, which are compiled operators.

    Args:
        detector: From `torchvision.models.detection`. A second stage reads each feature map pooled to 7 x 7.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head
        self.roi_heads = getattr(detector, "roi_heads", None)

    def forward(self, images: Tensor) -> Any:
        """Return what the heads say about the feature maps of `[N, 3, H, W]`."""
        maps = list(self.backbone(images).values())
        found = self.head(maps)
        if self.roi_heads is None:
            return found
        boxes = torch.cat([F.adaptive_avg_pool2d(m, 7) for m in maps])
        return found, self.roi_heads.box_predictor(self.roi_heads.box_head(boxes))


class _NoDrawing(TorchFunctionMode):
    """Leave parameters as they were allocated: drawing them takes longer than the analysis."""

    SKIPPED = frozenset({"uniform_", "normal_", "trunc_normal_", "erfinv_", "kaiming_uniform_", "kaiming_normal_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.SKIPPED and args and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def quick_initialization() -> Iterator[None]:
    """Construct models without drawing their weights; see `draw_`."""
    with _NoDrawing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, on initial weights and names
        yield


def draw_(model: nn.Module) -> nn.Module:
    """Give every parameter weights of one drawing that keep the signal alive; buffers that are tables stay."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            bound = (6 * len(parameter) / parameter.numel()) ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.uniform_(-bound, bound, generator=generator)
    return randomize_norms_(model)


def images(side: int, count: int) -> tuple[Tensor]:
    """Return images, the same at every call."""
    return (torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(side)),)


def _torchvision(name: str, kind: str, full: bool = False) -> Example:
    module = import_torchvision().models
    side = SIDES.get(name, SIDE)
    if full:
        side = max(side, FULL_SIDE)
    arguments: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    if kind != "classification":
        arguments["weights_backbone"] = None
    if name.startswith("vit_"):
        arguments["image_size"] = side
    with quick_initialization():
        model = module.get_model(name, **arguments)
    return draw_(Detector(model) if kind == "detection" else model), images(side, 1 if full else 2), {}


def _timm(name: str, full: bool = False) -> Example:
    timm = import_timm()
    side, told = TIMM[name]
    arguments = {"img_size": side} if told and not full else {}
    with quick_initialization():
        model = timm.create_model(name, num_classes=CLASSES, **arguments)
    if full:
        side = model.default_cfg["input_size"][-1]
    return draw_(model), images(side, 1 if full else 2), {}


def import_timm() -> ModuleType:
    """Return timm from `.zoo`, after a torchvision that fits, which it imports."""
    import_torchvision()
    if str(ZOO) not in sys.path:
        sys.path.append(str(ZOO))
    return importlib.import_module("timm")


@cache
def torchvision_models() -> dict[str, Builder]:
    """Return every classification and segmentation model, and the detectors."""
    module = import_torchvision().models
    kinds = {
        "classification": module.list_models(module=module),
        "segmentation": module.list_models(module=module.segmentation),
        "detection": DETECTION,
    }
    return {f"torchvision:{n}": partial(_torchvision, n, kind) for kind, names in kinds.items() for n in names}


def timm_models() -> dict[str, Builder]:
    """Return the models of timm."""
    return {f"timm:{name}": partial(_timm, name) for name in TIMM}


@cache
def hf_models() -> dict[str, Builder]:
    """Return the models of transformers, from small random configs."""
    from tests.hf_models import HF_MODELS

    return {f"hf:{name}": builder for name, builder in HF_MODELS.items()}


@cache
def models() -> dict[str, Builder]:
    """Return every model: name -> a function that builds it, with positional and keyword arguments to call it on."""
    return {name: builder for library in LIBRARIES.values() for name, builder in library().items()}


def build(name: str, full: bool = False) -> Example:
    """Return one model, with positional and keyword arguments to call it on.

    Args:
        name: `library:model`, as in `models()`.
        full: One image of the size that the network was made for. Models of transformers stay as they are.
    """
    library = name.partition(":")[0]
    builder = LIBRARIES[library]()[name]
    return builder(full=full) if library != "hf" else builder()


def quick_models() -> list[str]:
    """Return the third of the models that every run of the tests examines: the smallest of each family."""
    return [
        *hf_models(),
        *(f"timm:{name}" for name in QUICK_TIMM),
        *(f"torchvision:{name}" for name in QUICK_TORCHVISION),
    ]


LIBRARIES = {"torchvision": torchvision_models, "timm": timm_models, "hf": hf_models}
