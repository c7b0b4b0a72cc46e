"""Reading checkpoints: a file that was half written says so, and that there are others."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from lightning_prune.callback.ranks import is_sharding
from lightning_prune.callback.sharded import refuse_other_structures
from lightning_prune.checkpoint.archive import objects_in
from lightning_prune.checkpoint.read import folder_words
from lightning_prune.errors import CheckpointError

__all__ = ["explain_bad_files"]


class _ExplainingIO(_WrappingCheckpointIO):
    """Another plugin, whose errors in reading a file are ours; at module level, so that it pickles."""

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(*args, **kwargs)
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
            path, said = args[0] if args else kwargs.get("path"), str(error).splitlines() or [type(error).__name__]
            if words := folder_words(path):
                raise CheckpointError(f"Got the checkpoint {path}, which cannot be read: {words}.") from error
            if found := _objects_in(path) if isinstance(error, pickle.UnpicklingError) else "":
                raise CheckpointError(
                    f"Got the checkpoint {path}, which cannot be read as plain data: it holds Python objects: {found}. "
                    "If you trust whoever wrote it, fit(..., weights_only=False) builds them. Hyperparameters that are "
                    "numbers, strings, lists and dicts need no trust: save_hyperparameters(ignore=[...])."
                ) from error
            raise CheckpointError(
                f"Got the checkpoint {path}, which cannot be read: it is half written or damaged, or holds objects "
                f"that torch.load refuses ({said[0]}). Resume from an earlier one."
            ) from error

    def teardown(self) -> None:
        """Let the other one finish: it may be writing in the background."""
        assert self.checkpoint_io is not None, "it wraps another"
        self.checkpoint_io.teardown()


def _objects_in(path: Any) -> str:
    """Return which Python objects a whole file holds, without building them; nothing where that cannot be seen."""
    try:
        with Path(path).open("rb") as file:
            return objects_in(file)
    except (OSError, TypeError):  # on another machine, or no path
        return ""


def explain_bad_files(trainer: Trainer) -> None:
    """Let the Trainer raise `CheckpointError` for a file that cannot be read; calling it again changes nothing."""
    inner = trainer.strategy.checkpoint_io
    if not isinstance(inner, _ExplainingIO):
        trainer.strategy.checkpoint_io = _ExplainingIO(inner)
    if is_sharding(trainer):
        refuse_other_structures(trainer)
