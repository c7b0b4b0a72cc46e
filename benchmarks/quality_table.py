"""From the rows of the quality benchmark to its tables: means over seeds, paired differences, 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy import stats

Row = dict[str, Any]

HEAD = """\
| network | scope | criterion | MACs | dense | ours | Torch-Pruning | difference | before tuning, ours \
| Torch-Pruning | difference |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
SCHEDULE_HEAD = """\
| network | MACs | dense | one-shot | linear | cubic | cubic - one-shot | cubic - linear |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its 95 % interval by Student's t.

    Args:
        values: Independent differences, such as one per seed.

    Returns:
        An infinite half-width for fewer than two values.

    Example:
        >>> str(interval([1.0, 2.0, 3.0]))
        '+2.0 ± 2.5'
    """
    if len(values) < 2:
        return Interval(statistics.fmean(values), math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error)


def compared(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Bring the seeds of each row together.

    Args:
        rows: As the benchmark writes them; kinds other than "comparison" are left out.

    Returns:
        (model, scope, criterion, share) -> means of both sides, and the paired differences, ours less theirs.
    """
    groups = defaultdict(list)
    for row in rows:
        kind, _, *key = row["key"]
        if kind == "comparison":
            groups[tuple(key)].append(row)
    return {
        key: {
            "seeds": len(group),
            "dense": _mean(group, "dense"),
            **{f"{side} {when}": _mean(group, side, when) for side in ("ours", "theirs") for when in WHEN},
            **{when: interval([row["ours"][when] - row["theirs"][when] for row in group]) for when in WHEN},
            "macs": max(abs(row["theirs"]["macs"] / row["ours"]["macs"] - 1) for row in group),
        }
        for key, group in groups.items()
    }


WHEN = ("tuned", "pruned")


def render(rows: Sequence[Row]) -> str:
    """Return the tables in Markdown, with the figures that the requirements are about below the first one."""
    found = compared(rows)
    most = max((row["seeds"] for row in found.values()), default=0)
    found = {key: row for key, row in found.items() if row["seeds"] == most}  # of a run that was stopped, what is whole
    lines = [HEAD]
    for (model, scope, criterion, share), row in found.items():
        cells = [model, scope, criterion, f"{share:.0%}", f"{row['dense']:.1f}"]
        for when in WHEN:
            cells += [f"{row[f'ours {when}']:.1f}", f"{row[f'theirs {when}']:.1f}", str(row[when])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_summary(found), "", *_schedules(rows)])


def _summary(found: dict[tuple[Any, ...], dict[str, Any]]) -> list[str]:
    """Say how many rows go which way, and how the losses at the smallest share compare."""
    lines = []
    for criterion in dict.fromkeys(key[2] for key in found):
        mine = {key: row for key, row in found.items() if key[2] == criterion}
        rows = list(mine.values())
        below = sum(row["tuned"].mean + row["tuned"].half < 0 for row in rows)
        above = sum(row["tuned"].mean - row["tuned"].half > 0 for row in rows)
        least = min(key[3] for key in mine)
        last = [row for key, row in mine.items() if key[3] == least]
        ours, theirs = (statistics.fmean(r["dense"] - r[f"{side} tuned"] for r in last) for side in ("ours", "theirs"))
        mean = statistics.fmean(row["tuned"].mean for row in rows)
        lines.append(
            f"- {criterion}: after fine-tuning {above} of {len(rows)} rows have an interval above 0, {below} below; "
            f"mean difference {mean:+.1f}. Mean loss at {least:.0%} of MACs {ours:.1f} points, Torch-Pruning's "
            f"{theirs:.1f}. Largest difference of MACs {max(row['macs'] for row in rows):.1%}."
        )
    return lines


def _schedules(rows: Sequence[Row]) -> list[str]:
    """Lay the schedules side by side, paired by seed."""
    groups: dict[tuple[str, float], dict[int, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        kind, seed, *key = row["key"]
        if kind == "schedule":
            model, schedule, share = key
            groups[model, share][seed][schedule] = row
    lines = [SCHEDULE_HEAD]
    for (model, share), by_seed in groups.items():
        whole = [runs for runs in by_seed.values() if {"one_shot", "linear", "cubic"} <= runs.keys()]
        if not whole:
            continue
        tuned = {name: [runs[name]["tuned"] for runs in whole] for name in ("one_shot", "linear", "cubic")}
        dense = statistics.fmean(runs["cubic"]["dense"] for runs in whole)
        cells = [model, f"{share:.0%}", f"{dense:.1f}", *(f"{statistics.fmean(v):.1f}" for v in tuned.values())]
        for other in ("one_shot", "linear"):
            cells.append(str(interval([a - b for a, b in zip(tuned["cubic"], tuned[other], strict=True)])))
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 1 else []


def _mean(rows: Sequence[Row], *path: str) -> float:
    """Return the mean of one figure of some rows."""
    values = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value[key]
        values.append(float(value))
    return statistics.fmean(values)
