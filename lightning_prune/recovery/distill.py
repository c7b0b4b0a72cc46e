"""Knowledge distillation: the dense model teaches the one that shrinks."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import CheckpointError, ConfigError
from lightning_prune.recovery.base import Recovery, Run

__all__ = ["Distillation", "distillation_loss"]

Loss = Callable[..., Any]  # a command line takes functions without annotations only so
"""``(student_output, teacher_output, batch) -> scalar``."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, dim: int = -1) -> Tensor:
    """Return ``T ** 2 * mean KL(softmax(teacher / T) || softmax(student / T))``.

    Args:
        student: Logits.
        teacher: Logits of the same shape.
        temperature: T, greater than 0.
        dim: Axis of the classes; the mean is over all others.

    Returns:
        Scalar, at least float32.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, sec. 2.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_student = F.log_softmax(student.to(dtype) / temperature, dim)
    log_teacher = F.log_softmax(teacher.to(dtype) / temperature, dim)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim)
    return temperature**2 * divergence.mean()


class Distillation(Recovery):
    """Let the dense model of the start of `fit` teach: ``(1 - alpha) * loss + alpha * distillation_loss``.

    The module's `forward` (or that of `layer`) is watched while `training_step` runs, and the teacher, frozen, in eval
    mode and without gradients, answers the same calls; the loss that `training_step` returned is changed before its
    backward. What is logged as loss there stays the loss alone. The teacher is in no optimizer and no `state_dict`; its
    weights are in the checkpoint of the run, unless `teacher` says where they are, so that a resumed run has the same.
    Each step costs one more forward of the teacher, and the memory of its weights.

    Args:
        temperature: T of the logits, greater than 0.
        alpha: Share of the distillation loss, in [0, 1].
        teacher: None takes the model of the start of `fit`; or the path of a checkpoint of it; or another module with
            the same `forward`.
        loss: ``(student_output, teacher_output, batch) -> scalar`` instead of the divergence of logits, for features or
            anything that `forward` returns. With more than one call in a `training_step` the mean counts.
        layer: Dotted name of the part whose `forward` gives the logits, where `training_step` does not call the
            module's own, such as "net".
        dim: Axis of the classes in the logits; 1 for images of them.

    Raises:
        ConfigError: An argument outside its range. In `fit`: manual optimization, a compiled module, a
            `training_step` that does not call `forward`, or a teacher that cannot take what the student does.
        CheckpointError: The checkpoint of the teacher does not fit.

    Source: Hinton et al., arXiv:1503.02531; with pruning, Liu et al., "Group Fisher Pruning", 2021, arXiv:2108.00708.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        teacher: nn.Module | str | None = None,
        loss: Loss | None = None,
        layer: str = "",
        dim: int = -1,
    ) -> None:
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
            raise ConfigError(f"Got temperature={temperature!r} for Distillation; expected a number above 0.")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ConfigError(f"Got alpha={alpha!r} for Distillation; expected a share in [0, 1].")
        self.temperature, self.alpha, self.loss, self.layer, self.dim = temperature, alpha, loss, layer, dim
        self._path = os.fspath(teacher) if isinstance(teacher, str | os.PathLike) else None
        self.teacher: nn.Module | None = teacher if isinstance(teacher, nn.Module) else None
        self._is_given = teacher is not None
        self._has_weights = self.teacher is not None
        self._weights: dict[str, Any] | None = None
        self._batch: Any = None
        self._calls: list[tuple[Any, Any]] = []
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    def arguments(self) -> dict[str, Any]:
        """Return what it was made with; of a teacher its class, or that it is a file: that may lie elsewhere now."""
        given = None if self.teacher is None or not self._is_given else type(self.teacher).__name__
        return {**super().arguments(), "teacher": given if self._path is None else "a file"}

    # The teacher

    def forget(self) -> None:
        """Begin with another model, which has another teacher."""
        if self._path is not None or not self._is_given:
            self.teacher, self._has_weights = None, False

    def setup(self, run: Run) -> None:
        """Copy the dense module, before it is converted."""
        if not run.module.automatic_optimization:
            raise ConfigError(
                "Got Distillation with manual optimization, where training_step returns no loss; add "
                "lightning_prune.recovery.distillation_loss to yours."
            )
        if run.module._compiler_ctx is not None:
            raise ConfigError("Got Distillation with a compiled module, whose calls cannot be watched; do not compile.")
        _layer_of(run.module, self.layer)
        if self.teacher is None:
            self.teacher = copy.deepcopy(run.module)

    def begin(self, run: Run) -> None:
        """Give the teacher its weights, where it has none of its own, and bring it to the device."""
        teacher = self.teacher
        assert teacher is not None, "setup comes first"
        if self._path is not None and not self._has_weights:
            _load_(teacher, _read(self._path), self._path)
        elif self._weights is not None:
            _load_(teacher, self._weights, "the run")
        elif not self._has_weights:
            if run.mutator is not None and any(u.activated_channels < u.num_channels for u in run.mutator.units):
                warnings.warn(
                    "Distillation begins with a model that is pruned already, which teaches as it is. Give "
                    "Distillation(teacher=path of the dense checkpoint).",
                    stacklevel=2,
                )
            _load_(teacher, run.module.state_dict(), "the run")
        self._weights, self._has_weights = None, True
        teacher = run.trainer.precision_plugin.convert_module(teacher).to(run.module.device)
        self.teacher = teacher.requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of a teacher that was not given."""
        if self._is_given or self.teacher is None or not self._has_weights:
            return {}
        return {"teacher": dict(self.teacher.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the teacher of the saved run, unless one was given."""
        if not self._is_given:
            self._weights = state["teacher"]

    # The loss

    def begin_batch(self, run: Run, batch: Any) -> None:
        """Watch the calls of one batch."""
        self._let_go()
        self._batch = batch
        student = _layer_of(run.module, self.layer)
        # a wrapper calls `training_step` through the module's own `forward`, which is no call of the user
        is_wrapped = run.trainer.strategy.model is not run.module and student is run.module
        self._depth = -1 if is_wrapped else 0
        self._handles = [
            student.register_forward_pre_hook(self._enter),
            student.register_forward_hook(self._leave, with_kwargs=True),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Let the teacher answer what the student has just answered."""
        self._depth -= 1
        if self._depth == 0 and torch.is_grad_enabled() and module.training:
            with torch.no_grad():
                self._calls.append((output, self._taught(*args, **kwargs)))

    def _taught(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the teacher answers."""
        assert self.teacher is not None, "begin comes first"
        try:
            return _layer_of(self.teacher, self.layer)(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"Got a teacher that cannot answer what {self.layer or 'forward'!r} is called with: {error}. It is "
                "dense: a layer= for it gets what no pruned layer has made smaller, such as the input of the model."
            ) from error

    def before_backward(self, run: Run, loss: Tensor) -> None:
        """Mix the losses.

        Raises:
            ConfigError: `training_step` has not called what is watched, or that gives no logits.
        """
        if not self._calls:
            name = f"{type(run.module).__name__}.{self.layer or 'forward'}"
            raise ConfigError(
                f"Got a training_step that does not call {name} with gradients, so Distillation sees no logits. Call "
                "self(x) there, or give Distillation(layer=...) the name of the part that it calls."
            )
        losses = [self._loss(student, teacher) for student, teacher in self._calls]
        mean = torch.stack(losses).mean()
        scaler = getattr(run.trainer.precision_plugin, "scaler", None)
        factor = (1.0 if scaler is None else scaler.get_scale()) / run.trainer.accumulate_grad_batches
        loss.mul_(1.0 - self.alpha).add_((mean * (self.alpha * factor)).to(loss.dtype))
        self._calls = []

    def _loss(self, student: Any, teacher: Any) -> Tensor:
        if self.loss is not None:
            given: Tensor = self.loss(student, teacher, self._batch)
            return given
        return distillation_loss(_logits_of(student), _logits_of(teacher), self.temperature, self.dim)

    def end_batch(self, run: Run) -> None:
        """Stop watching."""
        self._let_go()

    def stop(self) -> None:
        """Stop watching, and leave the device."""
        self._let_go()
        if self.teacher is not None:
            self.teacher.cpu()

    def _let_go(self) -> None:
        self._calls, self._batch = [], None
        while self._handles:
            self._handles.pop().remove()


def _layer_of(module: nn.Module, name: str) -> nn.Module:
    """Return a part of a module by its dotted name; with an empty one the module.

    Raises:
        ConfigError: There is none.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"Got layer={name!r} for Distillation: {error}.") from error


def _logits_of(output: Any) -> Tensor:
    """Return logits: a tensor, or what an output calls so.

    Raises:
        ConfigError: There are none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"Got a {type(output).__name__} from forward, which is no tensor and has no 'logits'; give "
            "Distillation(loss=...), a function (student_output, teacher_output, batch) -> loss."
        )
    return logits


def _load_(teacher: nn.Module, state: Mapping[str, Any], where: str) -> None:
    try:
        teacher.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"Got weights of another model for the teacher, from {where}: {error}") from error


def _read(path: str) -> Mapping[str, Any]:
    """Return the state dict of a checkpoint; nothing in it is executed."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"Got teacher={path!r}, which cannot be read: it is damaged, or holds Python objects, hyperparameters for "
            "example. Save its state_dict(), or load it yourself and give Distillation(teacher=module)."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"Got teacher={path!r}, which cannot be read: {error}") from error
    state: Mapping[str, Any] = found.get("state_dict", found) if isinstance(found, dict) else {}
    return state
