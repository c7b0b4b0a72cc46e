"""The figures of a report, as PNG in colors for a light or a dark page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

__all__ = ["THEMES", "can_draw", "draw_course", "draw_units"]

THEMES: dict[str, dict[str, str]] = {
    "light": {"text": "#1f2328", "grid": "#d1d9e0", "dense": "#c4ccd4", "first": "#0969da", "second": "#bc4c00"},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "dense": "#444c56", "first": "#4493f8", "second": "#f0883e"},
}
_SIZE, _DOTS = (6.0, 4.0), 150  # inches, and dots in each: sharp on a phone, and some ten kilobytes


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw_course(document: Mapping[str, Any], theme: str) -> bytes:
    """Draw the metric and what remains over optimizer steps, with the steps of the schedule marked.

    Args:
        document: The report.
        theme: Name of `THEMES`.

    Returns:
        A PNG.
    """
    colors, steps, metric = THEMES[theme], document["steps"], document["metric"]
    at_readings, at_steps = _positions(document)
    with _figure(theme, _SIZE) as (figure, file):
        panels = figure.subplots(1 if metric is None else 2, sharex=True, squeeze=False)[:, 0]
        for panel in panels:
            for place, step in zip(at_steps, steps, strict=True):
                panel.axvline(place, color=colors["second" if step["restored"] else "grid"], linestyle="--", zorder=0)
        if metric is not None:
            points = [(x, r["metrics"].get(metric)) for x, r in zip(at_readings, document["readings"], strict=True)]
            known = [(x, y) for x, y in points if y is not None]
            panels[0].plot(
                [x for x, _ in known], [y for _, y in known], color=colors["first"], marker="o", markersize=3
            )
            panels[0].set_ylabel(metric)
        end = max([*at_readings, *at_steps, 0])
        for key, color, style in (("macs", "first", "-"), ("params", "second", "--")):
            shares = [100.0, *(100 * step["remains"][key] for step in steps)]
            places, shares = [0, *at_steps, end], [*shares, shares[-1]]
            panels[-1].step(places, shares, where="post", color=colors[color], linestyle=style, label=key)
        panels[-1].set(ylabel="remains, %", ylim=(0, 105), xlabel="optimizer steps")
        panels[-1].legend()
    return file.getvalue()


def draw_units(document: Mapping[str, Any], theme: str) -> bytes:
    """Draw the channels of each unit, kept before dense; units have the numbers of the table.

    Args:
        document: The report.
        theme: Name of `THEMES`.

    Returns:
        A PNG.
    """
    colors, units = THEMES[theme], document["units"]
    numbers = range(1, len(units) + 1)
    with _figure(theme, (_SIZE[0], 2.4)) as (figure, file):
        axes = figure.subplots()
        for key, color, label in (("num_channels", "dense", "dense"), ("kept", "first", "kept")):
            axes.bar(numbers, [unit[key] for unit in units], color=colors[color], label=label)
        axes.set(xlabel="unit", ylabel="channels", xlim=(0.4, len(units) + 0.6))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return file.getvalue()


def _positions(document: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return where readings and steps stand; a second `fit`, which counts from zero again, follows the first."""
    events = [(r["after_steps"], 0, r["global_step"]) for r in document["readings"]]
    events += [(index, 1, step["global_step"]) for index, step in enumerate(document["steps"])]
    found: tuple[list[int], list[int]] = ([], [])
    offset = last = 0
    for _, kind, step in sorted(events, key=lambda event: event[:2]):  # stable: readings stay in their order
        if step < last:
            offset += last
        last = step
        found[kind].append(step + offset)
    return found


@contextmanager
def _figure(theme: str, size: tuple[float, float]) -> Iterator[tuple[Any, io.BytesIO]]:
    """Give a figure to draw on, whatever the settings of the user, and the file that it is written to at the end."""
    from matplotlib import style  # optional, and slow to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = THEMES[theme]
    names = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    settings = {
        **dict.fromkeys(names, colors["text"]),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), colors["grid"]),
        "text.parse_math": False,  # names may hold dollars
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "legend.frameon": False,
    }
    file = io.BytesIO()
    with style.context(["default", settings]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in letters that the font lacks
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        yield figure, file
        figure.savefig(file, format="png", dpi=_DOTS, metadata={"Software": None})
