"""What README and the pages of docs/ say is run as it stands, one page in one process."""

from __future__ import annotations

import inspect
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lightning_prune
from lightning_prune import PruningCallback
from lightning_prune.cli.main import VERBS
from tests.documents import PAGES, ROOT, blocks_of, failures, matches

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["tests.documents"])  # imported once; each page runs in a copy of that process
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
DOCS = ROOT / "docs"


def run_apart(*arguments: Any) -> list[str]:
    with ProcessPoolExecutor(1, mp_context=FRESH) as pool:
        return pool.submit(failures, *arguments).result()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    found = run_apart(page.read_text(encoding="utf-8"), tmp_path)
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_its_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing


def test_the_usage_example_of_the_readme_is_short() -> None:
    first = next(block for block in blocks_of(PAGES[0].read_text(encoding="utf-8")) if block.language == "python")
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 16


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_index_has_every_page() -> None:
    assert set(LINK.findall(text_of("README.md"))) >= {page.name for page in DOCS.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("name", lightning_prune.__all__)
def test_every_public_name_is_explained(name: str) -> None:
    assert any(re.search(rf"\b{name}\b", page.read_text(encoding="utf-8")) for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", list(inspect.signature(PruningCallback).parameters))
def test_every_argument_of_the_callback_is_explained(name: str) -> None:
    assert f"`{name}`" in text_of("callback.md")


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_is_shown_with_its_output(verb: str) -> None:
    shown = [block for block in blocks_of(text_of("command_line.md")) if block.shown]
    assert any(f"lightning-prune {verb} " in block.text for block in shown)


def page_of(*parts: tuple[str, str]) -> str:
    return "\n".join(f"```{language}\n{text}\n```\n" for language, text in parts)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        pytest.param(page_of(("python", "1 / 0")), "line 1: ZeroDivisionError", id="code that raises"),
        pytest.param(page_of(("python", "print(1)"), ("text", "2")), "line 1 prints\n1\n", id="another output"),
        pytest.param(page_of(("python", "print(1)"), ("text", "ValueError: no")), "prints\n1\n", id="no error"),
        pytest.param(page_of(("python", "1 / 0"), ("text", "ValueError: no")), "ZeroDivisionError", id="another error"),
        pytest.param(page_of(("shell", "ls nowhere")), "nowhere", id="a command that fails"),
        pytest.param(page_of(("shell", "lightning-prune describe x")), "No such file", id="a verb that fails"),
        pytest.param(page_of(("yaml", "targets: 0.5")), "unexpected keyword argument 'targets'", id="no argument"),
        pytest.param(page_of(("yaml", "trainer: {callback: []}")), "callback", id="no configuration"),
        pytest.param(page_of(("", "x")), "which nothing runs", id="no language"),
        pytest.param(page_of(("text", "x")), "output of no block", id="no block"),
    ],
)
def test_a_page_that_is_wrong_is_found(page: str, message: str, tmp_path: Path) -> None:
    found = run_apart(page, tmp_path)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    "parts",
    [
        [("python", "# one.py\nx = 1"), ("python", "from one import x\nprint(x)"), ("text", "1")],
        [("python", "x = 1"), ("python", "raise ValueError(f'{x} is\\nwrong')"), ("text", "ValueError: 1\nis wrong")],
        [("yaml", "# one.yaml\na: 1"), ("shell", "cat one.yaml  # it is there"), ("text", "# one.yaml\na: 1")],
        [("shell", "lightning-prune describe x"), ("text", "lightning-prune describe: ...No such\nfile...")],
    ],
    ids=["files of code", "errors", "files of values", "verbs that fail"],
)
def test_a_page_may_have(parts: list[tuple[str, str]], tmp_path: Path) -> None:
    assert run_apart(page_of(*parts), tmp_path) == []


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("a\nb", "a  \nb\n", True),
        ("a ... c", "a b\nb c", True),
        ("a  b", "a b", False),
        ("a", "a\nb", False),
        ("ValueError: a b", "ValueError: a\n  b", True),
    ],
    ids=["spaces at the end", "anything", "spaces inside", "a line more", "a broken message"],
)
def test_outputs_are_compared_line_by_line(shown: str, printed: str, is_same: bool) -> None:
    assert matches(shown, printed) == is_same


@pytest.mark.parametrize(
    ("printed", "is_same"),
    [("took 1.5 ms\nof 1,200", False), ("took  12 ms,\nof 7e-05", True)],
    ids=["another word", "other figures"],
)
def test_figures_of_one_machine_are_not_compared(printed: str, is_same: bool) -> None:
    assert matches("took 3.25 ms,\nof 1,234", printed, has_figures=True) == is_same
