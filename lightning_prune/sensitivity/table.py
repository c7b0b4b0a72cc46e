"""`SensitivityTable`: a metric against what remains of each unit, as a table, a plot, and plain data."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lightning_prune.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SensitivityRow", "SensitivityTable"]

_LEGEND = 20  # lines, beyond which their names would hide them


@dataclass(frozen=True)
class SensitivityRow:
    """What was measured with one unit pruned.

    Args:
        unit: Its name.
        num_channels: Channels of the dense unit.
        kept: Channels that remained, for each ratio of the table; rounded as the unit rounds.
        values: The metric with so many.
    """

    unit: str
    num_channels: int
    kept: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class SensitivityTable:
    """A metric against what remains of each unit, all others as they were; `print` shows the table.

    Args:
        monitor: Name of the metric.
        mode: "min" where lower is better, "max" where higher is.
        before: The metric with every unit as it was.
        ratios: What was asked to remain of each unit, descending.
        rows: One per unit.
    """

    monitor: str
    mode: str
    before: float
    ratios: tuple[float, ...]
    rows: tuple[SensitivityRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain containers, for JSON; `lightning_prune.importance.SensitivityScores` reads it."""
        plain = asdict(self)
        plain["ratios"] = list(self.ratios)
        plain["rows"] = [{**asdict(row), "kept": list(row.kept), "values": list(row.values)} for row in self.rows]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> SensitivityTable:
        """Return the table that `to_dict` gave.

        Raises:
            ConfigError: Something is missing.
        """
        try:
            rows = tuple(
                SensitivityRow(row["unit"], row["num_channels"], tuple(row["kept"]), tuple(row["values"]))
                for row in plain["rows"]
            )
            return cls(plain["monitor"], plain["mode"], plain["before"], tuple(plain["ratios"]), rows)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"Got a sensitivity table without {error}; expected what `to_dict` returns.") from error

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Return the table that `save` wrote.

        Raises:
            ConfigError: The file is missing, or holds something else.
        """
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"Got sensitivity table {str(path)!r}, which cannot be read: {error}.") from error
        return cls.from_dict(plain)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the metric against what remains, one line per unit.

        Args:
            path: Where to save it; the suffix says the format. None does not save.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError(
                "Got a plot to draw without matplotlib; install it with: pip install 'lightning-prune[plots]'."
            ) from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for row in self.rows:
            measured = {n / row.num_channels: value for n, value in zip(row.kept, row.values, strict=True)}
            points = sorted(({1.0: self.before} | measured).items())
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=row.unit)
        axes.set(xlabel="ratio of channels that remain", ylabel=self.monitor, title="Each unit pruned alone")
        axes.invert_xaxis()
        if 0 < len(self.rows) <= _LEGEND:
            axes.legend(fontsize="small")
        if path is not None:
            figure.savefig(path)
        return figure

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield f"{self.monitor} with each unit pruned alone; {self.before:.4g} before"
        table = Table()
        table.add_column("unit", overflow="fold")
        for header in ("channels", *(f"{ratio:g}" for ratio in self.ratios)):
            table.add_column(header, justify="right")
        for row in self.rows:
            table.add_row(row.unit, str(row.num_channels), *(f"{value:.4g}" for value in row.values))
        yield table

    def __str__(self) -> str:
        console = Console(width=140, file=io.StringIO(), force_terminal=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]
