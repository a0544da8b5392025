"""The recipe of docs/slurm.md, as it stands there: its job script and its program, with an `srun` and a `scontrol` of ours.

The signal is sent to the process of the job script, as `--signal=B:` does it. So that it comes at a known step, the program runs under a
driver that stops there until the signal was sent; the page itself is not changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .test_docs import ROOT, python_blocks

PAGE = (ROOT / "docs" / "slurm.md").read_text()

DRIVER = """
import hashlib, json, os, pathlib, runpy, time
import ftrain as ft

pause_at = int(os.environ.get("PAUSE_AT", "0"))
fit = ft.fit


def pause(state, event):
    if event.kind == "step" and event.step == pause_at:
        pathlib.Path("paused").touch()
        until = time.monotonic() + 60
        while not pathlib.Path("sent").exists():
            assert time.monotonic() < until, "no signal was sent"
            time.sleep(0.005)
    return state


def watched(*args, **options):
    result = fit(*args, hooks=[pause], **options)
    leaves = [leaf.detach().contiguous().numpy().tobytes() for leaf in ft.tree.leaves(result.state)]
    report = {
        "reason": result.reason,
        "step": result.state.counters().step,
        "state": hashlib.sha256(b"".join(leaves)).hexdigest(),
        "history": [[r.step, r.epoch, r.samples, r.split, dict(r.metrics)] for r in result.history],
    }
    pathlib.Path("report.json").write_text(json.dumps(report))
    return result


ft.fit = watched
runpy.run_path("train.py", run_name="__main__")
"""


def job_script() -> str:
    (script,) = re.findall(r"^```sh\n(#!/bin/bash\n.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return script


class Cluster:
    """A folder in which the job is run, again and again."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        (block,) = python_blocks(PAGE)
        (folder / "train.py").write_text(block.code)
        (folder / "job.sh").write_text(job_script())
        (folder / "driver.py").write_text(DRIVER)
        self.command("scontrol", 'echo "$@" >> scontrol.log; exit ${SCONTROL_FAILS:-0}')
        self.command("srun", 'exec "$@"')  # the real one hands signals on to the program; here it becomes the program
        self.command("python", f'test "$*" = "-u train.py" && exec {sys.executable} -u driver.py')
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": "1",
            **environment,
        }

    def command(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def start(self, *, pause_at: int = 0, send: signal.Signals | None = None) -> int:
        """Run the job script; with `send`, signal its process while the program is at that step. Its exit code."""
        for name in ("paused", "sent", "report.json"):
            (self.folder / name).unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            job = subprocess.Popen(
                ["bash", "job.sh"],
                cwd=self.folder,
                env={**self.environment, "PAUSE_AT": str(pause_at)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what a dead shell leaves running can be found
            )
        try:
            if send is not None:
                while not (self.folder / "paused").exists():
                    assert job.poll() is None, self.log
                    time.sleep(0.01)
                job.send_signal(send)
                (self.folder / "sent").touch()
            return job.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of it has ended
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def report(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / "report.json").read_text())
        return found

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "scontrol.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, object]:
    """The report of a run that nothing ever stopped."""
    cluster = Cluster(tmp_path_factory.mktemp("whole"), SLURM_JOB_ID="1")
    assert cluster.start() == 0, cluster.log
    assert cluster.requeued == []
    assert cluster.report["reason"] == "epochs"
    assert cluster.report["step"] == 160
    return cluster.report


ALONE = {"SLURM_JOB_ID": "4711"}
ARRAY = {"SLURM_JOB_ID": "4715", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "names", "moments"),
    [(ALONE, ("4711", "run-0"), (45, 100)), (ARRAY, ("4711_3", "run-3"), (70,))],
    ids=["job", "array"],
)
def test_a_job_that_is_requeued_is_one_run(tmp_path, whole, environment, names, moments):
    job, folder = names
    cluster = Cluster(tmp_path, **environment)
    for times, at in enumerate(moments, start=1):  # in the middle of an epoch of 32 steps, and between two records
        assert cluster.start(pause_at=at, send=signal.SIGUSR1) == 75, cluster.log
        assert (cluster.report["reason"], cluster.report["step"]) == ("preempted", at)
        assert cluster.requeued == [f"requeue {job}"] * times
        assert str(at) in os.listdir(tmp_path / folder)  # complete when the job is requeued
    assert cluster.start() == 0, cluster.log
    assert cluster.report == whole
    assert cluster.requeued == [f"requeue {job}"] * len(moments)


@pytest.mark.slow
def test_a_job_that_is_cancelled_is_not_requeued(tmp_path, whole):
    cluster = Cluster(tmp_path, **ALONE)
    assert cluster.start(pause_at=45, send=signal.SIGTERM) == 1, cluster.log
    assert (cluster.report["reason"], cluster.report["step"]) == ("terminated", 45)
    assert cluster.requeued == []
    assert cluster.start() == 0, cluster.log  # submitted again by hand
    assert cluster.report == whole
    assert cluster.start() == 0, cluster.log  # and once more: it is complete
    assert cluster.report == whole
    assert cluster.log.count("done:") == 2


def test_a_requeue_that_fails_is_seen(tmp_path):
    cluster = Cluster(tmp_path, **ALONE, SCONTROL_FAILS="3")
    assert cluster.start(pause_at=5, send=signal.SIGUSR1) == 1
    assert "CalledProcessError" in cluster.log
    assert cluster.requeued == ["requeue 4711"]
    assert "5" in os.listdir(tmp_path / "run-0")


def test_without_exec_the_shell_dies_of_the_signal(tmp_path):
    """Why the page says `exec`: the shell that waits for the program has no handler, and the program hears nothing."""
    cluster = Cluster(tmp_path, **ALONE)
    script = tmp_path / "job.sh"
    script.write_text(
        script.read_text().replace("exec srun", "srun") + "exit\n"
    )  # else bash puts the last command in its place itself
    assert cluster.start(pause_at=5, send=signal.SIGUSR1) == -signal.SIGUSR1
    assert cluster.requeued == []


def test_the_job_script_asks_for_the_signal():
    script = job_script()
    assert "#SBATCH --signal=B:USR1@120" in script
    assert "#SBATCH --requeue" in script
    assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0
