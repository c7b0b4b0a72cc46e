"""`PrunableMixin`: for those who would rather write `Net.load_from_checkpoint(path)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.checkpoint.build import build_model
from lightning_prune.checkpoint.hooks import register_structure_hooks
from lightning_prune.checkpoint.load import load_content
from lightning_prune.checkpoint.read import Content, name_of, read_file
from lightning_prune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PrunableMixin"]


class PrunableMixin:
    """Put before LightningModule: `load_from_checkpoint` gives the small model, and state dicts carry the structure.

    `class Net(PrunableMixin, LightningModule)`. It is optional: `load_pruned(path, Net)` does the same for any class.
    Nothing else of the module changes.

    Raises:
        ConfigError: When the class is made, and another base would hide the mixin.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__mro__.index(PrunableMixin) > next(
            (i for i, base in enumerate(cls.__mro__) if base is not PrunableMixin and _loads(base)), len(cls.__mro__)
        ):
            raise ConfigError(
                f"Got class {cls.__name__} with PrunableMixin behind a base that loads checkpoints itself. Write it "
                f"first: class {cls.__name__}(PrunableMixin, LightningModule)."
            )

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = "cpu",
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return the small model in a checkpoint, as `load_pruned` does.

        Args:
            checkpoint_path: A path, or a file open for reading bytes.
            map_location: As in `torch.load`.
            hparams_file: A YAML file of hyperparameters, in place of those in the checkpoint.
            strict: Whether every key must be there on both sides; None takes the module's own word.
            weights_only: False also builds Python objects that are in the file; None does not.
            **kwargs: Arguments of the class; they come before saved ones.

        Raises:
            CheckpointError: As `load_pruned` does; or the hyperparameters cannot be read.
        """
        trusted, name = weights_only is False, name_of(checkpoint_path)
        content = read_file(checkpoint_path, map_location, weights_only=not trusted)
        if hparams_file is not None:
            content = Content({**content.checkpoint, "hyper_parameters": _read_yaml(hparams_file)})
        model = build_model(cls, content, kwargs, name, trusted=trusted)
        try:
            loaded: Self = load_content(content, model, strict=strict is not False)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        return loaded

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's state dict, with the structure in its metadata."""
        register_structure_hooks(self)  # type: ignore[arg-type]  # a module, as its subclasses are
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict into the module, which takes its structure first."""
        register_structure_hooks(self)  # type: ignore[arg-type]
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]


def _loads(base: type) -> bool:
    return "load_from_checkpoint" in vars(base) and not issubclass(base, PrunableMixin)


def _read_yaml(path: Any) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]  # PyYAML, which OmegaConf reads with, ships no types

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(f"Got hyperparameters {path}, which is no plain YAML: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"Got {type(found).__name__} in {path}; expected a mapping of hyperparameters in YAML.")
    return found
