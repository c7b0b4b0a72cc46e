"""Training batches beside the training: no random number, no sampler and no worker of the training moves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callback.example import forward_input
from lightning_prune.errors import ConfigError

__all__ = ["forward_on", "own_batches"]


def own_batches(trainer: Trainer, pl_module: LightningModule, count: int, seed: int) -> Iterator[Any]:
    """Yield training batches as `training_step` would get them, of iterators of their own.

    They come in the order of a loader's own sampler, drawn with `seed`, so that a resumed run draws the same; with
    `DistributedSampler` each process gets its part.

    Args:
        trainer: In `fit`.
        pl_module: Its module; its hooks for batches are called.
        count: At most so many, and not more than an epoch has.
        seed: Of everything random, until the iterator ends or is closed.

    Warns:
        UserWarning: The data cannot be copied, so that reading them would move the training on: there are none.
    """
    count = int(min(count, trainer.num_training_batches))
    try:
        loaders = tree_map(_copied, trainer.train_dataloader)
    except Exception as error:  # of the user's data
        rank_zero_warn(
            f"Got training data that cannot be read beside the training ({type(error).__name__}: {error}); a recovery "
            "object that wants batches gets none. Use a dataset with indices, or one that can be copied."
        )
        return
    with isolate_rng():
        torch.manual_seed(seed)
        for batch in islice(_batches(trainer, loaders), count):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _batches(trainer: Trainer, loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, DataLoader):
        yield from loaders
        return
    combined = trainer.fit_loop._combined_loader
    assert combined is not None, "the trainer fits"
    for batch, _, _ in CombinedLoader(loaders, combined._mode):
        yield batch


def _copied(loader: Any) -> Any:
    """Return a loader of the same data whose iterators share nothing with those of the original."""
    if not isinstance(loader, DataLoader):
        return copy.deepcopy(loader)
    dataset = loader.dataset
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in ("num_workers", "collate_fn", "worker_init_fn", "multiprocessing_context", "timeout")
    }
    if isinstance(dataset, IterableDataset):
        return DataLoader(copy.deepcopy(dataset), batch_size=loader.batch_size, drop_last=loader.drop_last, **options)
    memo = {id(dataset): dataset}
    if loader.batch_sampler is None:
        return DataLoader(dataset, batch_size=None, sampler=copy.deepcopy(loader.sampler, memo), **options)
    return DataLoader(dataset, batch_sampler=copy.deepcopy(loader.batch_sampler, memo), **options)


def forward_on(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Run the module on what its `forward` takes of a batch, in the precision of the training.

    Raises:
        ConfigError: The batch has too few items, a required entry is missing, or `forward` cannot take what is there.
    """
    given = forward_input(pl_module.forward, batch)
    try:
        with trainer.precision_plugin.forward_context():
            return pl_module(**given) if isinstance(given, Mapping) else pl_module(*given)
    except (TypeError, AttributeError) as error:
        said = str(error).split("\n", 1)[0]
        raise ConfigError(
            f"Got a training batch whose first items are not what {type(pl_module).__name__}.forward takes: {said}. A "
            "recovery object runs forward on them. Let batches begin with what it takes, or have it by name; or write "
            "a Recovery that calls lightning_prune.recovery.recalibrate_ with a function of yours."
        ) from error
