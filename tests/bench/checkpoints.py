"""Checkpoints beside torch.save, torch.distributed.checkpoint and safetensors, side by side in each round; medians.

    python tests/bench/checkpoints.py [--quick] [--rounds N] [--folder PATH]

`blocking` is how long the caller waits, `save` how long until the checkpoint is complete. torch.save does not sync to the disk; the others do.
Each round saves into fresh files and reads them from the page cache; the first round of all is dropped. Ratios are those of the medians
(the round order is turned each time, so that what the disk still has to do falls on each in turn).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch
from torch import Tensor

from ftrain.checkpoint.store import Store

CASES = {"1.05 GB in 100 tensors": (100, 2621440), "51 MB in 2000 tensors": (2000, 6400)}
QUICK = {"105 MB in 10 tensors": (10, 2621440), "51 MB in 2000 tensors": (2000, 6400)}
# (what, of which way, at most this many times, that of which other)
LIMITS = {
    "in 100": (
        ("blocking", 0.3, "torch.save", "save"),
        ("save", 1.3, "torch DCP", "save"),
        ("load", 1.0, "torch.save", "load"),
    ),
    "in 10 ": (
        ("blocking", 0.3, "torch.save", "save"),
        ("save", 1.3, "torch DCP", "save"),
        ("load", 1.0, "torch.save", "load"),
    ),
    "in 2000": (("save", 3.0, "torch.save", "save"),),
}
WAYS = ("ftrain", "torch.save", "torch DCP", "safetensors")


def make(count: int, numel: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = 1 << (numel.bit_length() // 2)
    shape = (numel // side, side) if numel % side == 0 else (numel,)
    return {f"layers.{i}.weight": torch.randn(shape, generator=generator) for i in range(count)}


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def one(way: str, tree: dict[str, Tensor], folder: Path, store: Store, step: int) -> dict[str, float]:
    """One save and one load: seconds of each."""
    import safetensors.torch
    import torch.distributed.checkpoint as dcp

    path, clock = folder / f"{way}-{step}", time.perf_counter
    like = {name: torch.empty_like(leaf, device="meta") for name, leaf in tree.items()}
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
    return {"blocking": (blocked if way == "ftrain" else saved) - start, "save": saved - start, "load": done - saved}


def rows(quick: bool = False, rounds: int = 5, folder: str | None = None) -> list[dict[str, object]]:
    """One row for each case and way, with the medians in seconds, and one for each limit, with the ratio."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    found: list[dict[str, object]] = []
    for case, (count, numel) in (QUICK if quick else CASES).items():
        tree = make(count, numel)
        times: dict[str, list[dict[str, float]]] = defaultdict(list)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            store = Store(Path(place) / "store", write=True)
            for turn in range(rounds + 1):
                first = turn % len(WAYS)
                for way in WAYS[first:] + WAYS[:first]:
                    times[way].append(one(way, tree, Path(place), store, turn))
            store.close()
        medians = {
            way: {what: statistics.median(run[what] for run in times[way][1:]) for what in times[way][0]}
            for way in WAYS
        }
        first_blocking = times["ftrain"][0]["blocking"]
        found += [{"case": case, "way": way, **medians[way]} for way in WAYS]
        limits = next(limits for end, limits in LIMITS.items() if end in case + " ")
        for what, most, other, their in limits:
            ratio = medians["ftrain"][what] / medians[other][their]
            found.append({"case": case, "what": f"{what} / {their} of {other}", "ratio": ratio, "limit": most})
        found.append(
            {
                "case": case,
                "what": "blocking of the first save / later ones",
                "ratio": first_blocking / medians["ftrain"]["blocking"],
                "limit": None,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    given = parser.parse_args()
    found = rows(given.quick, given.rounds, given.folder)
    print("| case | way | blocking s | save s | load s |\n|---|---|---|---|---|")
    for row in found:
        if "way" in row:
            print(f"| {row['case']} | {row['way']} | {row['blocking']:.3f} | {row['save']:.3f} | {row['load']:.3f} |")
    print("\n| case | ratio | measured | at most |\n|---|---|---|---|")
    for row in found:
        if "what" in row:
            print(f"| {row['case']} | {row['what']} | {row['ratio']:.2f} | {row['limit'] or ''} |")


if __name__ == "__main__":
    main()
