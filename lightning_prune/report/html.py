"""A report as one page of HTML: no script, nothing from outside, and every name of the user escaped."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from lightning_prune.report.figures import can_draw, draw_course, draw_units

__all__ = ["render"]

_LABELS = {
    "macs": "MACs",
    "params": "parameters",
    "channels": "channels of all units",
    "memory": "activation bytes",
}

_LAYERS = 8  # of a unit that are named; the JSON has all


def render(document: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        document: What `make_document` returned.

    Returns:
        HTML; the figures are in it as PNG, or missing where matplotlib is.
    """
    title = f"Pruning report: {document['model']['name']}"
    sections = (_headline, _course, _steps, _final, _units, _asked, _frozen)
    body = "\n".join([f"<h1>{escape(title)}</h1>", *(section(document) for section in sections)])
    template = Template((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body=body)


# Parts of a page


def _number(value: float | None, form: str = ".4g") -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:{form}}"


def _table(columns: Mapping[str, str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Return a table that scrolls by itself where the page is narrow.

    Args:
        columns: Header -> "name" (long words, or a pair of them and words in small print), "number" (to the right),
            "share" (a number in [0, 1], with a bar) or "".
        rows: One cell for each column.
        caption: A sentence before it; may be empty.
    """
    kinds = list(columns.values())
    head = "".join(f"<th{_style(kind)}>{escape(name)}</th>" for name, kind in columns.items())
    body = "".join(
        f"<tr>{''.join(_cell(value, kind) for value, kind in zip(row, kinds, strict=True))}</tr>\n" for row in rows
    )
    told = f'<p class="soft">{escape(caption)}</p>\n' if caption else ""
    return f'{told}<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def _style(kind: str) -> str:
    return f' class="{"number" if kind == "share" else kind}"' if kind else ""


def _cell(value: Any, kind: str) -> str:
    if kind == "share":
        return f'<td class="number share" style="--share:{value:.4f}">{value:.1%}</td>'
    large, small = value if isinstance(value, tuple) else (value, "")
    more = f'<br><span class="soft">{escape(small)}</span>' if small else ""
    return f"<td{_style(kind)}>{escape(str(large))}{more}</td>"


def _picture(document: Mapping[str, Any], draw: Callable[[Mapping[str, Any], str], bytes], words: str) -> str:
    """Return a figure in the colors of the page, or nothing without matplotlib."""
    if not can_draw():
        return ""
    light, dark = (f"data:image/png;base64,{base64.b64encode(draw(document, t)).decode()}" for t in ("light", "dark"))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(words)}"></picture>'
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


# Sections


def _headline(document: Mapping[str, Any]) -> str:
    target, costs, metric = document["target"], document["final"]["costs"], document["metric"]
    cards = [(f"{costs[key]['remains']:.1%}", f"of the {word} remain", "")
             for key, word in (("macs", "MACs"), ("params", "parameters"))]  # fmt: skip
    if metric is not None:
        ends = document["final"]["metrics"][metric]
        change = "" if ends["difference"] is None else f" ({_number(ends['difference'], '+.4g')})"
        told = f"{metric} before pruning, and at the end{change}"
        cards.append((f"{_number(ends['before'])} → {_number(ends['final'])}", told, ""))
    cards.append(
        ("met", "the target", "good") if target["is_met"] else ("not met", f"the target: {target['text']}", "bad")
    )
    items = "".join(
        f'<li><strong class="{color}">{escape(big)}</strong><span class="soft">{escape(small)}</span></li>'
        for big, small, color in cards
    )
    when = f"{document['ended']}; written {document['written']}"
    return "\n".join(
        [f'<p class="soft">{escape(when)}</p>', f'<ul class="cards">{items}</ul>', *map(_note, document["remarks"])]
    )


def _course(document: Mapping[str, Any]) -> str:
    picture = _picture(document, draw_course, "The metric, and what remains of the costs, over optimizer steps")
    if not picture:
        return _note("The figures are missing, as matplotlib is: pip install 'lightning-prune[plots]'.")
    words = "A dashed line is a step of the schedule"
    if any(step["restored"] for step in document["steps"]):
        words += ", the colored one where a guard brought an earlier structure back"
    return f'<h2>Over time</h2>\n<p class="soft">{words}.</p>\n{picture}'


def _steps(document: Mapping[str, Any]) -> str:
    metric = document["metric"]
    around = ("before", "after", "recovered") if metric is not None else ()
    columns = dict.fromkeys(("#", "epoch", "step", "progress", "MACs", "params", *around), "number")
    rows = []
    for number, step in enumerate(document["steps"], 1):
        remains, read = step["remains"], step["metrics"].get(metric, {})
        rows.append(
            [
                number,
                step["epoch"],
                _number(step["global_step"]),
                "restored" if step["restored"] else f"{step['progress']:.0%}",
                f"{remains['macs']:.1%}",
                f"{remains['params']:.1%}",
                *(_number(read.get(key)) for key in around),
            ]
        )
    caption = (
        f"{metric}: before is the last value before the step, after the first one that follows it, and recovered the "
        "last one before the next step."
    )
    table = _table(columns, rows, caption if around else "") if rows else '<p class="soft">None: nothing fired.</p>'
    return f"<h2>Steps of the schedule</h2>\n{table}"


def _final(document: Mapping[str, Any]) -> str:
    final = document["final"]
    costs = _table(
        {"cost": "", "dense": "number", "pruned": "number", "remains": "share"},
        [
            (_LABELS[key], _number(row["dense"]), _number(row["pruned"]), row["remains"])
            for key, row in final["costs"].items()
        ],
        "MACs and activation bytes are those of one example.",
    )
    metrics = _table(
        {"metric": "name", "before": "number", "final": "number", "difference": "number"},
        [
            (name, _number(row["before"]), _number(row["final"]), _number(row["difference"], "+.4g"))
            for name, row in final["metrics"].items()
        ],
        "Before is the last value before the first step, final the last one of all.",
    )
    return "\n".join(["<h2>Dense and pruned</h2>", costs, metrics if final["metrics"] else ""])


def _units(document: Mapping[str, Any]) -> str:
    picture = _picture(document, draw_units, "Channels of each unit, kept and dense")
    columns = {"#": "number", "unit": "name", "dense": "number", "kept": "number", "remains": "share"}
    rows = []
    for number, unit in enumerate(document["units"], 1):
        remarks = [unit["axis"]] * (unit["axis"] != "channels") + [*unit["remarks"]]
        layers, more = unit["layers"][:_LAYERS], len(unit["layers"]) - _LAYERS
        name = unit["name"] + (f" ({', '.join(remarks)})" if remarks else "")
        small = ", ".join(layers) + (f" and {more} more" if more > 0 else "")
        kept, dense = unit["kept"], unit["num_channels"]
        rows.append((number, (name, small), _number(dense), _number(kept), kept / dense))
    return f"<h2>Units</h2>\n{picture}\n{_table(columns, rows)}"


def _asked(document: Mapping[str, Any]) -> str:
    model, schedule, target = document["model"], document["schedule"], document["target"]
    name = model["name"] + (f", its part {model['submodule']}" if model["submodule"] else "")
    firings = f"{schedule['firings']} steps, from {schedule['unit']} {schedule['begin']} to {schedule['last']}"
    rows = [
        ("model", name),
        ("traced with", ", ".join(model["example_input"])),
        ("target", target["text"]),
        *(
            (f"bound on {b['cost']}", f"{b['wanted']:,} wanted, {_number(b['reached'])} reached")
            for b in target["bounds"]
        ),
        ("schedule", f"{schedule['kind']}: {firings}"),
        *((key, value) for key, value in document["arguments"].items() if value not in ("()", "{}")),
        *((f"recovery: {part['name']}", _listed(part["arguments"])) for part in document["recovery"]),
        *document["versions"].items(),
    ]
    return f"<h2>What was asked</h2>\n{_table({'': '', 'value': 'name'}, rows)}"


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _frozen(document: Mapping[str, Any]) -> str:
    columns = {"tensor": "name", "axis": "number", "positions": "number", "reason": "name"}
    rows = [(f["tensor"], f["axis"], _number(f["size"]), f["reason"]) for f in document["frozen"]]
    told = "".join(map(_note, document["notes"]))
    return (
        f"<details><summary>What stays, and why ({len(rows)} axes)</summary>\n{told}{_table(columns, rows)}</details>"
    )
