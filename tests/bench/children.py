"""Measurements in a process of their own: a script that prints one line of JSON at its end."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start(script: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    """Begin to measure; `finish` gives the result. The process finds the same ftrain, and computes in one thread."""
    found = importlib.util.find_spec("ftrain")
    assert found is not None, "run.py has imported it"
    same = os.pathsep.join(filter(None, [str(Path(str(found.origin)).parents[1]), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": same, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, script, *args], env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} failed with status {process.returncode}:\n{errors}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found
