"""Run a script that starts a process of its own for the second rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# what gloo has running at the end of a process may abort it
END = """
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def two_processes(script: str, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = path / "run.py"
    file.write_text(script + END, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), *arguments]
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=200, check=False)
