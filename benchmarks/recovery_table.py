"""From the rows of the recovery benchmark to its table: means over seeds, paired differences to plain pruning."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.quality_table import interval

Row = dict[str, Any]

HEAD = """\
| network | MACs | recovery | just pruned | after training | difference to plain |
| --- | ---: | --- | ---: | ---: | ---: |"""


def render(rows: Sequence[Row]) -> str:
    """Return the table in Markdown; of each setting only the seeds that the plain one has too."""
    plain = {tuple(row["key"][:3]): row for row in rows if row["key"][3] == "plain"}
    groups: dict[tuple[str, float, str], list[Row]] = defaultdict(list)
    for row in rows:
        model, _, share, setting = row["key"]
        if tuple(row["key"][:3]) in plain:
            groups[model, share, setting].append(row)
    most = max(map(len, groups.values()), default=0)
    lines = [HEAD]
    for (model, share, setting), group in groups.items():
        if len(group) < most:  # of a run that was stopped, what is whole
            continue
        means = [f"{statistics.fmean(row[when] for row in group):.1f}" for when in ("pruned", "tuned")]
        gains = [row["tuned"] - plain[tuple(row["key"][:3])]["tuned"] for row in group]
        cells = [model, f"{share:.0%}", setting, *means, "" if setting == "plain" else str(interval(gains))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
