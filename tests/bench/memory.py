"""Peak memory of training steps, in a process of its own: `python tests/bench/memory.py KIND`, with KIND one of `LABELS`.

What is measured: the resident memory that steady training steps need on top of the process. In order:

1. build model, optimizer and step, compile, run three steps;
2. drop every tensor of the training, give free memory back to the system, and read the resident size: the **baseline**. It holds
   the interpreter, torch, the compiler and the compiled program, but no parameter (the batches count to it too);
3. build the state anew (the same program is used again) and drop the module it was made from, run two steps, reset the kernel's high-water mark
   (`/proc/self/clear_refs`), run five more, and read the mark (`VmHWM`). The **peak** is that minus the baseline.

With `MALLOC_MMAP_THRESHOLD_=65536`, which this script's caller sets, every tensor of 64 KiB or more goes back to the system as soon
as it is freed, so that resident memory is live memory. A script that holds on to the module from which it made the state holds
the parameters once more; the hand-written loop has them in the module alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import children

LABELS = {
    "hand": "hand-written, fused AdamW",
    "donated": "ft.compile, donated",
    "kept": "ft.compile, not donated",
    "recipe_hand": "hand-written, fused AdamW",
    "recipe_donated": "ft.compile, donated",
    "parts_hand": "hand-written, fused AdamW",
    "parts_donated": "ft.compile, donated",
}
KINDS = ("hand", "donated", "kept")
RECIPE = ("recipe_hand", "recipe_donated")  # clipping, averages, bf16-mixed
PARTS = ("parts_hand", "parts_donated")  # eight micro-batches
STEPS = 5


def start(kind: str) -> subprocess.Popen[str]:
    """Begin to measure in another process; `children.finish` gives the result."""
    return children.start(__file__, kind, MALLOC_MMAP_THRESHOLD_="65536")


def _status(name: str) -> float:
    """A field of /proc/self/status, in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(name)


def _baseline() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _peak(run: Callable[[], object]) -> tuple[float, str]:
    """The highest resident memory while `run` runs, and how it was found."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _sampled(run), "VmRSS sampled each millisecond"
    run()
    return _status("VmHWM"), "VmHWM, reset through clear_refs"


def _sampled(run: Callable[[], object]) -> float:
    done, highest = threading.Event(), 0.0

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, _status("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return highest


def _hand(kind: str) -> Callable[[], Callable[[int], object]]:
    import cases
    import optimization

    if kind == "parts_hand":
        own = optimization.parts_large()
        return lambda: optimization.hand_parts(own)
    problem = cases.large()
    return lambda: cases.hand_eager(problem) if kind == "hand" else optimization.hand_recipe(problem)


def _ftrain(kind: str) -> Callable[[], Callable[[int], object]]:
    """The step is made and compiled once, the state for each run anew."""
    import cases
    import optimization

    import ftrain as ft

    problem = optimization.parts_large() if kind == "parts_donated" else cases.large()
    model = problem.model().to("meta")
    if kind == "recipe_donated":
        step, tx = optimization.recipe(model)
    elif kind == "parts_donated":
        step, tx = optimization.parts(model)
    else:
        tx = cases.ft_adamw()
        step = ft.train_step(model, cases.loss_fn, tx)
    fast = ft.compile(step, donate=kind != "kept")

    def build() -> Callable[[int], object]:
        state = step.init(ft.init(problem.model(), tx, seed=0))
        batches = problem.forever()

        def run(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                state, _metrics = fast(state, next(batches))

        return run

    return build


def main(kind: str) -> None:
    import torch

    torch.set_num_threads(1)
    build = _hand(kind) if kind.endswith("hand") else _ftrain(kind)
    run = build()
    run(3)
    del run
    before = _baseline()
    run = build()
    run(2)
    peak, how = _peak(lambda: run(STEPS))
    standing = _status("VmRSS")
    print(
        json.dumps(
            {
                "kind": kind,
                "peak_mb": round(peak - before, 1),
                "between_steps_mb": round(standing - before, 1),
                "baseline_mb": round(before, 1),
                "how": how,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
