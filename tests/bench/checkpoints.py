"""Checkpoints beside torch.save, torch.distributed.checkpoint and safetensors, side by side in each round.

    python tests/bench/checkpoints.py [--quick] [--rounds N] [--folder PATH]

`blocking` is how long the caller waits, `save` how long until the checkpoint is complete. torch.save does not sync to the disk; the others do.
Each round saves into fresh files and reads them from the page cache into fresh memory; the first round of all is dropped. The order is
turned in each round, so that what the disk still has to do falls on each in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import report
import torch
from rounds import Spread, ratio
from torch import Tensor

from ftrain.checkpoint.store import Store


class Case(NamedTuple):
    """So many tensors of so many numbers, and its bars: what, at most this many times, of whom, what of theirs."""

    name: str
    count: int
    numel: int
    bars: tuple[tuple[str, float, str, str], ...]


FEW = (
    ("blocking", 0.3, "torch.save", "save"),
    ("save", 1.3, "torch DCP", "save"),
    ("load", 1.0, "torch.save", "load"),
)
LARGE = Case("1.05 GB in 100 tensors", 100, 2621440, FEW)
LESS = Case("105 MB in 10 tensors", 10, 2621440, FEW)
MANY = Case("51 MB in 2000 tensors", 2000, 6400, (("save", 3.0, "torch.save", "save"),))
WAYS = ("ftrain", "torch.save", "torch DCP", "safetensors")
WHATS = ("blocking", "save", "load")
SAID = {"blocking": "thread blocked by a save", "save": "whole save", "load": "restore"}
THEIRS = {
    ("torch.save", "save"): "torch.save",
    ("torch.save", "load"): "torch.load",
    ("torch DCP", "save"): "torch DCP's save",
}
# Seconds of wall and of processor time (all threads) of the rounds, by way and by what.
Times = dict[str, dict[str, dict[str, list[float]]]]


def make(count: int, numel: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = 1 << (numel.bit_length() // 2)
    shape = (numel // side, side) if numel % side == 0 else (numel,)
    return {f"layers.{i}.weight": torch.randn(shape, generator=generator) for i in range(count)}


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def fresh() -> None:
    """Give freed memory back to the system. A checkpoint is restored once, into memory that the process has not used before: else some
    would be timed with the memory that another way of the same round had left, whose pages need no fault, and others without."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def one(way: str, tree: dict[str, Tensor], folder: Path, store: Store, step: int) -> dict[str, tuple[float, float]]:
    """One save and one load: seconds of wall and of processor time of each."""
    import safetensors.torch
    import torch.distributed.checkpoint as dcp

    path = folder / f"{way}-{step}"
    like = {name: torch.empty_like(leaf, device="meta") for name, leaf in tree.items()}
    fresh()
    start = clock()
    if way == "ftrain":
        store.save(step, tree, {})
        blocked = clock()
        store.wait()
    elif way == "torch.save":
        torch.save(tree, path)
    elif way == "torch DCP":
        dcp.save(tree, checkpoint_id=path)
    else:
        safetensors.torch.save_file(tree, path)
        sync(path)
    saved = clock()
    fresh()
    opened = clock()
    if way == "ftrain":
        loaded, _ = store.load(step, like)
    elif way == "torch.save":
        loaded = torch.load(path, weights_only=True)
    elif way == "torch DCP":
        loaded = {name: torch.empty_like(leaf) for name, leaf in tree.items()}
        dcp.load(loaded, checkpoint_id=path)
    else:
        loaded = safetensors.torch.load_file(path)
    done = clock()
    name = next(reversed(tree))
    assert torch.equal(loaded[name], tree[name]), way
    if way == "ftrain":
        store.delete(step)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    os.sync()
    ends = {"blocking": (start, blocked if way == "ftrain" else saved), "save": (start, saved), "load": (opened, done)}
    return {what: (b[0] - a[0], b[1] - a[1]) for what, (a, b) in ends.items()}


def measure(case: Case, rounds: int, folder: str | None, tell: Callable[[str], object]) -> tuple[Times, Times, float]:
    """Wall and processor times, and how long the first save of all blocked."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    tree = make(case.count, case.numel)
    wall, cpu = ({way: {what: [] for what in WHATS} for way in WAYS} for _ in range(2))
    first_save = 0.0
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = Store(Path(place) / "store", write=True)
        for turn in range(rounds + 1):
            tell(f"{case.name}, round {turn} of {rounds}")
            first = turn % len(WAYS)
            for way in WAYS[first:] + WAYS[:first]:
                found = one(way, tree, Path(place), store, turn)
                if not turn:  # buffers are made, modules imported
                    first_save = found["blocking"][0] if way == "ftrain" else first_save
                    continue
                for what, (seconds, busy) in found.items():
                    wall[way][what].append(seconds)
                    cpu[way][what].append(busy)
        store.close()
    return wall, cpu, first_save


def run(
    rounds: int, quick: bool, folder: str | None, tell: Callable[[str], object]
) -> tuple[list[report.Table], list[report.Bar], dict[str, Any]]:
    """Tables, bars and samples."""
    tables, bars, samples = [], [], {}
    for case in (LESS if quick else LARGE, MANY):
        wall, cpu, first_save = measure(case, rounds, folder, tell)
        samples[case.name] = {"wall": wall, "cpu": cpu, "first_blocking": first_save}
        rows = [
            [
                way,
                *(f"{Spread.of(wall[way][what]).median * 1e3:.0f}" for what in WHATS),
                *(f"{Spread.of(cpu[way][what]).median * 1e3:.0f}" for what in WHATS),
            ]
            for way in WAYS
        ]
        note = (
            "Milliseconds, medians: how long the caller waits, until all is written, and to read it from the page cache into fresh "
            "memory (safetensors maps its file, and reads when it is used). All but torch.save sync to the disk. ftrain's first save of a "
            f"process, which makes its buffers, blocked for {first_save * 1e3:.0f} ms."
        )
        columns = ["", "blocked", "save", "load", "blocked, CPU", "save, CPU", "load, CPU"]
        tables.append(report.Table(f"Checkpoints, {case.name}", note, columns, rows))
        # By wall time alone: part of the time is the disk's, and several threads share the work.
        bars += [
            report.Bar(
                f"{case.name}: {SAID[what]} / {THEIRS[other, their]}",
                bound,
                ratio(wall["ftrain"][what], wall[other][their]),
            )
            for what, bound, other, their in case.bars
        ]
    return tables, bars, samples


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    given = parser.parse_args()
    tables, bars, _ = run(given.rounds, given.quick, given.folder, lambda text: None)
    print("\n\n".join(table.plain() for table in [*tables, report.bars(bars)]))


if __name__ == "__main__":
    main()
