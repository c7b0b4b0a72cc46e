"""The walls between the rooms: who may import whom, and that nothing below the callback needs Lightning."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lightning_prune"
LEAVES = {"errors", "plan"}  # open to every room but errors itself
ALL = {"*"}  # but cli, which nothing imports

# The rooms that a room may import, beside the leaves. A name with a dot is one file of a folder.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "plan": set(),
    "graph": set(),
    "mutables": set(),
    "ops": {"mutables"},
    "units": {"graph", "ops", "mutables"},
    "mutator": {"graph", "units", "ops", "mutables"},
    "importance": {"units"},
    "schedule": set(),
    "targets": {"graph.cost"},
    "latency": {"graph.cost", "mutator", "targets", "export"},
    "sensitivity": {"graph.generators", "ops", "units", "mutator", "importance"},
    "recovery": {"units", "mutator"},
    "compact": {"mutator", "ops"},
    "export": {"mutator", "ops"},
    "checkpoint": {"ops", "compact", "mutator", "units"},
    "report": {"graph.cost"},
    "callback": ALL,
    "cli": ALL,
    "__init__": ALL,
}
WITHOUT_TORCH = {"errors", "schedule"}
LIGHTNING = {"lightning", "pytorch_lightning"}
WITH_LIGHTNING = {"callback", "cli", "__init__"}
LAZY_LIGHTNING = {"sensitivity", "recovery"}  # inside functions only
NEVER = {"torchvision", "timm", "transformers", "torch_pruning"}

FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [path.relative_to(PACKAGE).as_posix() for path in FILES]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of everything that is imported, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"Relative import at line {node.lineno}; write the full name."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level_imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(ast.Module([node], []))


def may(room: str, target: list[str]) -> bool:
    allowed = MAY_IMPORT[room]
    names = {target[0], ".".join(target[:2])}
    if room == target[0] or (target[0] in LEAVES and room != "errors"):
        return True
    return bool(names & allowed) or (allowed == ALL and target[0] != "cli")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_room_imports_only_what_the_table_allows(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{path.name} is a room that the table does not know; give it a line in MAY_IMPORT."
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "lightning_prune" and parts[1:]:
            assert may(room, parts[1:]), f"{room} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_room_knows_only_the_packages_it_may(path: Path) -> None:
    room = room_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    packages = {name.split(".")[0] for name in imported(tree)}
    assert not packages & NEVER
    if room in WITHOUT_TORCH:
        assert "torch" not in packages
    if room in LAZY_LIGHTNING:
        packages = {name.split(".")[0] for name in top_level_imported(tree)}
    if room not in WITH_LIGHTNING:
        assert not packages & LIGHTNING


IMPORT_WITHOUT_LIGHTNING = """
import importlib, sys, types
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "pytorch_lightning"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Block())
package = types.ModuleType("lightning_prune")  # without its __init__, which gives the callback
package.__path__ = [sys.argv[1]]
sys.modules["lightning_prune"] = package
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def test_rooms_below_the_callback_import_with_lightning_blocked() -> None:
    files = [path.relative_to(PACKAGE.parent) for path in FILES if room_of(path) not in WITH_LIGHTNING]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    command = [sys.executable, "-W", "error", "-c", IMPORT_WITHOUT_LIGHTNING, str(PACKAGE), *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_block_works() -> None:
    command = [sys.executable, "-c", IMPORT_WITHOUT_LIGHTNING + "import lightning", str(PACKAGE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "AssertionError: lightning was imported" in result.stderr
