"""`import ftrain` costs next to nothing in a process that already has torch, numpy and optree.

Measured in new processes, because this one has everything imported; the best of three, because the machine is shared.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MAX_MILLISECONDS = 60
MAX_MEGABYTES = 15
HEAVY = {
    "IPython",
    "jax",
    "matplotlib",
    "orbax",
    "pandas",
    "rich",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
    "wandb",
}

PROBE = """
import gc, json, resource, sys, time
import numpy, optree, torch

# torch leaves a million objects that the collector is due to walk (80 ms): it would fall on whatever is imported next, or not.
gc.collect()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

modules, megabytes, start = set(sys.modules), resident(), time.process_time()
import ftrain
ftrain.fit, ftrain.init, ftrain.train_step
seconds = time.process_time() - start
print(json.dumps({
    "milliseconds": 1e3 * seconds,
    "megabytes": resident() - megabytes,
    "modules": sorted(set(sys.modules) - modules),
}))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    if not sys.platform.startswith("linux"):
        pytest.skip("resident memory is read from /proc")
    package = Path(importlib.util.find_spec("ftrain").origin).parent
    # The package that this process would import, with its bytecode, as an installation has it. Processor time is taken, since
    # the tests that run beside this one take time from the clock on the wall.
    environment = os.environ | {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": ""}
    runs = []
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", PROBE],
            env=environment,
            cwd=tmp_path_factory.mktemp("probe"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        runs.append(json.loads(run.stdout.splitlines()[-1]))
    return runs


def test_import_is_quick(probes):
    times = [run["milliseconds"] for run in probes]
    assert min(times) <= MAX_MILLISECONDS, f"{times} ms"


def test_import_takes_little_memory(probes):
    sizes = [run["megabytes"] for run in probes]
    assert min(sizes) <= MAX_MEGABYTES, f"{sizes} MB"


def test_import_leaves_heavy_packages_alone(probes):
    imported = set(probes[0]["modules"])
    heavy = {name for name in imported for root in HEAVY if name == root or name.startswith(f"{root}.")}
    assert not heavy, f"`import ftrain` imported {sorted(heavy)[:10]}; import them inside the function that uses them"
