"""Kill a run at random moments, resume it each time, and compare what it ends with: `tests/torture.py` runs it.

Every fit is a process of its own, forked before torch has started a thread, so that a kill costs no import.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.resumable import differences, fit, lines_of, outcome

PATIENCE = 120.0  # seconds for one fit


def forked(work: Callable[[], object]) -> int:
    """Start a process that does the work and ends with status 0, or with 1 and the error on stderr."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:  # SIGTERM comes as one
        if type(error).__name__ != "SIGTERMException":
            traceback.print_exc()
    os._exit(status)


def fit_and_save(path: Path, options: dict[str, Any]) -> None:
    torch.save(outcome(fit(path, **options)), path / "outcome.pt")


def is_over(process: int) -> bool:
    return os.waitpid(process, os.WNOHANG)[0] == process


def wait_for(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def lines_in(path: Path) -> int:
    file = path / "lines.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_somewhere(process: int, path: Path, draw: random.Random) -> str | None:
    """Let a run write a few more lines, wait a moment, and end it; return how, or None if it was over before."""
    until, deadline = lines_in(path) + draw.randrange(6), time.monotonic() + PATIENCE
    while lines_in(path) < until:
        if is_over(process):
            return None
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            raise TimeoutError("a run went on without a line")
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.05))
    if is_over(process):
        return None
    kind = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    os.kill(process, kind)
    wait_for(process)
    return kind.name


def unlike(run: Path, logged: dict[str, dict[str, float]], kills: int) -> list[str]:
    """Return which lines of a run are not those of the whole one.

    Lightning saves a step before it logs it: a kill between the two loses the line of that step, with or without us.
    """
    again, problems = lines_of(run)
    problems += [f"logged other values of {key}" for key, line in again.items() if logged.get(key) != line]
    lost = logged.keys() - again.keys()
    of_steps = [key for key in lost if key.startswith("loss ")]
    return problems + [f"did not log {key}" for key in lost if len(of_steps) > kills or key not in of_steps]


def torture(path: Path, kills: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Kill and resume until there were so many kills; each run that comes to its end is compared.

    Args:
        path: Empty folder.
        kills: How many.
        seed: Of the moments.
        options: Of `fit`.

    Returns:
        How often which signal came, at how many lines of the log, how many runs were compared, and what differed.
    """
    draw, whole = random.Random(seed), path / "whole"
    whole.mkdir(parents=True)
    assert wait_for(forked(partial(fit_and_save, whole, options))) == 0, "the run that nobody stops fails"
    expected, (logged, _) = torch.load(whole / "outcome.pt", weights_only=True), lines_of(whole)
    found: dict[str, Any] = {"SIGKILL": 0, "SIGTERM": 0, "runs": 0, "moments": [], "differences": []}
    while found["SIGKILL"] + found["SIGTERM"] < kills:
        run = path / f"run{found['runs']}"
        run.mkdir()
        before = found["SIGKILL"] + found["SIGTERM"]
        while found["SIGKILL"] + found["SIGTERM"] < kills:
            process = forked(partial(fit_and_save, run, options))
            how = kill_somewhere(process, run, draw)
            if how is None:
                break
            found[how] += 1
            found["moments"].append(lines_in(run))
        if not (run / "outcome.pt").exists() and wait_for(forked(partial(fit_and_save, run, options))):
            found["differences"].append(f"run {found['runs']} does not resume")
            break
        ended = torch.load(run / "outcome.pt", weights_only=True)
        missing = (
            expected["metrics"].keys() - ended["metrics"].keys()
        )  # in memory only; the last process had no step left
        ended["metrics"] |= {name: expected["metrics"][name] for name in missing}
        found["differences"] += differences(expected, ended)
        found["differences"] += unlike(run, logged, found["SIGKILL"] + found["SIGTERM"] - before)
        found["runs"] += 1
        shutil.rmtree(run)
    return found
