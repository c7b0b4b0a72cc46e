"""The code of a page, run block by block, and what it prints.

What a page can hold, between ``` and ```:

- `python`, `shell`, `yaml`: run in order, all of a page in one process and one folder. One that begins with a comment
  `# name.py` is the content of that file.
- `shell`: a line that begins with `lightning-prune` is run in that process, any other by bash. `examples` and `configs`
  are those of the repository.
- `yaml`: with `trainer:` a configuration of LightningCLI, else arguments of `PruningCallback`.
- `text`: what the block before it prints, line by line, where `...` stands for anything. `SomeError: message` at the
  end says that the block fails so; lines of a message may be broken anywhere. `text figures` are those of one machine:
  on others they differ, and are not compared.

`python -m tests.documents docs/unit.md` writes what is printed into the page, where the page says something else.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from omegaconf import OmegaConf

from lightning_prune import PruningCallback
from lightning_prune.cli import main as lightning_prune

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(?P<language>\w*( figures)?)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (?P<name>\w+\.(py|yaml))\n")
FIGURE = re.compile(r"\d[\d,.]*(e[+-]?\d+)?")
FAILED = re.compile(r"^(\w*Error: |lightning-prune \w+: )", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One block of code, and what the page shows of its output; None where it shows nothing."""

    language: str
    text: str
    line: int
    shown: str | None = None
    has_figures: bool = False

    def prints(self, printed: str) -> bool:
        """Return whether the page shows what was printed, or nothing at all."""
        return self.shown is None or matches(self.shown, printed, has_figures=self.has_figures)


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page in order; a `text` belongs to the one before it."""
    found: list[Block] = []
    for match in FENCED.finditer(page):
        language, text = match["language"], match["text"]
        line = page.count("\n", 0, match.start()) + 1
        if not language.startswith("text"):
            found.append(Block(language, text, line))
        elif not found or found[-1].shown is not None:
            raise AssertionError(f"line {line}: output of no block")
        else:
            found[-1] = replace(found[-1], shown=text, has_figures=language == "text figures")
    return found


def matches(shown: str, printed: str, *, has_figures: bool = False) -> bool:
    """Return whether a page shows what was printed; figures, and how wide they are, may be of one machine."""
    if FAILED.search(shown):
        shown, printed = " ".join(shown.split()), " ".join(printed.split())
    if has_figures:
        shown, printed = (re.sub(" +", " ", FIGURE.sub("0", text)) for text in (shown, printed))
    pattern = ".*?".join(re.escape(part) for part in _clean(shown).split("..."))
    return re.fullmatch(pattern, _clean(printed), re.DOTALL) is not None


def _clean(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def run(page: str, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page in a folder; yield each with what it printed.

    Raises:
        AssertionError: A block fails, and the page does not say so.
    """
    prepare(folder)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        out, problem = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(problem):
                _run_block(block, names)
        except (Exception, SystemExit) as error:  # told, and compared with what the page says
            print(f"{type(error).__name__}: {error}" if not isinstance(error, ShellError) else error, file=out)
            if block.shown is None or not FAILED.search(block.shown):
                raise AssertionError(f"line {block.line}: {out.getvalue()}{problem.getvalue()[-2000:]}") from error
        yield block, out.getvalue()


def prepare(folder: Path) -> None:
    """Make a folder the place where code runs, as a user's would be."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["COLUMNS"] = "100"
    torch.set_num_threads(1)
    for name in ("examples", "configs"):
        Path(name).symlink_to(ROOT / name)


class ShellError(Exception):
    """A command ended with another code than 0."""


def _run_block(block: Block, names: dict[str, Any]) -> None:
    file = FILE.match(block.text)
    if file:
        Path(file["name"]).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, "model.py", "exec"), names)
    elif block.language == "shell":
        for line in block.text.replace("\\\n", " ").splitlines():
            _run_command(line)
    elif block.language == "yaml":
        _configure(block.text)
    else:
        raise AssertionError(f"line {block.line}: a block of {block.language or 'no language'!r}, which nothing runs")


def _run_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "lightning-prune":
        torch.seed()  # another process would begin with other random numbers
        problem = io.StringIO()
        with redirect_stderr(problem):
            code = lightning_prune(words[1:])
        told = problem.getvalue()
    else:
        line = re.sub(r"^python\b", shlex.quote(sys.executable), line)
        done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, check=False)
        code, told = done.returncode, done.stderr
        print(done.stdout, end="")
    if code:
        raise ShellError(told.strip())


def _configure(text: str) -> None:
    """Make what a configuration says."""
    values = OmegaConf.to_container(OmegaConf.create(textwrap.dedent(text)))
    assert isinstance(values, dict), "a configuration is a mapping"
    if "trainer" not in values:
        PruningCallback(**values)
        return
    Path("configuration.yaml").write_text(text, encoding="utf-8")
    words = ["--config", "configuration.yaml", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    LightningCLI(BoringModel, BoringDataModule, args=words, run=False, parser_kwargs={"parser_mode": "omegaconf"})


def failures(page: str, folder: Path) -> list[str]:
    """Return what of a page is not so, each with its line."""
    found = []
    try:
        for block, printed in run(page, folder):
            if not block.prints(printed):
                found.append(f"line {block.line} prints\n{printed}\nthe page says\n{block.shown}")
    except AssertionError as error:
        found.append(str(error))
    return found


def rewritten(page: str, folder: Path) -> str:
    """Return the page with what its code prints."""
    for block, printed in list(run(page, folder)):
        if not block.prints(printed):
            before = f"{block.text}```"
            head, tail = page.split(before, 1)
            page = head + before + tail.replace(f"\n{block.shown}```", f"\n{_set(printed)}\n```", 1)
    return page


def _set(printed: str) -> str:
    """Return an output as a page shows it: long messages are broken."""
    if not FAILED.search(printed):
        return _clean(printed)
    broken: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", **broken) for line in printed.splitlines())


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        path.write_text(rewritten(path.read_text(encoding="utf-8"), Path(name)), encoding="utf-8")
