"""`SensitivityScores`: what a channel is worth by a measured table, so that units compare by what a metric loses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import ConfigError, PlanError, did_you_mean
from lightning_prune.importance.resolve import resolve_importance
from lightning_prune.importance.scorer import score_units, window_of

if TYPE_CHECKING:
    from lightning_prune.units import MutableChannelUnit

__all__ = ["SensitivityScores"]

_TIE = 1e-3  # of the largest loss: flat parts of a curve still rank the channels of a unit


class SensitivityScores:
    """Score a channel by what the metric loses once its unit is pruned so far that the channel goes.

    Another importance ranks the channels of a unit; of C channels the one after j better ones goes when j remain:
    ``score = loss(j / C) + 0.001 * (1 - j / C) * largest loss of the table``. The loss at a ratio is interpolated
    between those measured, is 0 at 1, never falls as less remains, and goes on straight below the least ratio. One
    threshold over all units then prunes each to where it alone loses as much as any other.

    Args:
        table: What `lightning_prune.sensitivity` returned: the table, its `to_dict()`, or the path of its JSON.
        of: The importance that ranks the channels of a unit; one of weights alone.

    Raises:
        ConfigError: A table that cannot be read or holds a metric that is not finite, or an importance that has to
            watch training.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, sec. 3.2.
        We differ: the paper reads ratios off the curves by hand; here they rank channels for any target.
    """

    def __init__(self, table: Any, of: Any = "l1") -> None:
        self.of = resolve_importance(of)
        if window_of(self.of):
            raise ConfigError(f"Got of={of!r}, which has to watch training; expected an importance of weights alone.")
        self._curves = _curves(_plain(table))
        self._largest = max((losses[0] for _, losses in self._curves.values()), default=0.0)

    def scores(
        self, units: Iterable[MutableChannelUnit], scope: str = "global", *, living: bool = False
    ) -> dict[str, Tensor]:
        """Score the channels of every unit; see `Importance.scores`.

        Raises:
            PlanError: A unit that the table does not have.
        """
        units = list(units)
        base = score_units(self.of, units, scope, living)
        return {unit.name: self._scored(unit, base[unit.name], living) for unit in units}

    def _scored(self, unit: MutableChannelUnit, base: Tensor, living: bool) -> Tensor:
        if unit.name not in self._curves:
            raise PlanError(
                f"Got no sensitivity of unit {unit.name!r}; expected a table of all units. "
                f"{did_you_mean(unit.name, self._curves)} Measure this model, with all of its units."
            )
        if living:
            base = base.masked_fill(~unit.mutable.current_mask, -math.inf)
        shares = np.arange(len(base)) / len(base)  # what remains when the best, the second, ... goes
        worth = np.interp(shares, *self._curves[unit.name]) + _TIE * (1 - shares) * (self._largest or 1.0)
        found = torch.empty(len(base))
        found[base.argsort(descending=True, stable=True)] = torch.from_numpy(worth).float()
        return found


def _plain(table: Any) -> Mapping[str, Any]:
    """Return a table as plain data."""
    if isinstance(table, str | Path):
        try:
            table = json.loads(Path(table).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"Got sensitivity table {str(table)!r}, which cannot be read: {error}.") from error
    elif hasattr(table, "to_dict"):
        table = table.to_dict()
    if not isinstance(table, Mapping) or not {"mode", "before", "rows"} <= table.keys():
        raise ConfigError(f"Got sensitivity table {table!r}; expected what `lightning_prune.sensitivity` returns.")
    return table


def _curves(table: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """Return unit name -> ratios from 0 to 1 and the loss at each, which never rises."""
    sign = 1.0 if table["mode"] == "min" else -1.0
    found = {}
    for row in table["rows"]:
        points = sorted(
            (count / row["num_channels"], value) for count, value in zip(row["kept"], row["values"], strict=True)
        )
        bad = [value for _, value in [*points, (1.0, table["before"])] if not math.isfinite(value)]
        if bad:
            raise ConfigError(f"Got a sensitivity of {bad[0]} for unit {row['unit']!r}; expected numbers.")
        losses = {1.0: 0.0} | {ratio: sign * (value - table["before"]) for ratio, value in points if ratio < 1}
        ratios = sorted(losses, reverse=True)
        rising = np.maximum.accumulate([losses[ratio] for ratio in ratios]).tolist()
        if len(ratios) > 1:  # on to a ratio of 0, straight
            slope = (rising[-1] - rising[-2]) / (ratios[-2] - ratios[-1])
            ratios, rising = [*ratios, 0.0], [*rising, rising[-1] + slope * ratios[-1]]
        found[row["unit"]] = (ratios[::-1], rising[::-1])
    return found
