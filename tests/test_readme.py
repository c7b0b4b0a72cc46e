"""The examples of the README run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
CHECK = """
assert small.net[0].weight.shape[0] < 32, small
assert type(small.net[0]) is nn.Conv2d
"""


def test_the_usage_example_is_short() -> None:
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 16


@pytest.mark.parametrize(
    ("code", "check"),
    [
        pytest.param(EXAMPLES[0], CHECK, id="callback"),
        pytest.param(
            "import torch\nfrom torch import nn\n" + EXAMPLES[1], "assert small[0].weight.shape[0] == 4", id="mutator"
        ),
        pytest.param(
            EXAMPLES[2],
            "assert (type(small[0]), *small[0].gain.shape) == (ScaledConv, 4), small",
            id="own op and layer",
        ),
    ],
)
def test_an_example_runs(code: str, check: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(code + check, encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
