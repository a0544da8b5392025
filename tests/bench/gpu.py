"""What can only be seen on a GPU: `python tests/bench/gpu.py [--parts laws,sync,around,memory,time] [--write [FOLDER]]`.

Runs from the source tree on a machine without network; the core of ftrain needs torch, numpy, optree and lazy_loader there.

- laws: the whole step is one graph, compiled equals eager, donation keeps the memory and gives the same values, dropout is a function of
  (seed, step), the global generators stay as they were, two fits agree, a run compiles once and once more for a short batch;
  accumulation, loss scale (float16), clipping and averages together are one graph and train as the loops written by hand, and the
  loss scale goes as that of GradScaler; the feed's batches are right while the device is busy, also out of buffers that are filled
  again, and its copies cost less than copies that are waited for.
- sync: no step between two log points waits for the device. On CUDA 200 steps run under `set_sync_debug_mode("error")`; on a CPU
  (`--cpu`, which is there to try this script out) the profiler counts `aten::_local_scalar_dense`.
- around: hooks between two log points without a wait, batch sizes and micro-batches found with memory that really runs out, the
  profiler's files, deterministic algorithms, the estimated peak of memory, predictions, replayed steps, hooks resumed (around.py).
- memory: peak of the allocator above what was allocated before the model existed, over steady steps of a 24 M MLP, alone, with
  clipping, averages and bf16-mixed, and with eight micro-batches.
- time: the contenders of run.py on the device; the recipe in float16 too.

Ends with status 1 where a law does not hold; times and memory are only shown.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from syncs import Between, no_sync

ROOT = Path(__file__).parents[2]
PARTS = ("laws", "sync", "around", "memory", "time")
NEEDED = ("torch", "numpy", "optree", "lazy_loader")


def needs() -> None:
    """Say what is missing before an import fails half-way."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        sys.exit(
            f"tests/bench/gpu.py: not installed here: {names}. With a network: python -m pip install {names}\n"
            "Without: download the wheels elsewhere for this Python (python -m pip download --no-deps --only-binary=:all: "
            f"--python-version {sys.version_info[0]}.{sys.version_info[1]} --platform manylinux_2_28_x86_64 -d wheels {names}), "
            "bring them here, and: python -m pip install --no-index --no-deps wheels/*.whl"
        )


def main() -> int:
    args = _arguments()
    needs()
    sys.path.insert(0, str(ROOT))  # the source tree, wherever the script is started
    os.environ["TERM"], os.environ["COLUMNS"] = "xterm-256color", "120"
    import torch

    if not args.cpu and not torch.cuda.is_available():
        sys.exit("tests/bench/gpu.py: torch sees no CUDA device. To try the script out on a CPU: --cpu")
    if args.cpu:
        torch.set_num_threads(1)
    import report

    device = "cpu" if args.cpu else "cuda"
    about = report.machine(["ftrain", "torch", "triton", "lightning", "numpy", "optree"])
    if not args.cpu:
        found = torch.cuda.get_device_properties(0)
        about["gpu"] = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    began = time.perf_counter()
    parts = args.parts.split(",")
    tables, bars, data = [], [], {}
    rows: list[list[str]] = []
    if "laws" in parts:
        rows += [_verdict(check, device) for check in LAWS]
    if "sync" in parts:
        rows += [_verdict(check, device) for check in SYNC]
    if "around" in parts:
        import around

        rows += [_verdict(check, device) for check in around.AROUND]
    if rows:
        data["checks"] = [dict(zip(("check", "verdict", "detail"), row, strict=True)) for row in rows]
        tables.append(
            report.Table("Checks", "What the laws of the design say, on this device.", ["", "", ""], rows, text=3)
        )
    if "memory" in parts:
        peaks = memory(device)
        if peaks:
            data["memory"] = peaks
            tables += _memory_tables(report, peaks)
            bars += _memory_bars(report, peaks)
    if "time" in parts:
        timed, judged, data["time"] = timing(device, args.rounds, report)
        tables += timed
        bars += judged
    about["took"] = f"{time.perf_counter() - began:.0f} s"
    print(report.text(about, [*tables, *([report.bars(bars)] if bars else [])]))
    if args.write:
        path = Path(args.write) / ("gpu-on-cpu" if args.cpu else "gpu")
        part = report.Part(about, tables, bars, data)
        for written in report.write(path, "Checks, speed and memory on a GPU", {"gpu": part}, ["gpu"]):
            print(f"wrote {written}")
    return int(any(row[1] != "PASS" for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time ftrain on a GPU.")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, to try the script out")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of the timing")
    folder = str(ROOT / "docs" / "benchmarks")
    parser.add_argument(
        "--write",
        nargs="?",
        const=folder,
        metavar="FOLDER",
        help="write gpu.md and gpu.json (default: docs/benchmarks)",
    )
    args = parser.parse_args()
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: no such part: {', '.join(sorted(unknown))}")
    return args


def _verdict(check: Callable[[str], str], device: str) -> list[str]:
    """Run a check. What it returns is shown; an assertion that fails is a FAIL, anything else that is raised an ERROR."""
    name = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
    print(f"check: {name}", file=sys.stderr, flush=True)
    verdict = "ERROR"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detail = check(device)
        verdict = "PASS"
    except AssertionError as error:
        verdict, detail = "FAIL", " ".join(str(error).split())[:300]
    except Exception as error:  # the other checks are still worth running
        traceback.print_exc()
        detail = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    print(f"  {verdict}: {detail}", file=sys.stderr, flush=True)  # at once: what comes later may take the process down
    return [name, verdict, detail]


# --------------------------------------------------------------------------------------------------------------- the laws


def _leaves(tree: Any) -> list[Any]:
    import ftrain as ft

    return ft.tree.leaves(tree)


def _run(step: Any, state: Any, batches: list[Any], steps: int) -> Any:
    for i in range(steps):
        state, _ = step(state, batches[i % len(batches)])
    return state


def _apart(a: Any, b: Any, start: Any) -> float:
    """The largest difference of two states' parameters, relative to the largest change since the start."""
    moved = max(float((x - s).abs().max()) for x, s in zip(_leaves(b.params), _leaves(start.params), strict=True))
    assert moved > 0, "nothing was trained"
    return max(float((x - y).abs().max()) for x, y in zip(_leaves(a.params), _leaves(b.params), strict=True)) / moved


def _same(a: Any, b: Any) -> bool:
    import torch

    return all(torch.equal(x, y) for x, y in zip(_leaves(a), _leaves(b), strict=True))


def _mlp(device: str, dropout: float = 0.0) -> tuple[Any, Any, Any]:
    """A state, an eager step and batches."""
    import cases

    problem = cases.small(device)
    state, step = cases.ft_parts(problem, dropout)
    return state, step, problem.batches


def whole_step(device: str) -> str:
    """The whole step is one graph."""
    import ftrain as ft

    state, step, batches = _mlp(device)
    fast = ft.compile(step)
    _run(fast, state, batches, 3)
    assert fast.rung == "step", f"rung {fast.rung}: {fast.reason}"
    assert fast.compiles == 1, f"{fast.compiles} compilations"
    return f"rung {fast.rung}, {fast.compiles} compilation"


def equal_mlp(device: str) -> str:
    """Compiled equals eager: MLP, AdamW, float32, 20 steps."""
    import ftrain as ft

    state, step, batches = _mlp(device)
    off = _apart(_run(ft.compile(step, donate=False), state, batches, 20), _run(step, state, batches, 20), state)
    assert off < 1e-3, f"differs by {off:.1e} of the update"
    return f"differs by {off:.1e} of the update"


def equal_cnn(device: str) -> str:
    """Compiled equals eager: CNN with batch norm, momentum, float64, 20 steps."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    import ftrain as ft

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)
    ).double()
    tx = ft.optim.sgd(0.1, momentum=0.9)
    step = ft.train_step(model, lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]), tx)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 1, 8, 8, generator=draw, dtype=torch.float64).to(device)
    y = torch.randint(0, 10, (4, 16), generator=draw).to(device)
    batches = [{"x": x[i], "y": y[i]} for i in range(4)]
    state = ft.init(model, tx, seed=0, device=device)
    compiled, eager = _run(ft.compile(step, donate=False), state, batches, 20), _run(step, state, batches, 20)
    off = _apart(compiled, eager, state)
    mean = "1.running_mean"
    buffers = float((compiled.buffers[mean] - eager.buffers[mean]).abs().max())
    assert off < 1e-9, f"parameters differ by {off:.1e} of the update"
    assert buffers < 1e-9, f"running means differ by {buffers:.1e}"
    return f"differs by {off:.1e} of the update"


def kept(device: str) -> str:
    """A step that is not donated leaves its input bitwise unchanged."""
    import ftrain as ft

    state, step, batches = _mlp(device)
    before = state.copy()
    fast = ft.compile(step, donate=False)
    _run(fast, state, batches, 5)
    assert _same(state, before), "the input state changed"
    return f"{len(_leaves(state))} leaves, 5 steps"


def donated(device: str) -> str:
    """A donated step gives the same values in the same memory, and its input raises."""
    import ftrain as ft

    state, step, batches = _mlp(device)
    want = _run(ft.compile(step, donate=False), state, batches, 20)
    start, first = state.copy(), state.copy()
    addresses = [leaf.data_ptr() for leaf in _leaves(first)]
    last = _run(ft.compile(step), first, batches, 20)
    assert [leaf.data_ptr() for leaf in _leaves(last)] == addresses, "a leaf moved"
    off = _apart(last, want, start)
    assert off < 1e-3, f"differs from the step that is not donated by {off:.1e} of the update"
    try:
        _ = first.params
    except ft.errors.DonatedStateError:
        return f"{len(addresses)} leaves in place, values differ by {off:.1e} of the update"
    raise AssertionError("the donated state can still be read")


def dropout(device: str) -> str:
    """Dropout is a function of (seed, step), compiled and eager; the global generators stay as they were."""
    import torch

    import ftrain as ft

    state, step, batches = _mlp(device, dropout=0.5)
    for name, one in [("eager", step), ("compiled", ft.compile(step, donate=False))]:
        one(state, batches[0])  # compiles
        torch.manual_seed(1)
        cpu, gpu = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
        a, _ = one(state, batches[0])
        assert torch.equal(torch.get_rng_state(), cpu), f"{name}: torch's CPU generator moved"
        assert gpu is None or torch.equal(torch.cuda.get_rng_state(), gpu), f"{name}: torch's CUDA generator moved"
        torch.manual_seed(2)
        b, _ = one(state, batches[0])
        assert _same(a, b), f"{name}: the same state and batch gave another result"
        later, _ = one(state.replace(step=state.step + 1), batches[0])
        other, _ = one(state.replace(seed=state.seed + 1), batches[0])
        assert not _same(a.params, later.params), f"{name}: the next step drew the same numbers"
        assert not _same(a.params, other.params), f"{name}: another seed drew the same numbers"
    return "p = 0.5, bitwise"


def fits_agree(device: str) -> str:
    """Two fits from one state agree bitwise; one program, at most one more for the short last batch."""
    import torch

    import ftrain as ft

    state, step, batches = _mlp(device, dropout=0.1)
    arrays = {name: torch.cat([batch[name] for batch in batches[:20]])[:310] for name in ("x", "y")}
    fast = ft.compile(step)
    a, b = (ft.fit(state, fast, arrays, batch_size=16, epochs=3, progress=False) for _ in range(2))
    assert _same(a.state, b.state), "the two fits differ"
    assert (a.history["loss"] == b.history["loss"]).all(), "the histories differ"
    assert fast.compiles <= 2, f"{fast.compiles} compilations: {fast.recompiles}"
    return f"{a.state.counters().step} steps, {fast.compiles} compilations"


def _recipe(device: str, parts: int = 1, **scale: Any) -> tuple[Any, Any, Any]:
    """A state, an eager step and batches: accumulation, loss scale (of float16 on a GPU), clipping, AdamW, averages."""
    import cases
    import optimization

    import ftrain as ft

    problem = optimization.parts_small(device)
    model = problem.model()
    loss: Any = ft.bind(model, cases.loss_fn)
    if device == "cuda":  # a CPU has no float16; the scale works in any precision
        loss = ft.with_precision(loss, "16-mixed")
    grad = ft.with_loss_scale(ft.with_accumulation(ft.value_and_grad(loss), parts), **scale)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(optimization.MAX_NORM), cases.ft_adamw())
    step = ft.with_ema(ft.make_step(grad, tx), optimization.EMA)
    return step.init(ft.init(model, tx, seed=0)), step, problem.batches


def recipe_whole(device: str) -> str:
    """Accumulation, loss scale, clipping and averages are one graph, and compiled equals eager."""
    import ftrain as ft

    state, step, batches = _recipe(device, 8)
    fast = ft.compile(step)
    a, b = _run(fast, state.copy(), batches, 10), _run(step, state, batches, 10)
    assert fast.rung == "step", f"rung {fast.rung}: {fast.reason}"
    assert fast.compiles == 1, f"{fast.compiles} compilations"
    off = _apart(a, b, state)
    allowed = 1e-3 if device == "cpu" else 0.1  # float16 rounds at other places in a fused kernel
    assert off < allowed, f"differs by {off:.1e} of the update"
    return f"rung {fast.rung}, differs by {off:.1e} of the update"


def scales_agree(device: str) -> str:
    """The loss scale is that of torch.amp.GradScaler, step by step, with overflows and growth."""
    import cases
    import optimization
    import torch
    import torch.nn.functional as F

    state, step, batches = _recipe(device, init_scale=2.0**14, growth_interval=3)
    problem = optimization.parts_small(device)
    module = problem.model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=cases.LR, eps=cases.EPS, weight_decay=cases.DECAY, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**14, growth_interval=3)
    half = torch.autocast(device, dtype=torch.float16, enabled=device == "cuda")
    ours, theirs = [], []
    for i in range(20):
        batch = batches[i]
        if i in (4, 5, 13):
            batch = {**batch, "x": torch.full_like(batch["x"], float("inf"))}
        before = state
        state, _ = step(state, batch)
        ours.append(float(state.extra["loss_scale"].scale))
        if i in (4, 5, 13):
            assert _same(before.params, state.params), f"step {i} overflowed and changed the parameters"
            assert _same(before.opt, state.opt), f"step {i} overflowed and changed the optimizer's state"
        optimizer.zero_grad()
        with half:
            loss = F.cross_entropy(module(batch["x"]), batch["y"])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.parameters(), optimization.MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        theirs.append(scaler.get_scale())
    assert ours == theirs, f"{ours} and not {theirs}"
    assert len(set(ours)) > 3, f"the scale did not move: {ours}"
    return f"20 steps, 3 overflows, scales {min(ours):.0f} .. {max(ours):.0f}"


def recipe_agrees(device: str) -> str:
    """The recipe trains as the hand-written loop: autocast, clipping, AdamW, AveragedModel."""
    import cases
    import optimization

    problem, said = cases.small(device), []
    for precision in ("bf16-mixed",) if device == "cpu" else ("bf16-mixed", "16-mixed"):
        found = [one for one in optimization.recipe_contenders(problem, 10, precision) if one.key != "hand_compiled"]
        for one in found:
            one.run(10)
        said.append(f"{precision} {optimization.agree(found, problem, precision)}")
    return "; ".join(said)


def parts_agree(device: str) -> str:
    """One call over eight micro-batches trains as eight micro-batches by hand, float32."""
    import optimization

    problem = optimization.parts_small(device)
    found = [one for one in optimization.parts_contenders(problem, 10) if one.key != "hand_compiled"]
    for one in found:
        one.run(10)
    return optimization.agree(found, problem)


def _feed_batches(device: str, kind: str, n: int, rows: int) -> Iterator[Any]:
    """Batches on the host whose values are their number: new ones, or one buffer that is filled again and again."""
    import torch

    def made() -> Any:
        x = torch.empty(rows, 64)
        return x.pin_memory() if device == "cuda" and "pinned" in kind else x

    buffer = made()
    for i in range(n):
        x = buffer if "buffer" in kind else made()
        yield {"x": x.fill_(i), "n": i}


def _busy(device: str) -> Callable[[], None]:
    """Something for the device to do for some milliseconds."""
    import torch

    side = 256 if device == "cpu" else 8192
    a = torch.randn(side, side, device=device)
    out = torch.empty_like(a)

    def work() -> None:
        for _ in range(3):
            torch.mm(a, a, out=out)

    return work


def feed_right(device: str) -> str:
    """The feed's batches are right while the device is busy, of memory that is pinned or not, new or filled again."""
    import torch

    from ftrain.data import Feed, Reader

    work, n, rows = _busy(device), 30, 1 << (8 if device == "cpu" else 16)
    kinds = ("new", "new pinned", "buffer", "buffer pinned")
    for kind in kinds:
        feed = Feed(Reader(_feed_batches(device, kind, n, rows)), torch.zeros((), device=device).device)
        sums = []
        for i, batch in enumerate(feed):
            work()
            sums.append(torch.stack([batch["x"].min(), batch["x"].max(), batch["n"].float()]))
            assert feed.place() == {"batch": i + 1}, feed.place()
            del batch  # its memory may go to another, but not before the work above is done
        found = torch.stack(sums).cpu()
        want = torch.arange(n, dtype=torch.float32)[:, None].expand(n, 3)
        assert torch.equal(found, want), f"{kind}: {found[(found != want).any(dim=1)][:4].tolist()}"
    return f"{n} batches of {rows * 64 * 4 / 1e6:.1f} MB, {', '.join(kinds)}"


def feed_overlaps(device: str) -> str:
    """The feed's copies run while the device works: less time than copies that are waited for."""
    import torch

    from ftrain.data import Feed, Reader

    if device == "cpu":
        return "nothing is copied on a CPU"
    work, n, rows = _busy(device), 30, 1 << 19
    target = torch.zeros((), device=device).device
    ready = [{"x": torch.ones(rows, 64).pin_memory()} for _ in range(4)]
    batches = [ready[i % 4] for i in range(n)]

    def took(loop: Callable[[], None]) -> float:
        best = float("inf")
        for _ in range(4):
            torch.cuda.synchronize()
            began = time.perf_counter()
            loop()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return best / n * 1e3

    def fed() -> None:
        for batch in Feed(Reader(iter(batches)), target):
            work()
            batch["x"].sum()

    def waited() -> None:
        for batch in batches:
            copy = batch["x"].to(target)
            work()
            copy.sum()

    alone = took(lambda: [work() for _ in range(n)] and None)
    ours, plain = took(fed), took(waited)
    said = f"a step of {alone:.2f} ms takes {ours:.2f} ms with the feed, {plain:.2f} ms with copies in between ({rows * 256 / 1e6:.0f} MB)"
    assert ours < plain, said
    return said


LAWS = [whole_step, equal_mlp, equal_cnn, kept, donated, dropout, fits_agree]
LAWS += [recipe_whole, scales_agree, recipe_agrees, parts_agree, feed_right, feed_overlaps]


# ----------------------------------------------------------------------------------------------- no waiting for the device


def planted(device: str) -> str:
    """The sync check sees a planted `.item()`."""
    import torch

    value = torch.ones((), device=device)
    try:
        with no_sync(device):
            value.item()
    except AssertionError:
        return "seen"
    raise AssertionError("it went unnoticed")


def _bare(device: str, dropout: float, donate: bool) -> str:
    import ftrain as ft

    state, step, batches = _mlp(device, dropout)
    fast = ft.compile(step, donate=donate)
    state = _run(fast, state, batches, 5)
    with no_sync(device):
        _run(fast, state, batches, 200)
    return f"200 steps, rung {fast.rung}"


def sync_donated(device: str) -> str:
    """No sync: compiled, donated, bare loop."""
    return _bare(device, 0.0, True)


def sync_kept(device: str) -> str:
    """No sync: compiled, not donated, bare loop."""
    return _bare(device, 0.0, False)


def sync_dropout(device: str) -> str:
    """No sync: compiled, donated, dropout, bare loop."""
    return _bare(device, 0.5, True)


def sync_eager(device: str) -> str:
    """No sync: eager step, dropout, bare loop."""
    state, step, batches = _mlp(device, 0.5)
    state = _run(step, state, batches, 5)
    with no_sync(device):
        _run(step, state, batches, 200)
    return "200 steps"


def sync_recipe(device: str) -> str:
    """No sync: eager step, clipping and a schedule, bare loop."""
    import cases

    import ftrain as ft

    problem = cases.small(device)
    model = problem.model()
    schedule = ft.schedules.warmup_cosine(1e-3, 50, 300)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(schedule))
    step = ft.train_step(model, cases.loss_fn, tx)
    state = _run(step, ft.init(model, tx), problem.batches, 5)
    with no_sync(device):
        _run(step, state, problem.batches, 200)
    return "200 steps"


def sync_everything(device: str) -> str:
    """No sync: eager step with accumulation, loss scale, clipping and averages, bare loop."""
    state, step, batches = _recipe(device, 8)
    state = _run(step, state, batches, 5)
    with no_sync(device):
        _run(step, state, batches, 200)
    return "200 steps"


def sync_everything_compiled(device: str) -> str:
    """No sync: the same, compiled and donated."""
    import ftrain as ft

    state, step, batches = _recipe(device, 8)
    fast = ft.compile(step)
    state = _run(fast, state, batches, 5)
    with no_sync(device):
        _run(fast, state, batches, 200)
    return f"200 steps, rung {fast.rung}"


def _loop(device: str, batches: Callable[[list[Any]], list[Any]]) -> str:
    import ftrain as ft

    state, step, ready = _mlp(device, 0.5)
    ticks = ft.loop(state, ft.compile(step), batches(ready), steps=205)
    for _ in range(5):
        next(ticks)
    with no_sync(device):
        for _ in range(199):
            next(ticks)
    ticks.close()
    return "199 steps"


def sync_loop(device: str) -> str:
    """No sync: ft.loop over a compiled step."""
    return _loop(device, lambda batches: batches)


def sync_host(device: str) -> str:
    """No sync: ft.loop, batches of numpy arrays from the host."""
    return _loop(device, lambda batches: [{k: v.cpu().numpy() for k, v in batch.items()} for batch in batches])


def sync_feed(device: str) -> str:
    """No sync: the feed, over pinned batches of a DataLoader, and over batches that are not pinned."""
    import torch
    from torch.utils.data import DataLoader

    from ftrain.data import Feed, as_epochs

    batches = [{"x": torch.ones(256, 64), "n": i} for i in range(205)]
    target = torch.zeros((), device=device).device
    for data in (batches, DataLoader(batches, batch_size=None, pin_memory=device == "cuda")):
        feed = Feed(as_epochs(data)(0), target)
        for _ in range(5):
            next(feed)
        with no_sync(device):
            for batch in feed:
                batch["x"].sum()
        feed.close()
    return "2 x 200 batches"


def sync_fit(device: str) -> str:
    """No sync: ft.fit with progress and history, between two log points."""
    import cases

    import ftrain as ft

    state, step, batches = _mlp(device, 0.5)
    fast = ft.compile(step)
    ft.fit(state, fast, batches, steps=3, progress=False)
    data = Between(device, batches, 10, 210)
    with data.watching(), contextlib.redirect_stdout(cases.Nowhere(terminal=False)):  # type: ignore[type-var]
        result = ft.fit(state, fast, data, steps=300, log=ft.every(steps=300))
    assert len(result.history) == 1, f"{len(result.history)} log points in between"
    return f"200 of 300 steps, rung {fast.rung}"


SYNC = [
    planted,
    sync_donated,
    sync_kept,
    sync_dropout,
    sync_eager,
    sync_recipe,
    sync_loop,
    sync_host,
    sync_feed,
    sync_fit,
]
SYNC += [sync_everything, sync_everything_compiled]


# --------------------------------------------------------------------------------------------------------- memory and time


def memory(device: str) -> dict[str, dict[str, float]]:
    """Peaks in MB above what was allocated before, for steps 4 to 8; {} on a CPU (see memory.py)."""
    import cases
    import optimization
    import torch

    if device == "cpu":
        print("memory: on a CPU it is measured by tests/bench/run.py", file=sys.stderr)
        return {}
    problem, windows = cases.large(device), optimization.parts_large(device)
    found = {}
    makers = {
        "hand": lambda: cases.hand_eager(problem),
        "donated": lambda: cases.ft_bare(problem),
        "kept": lambda: cases.ft_bare(problem, donate=False),
        "recipe_hand": lambda: optimization.hand_recipe(problem),
        "recipe_donated": lambda: optimization.ft_run(problem, optimization.recipe),
        "parts_hand": lambda: optimization.hand_parts(windows),
        "parts_donated": lambda: optimization.ft_run(windows, optimization.parts),
    }
    for kind, make in makers.items():
        print(f"memory: {kind}", file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        run = make()
        run(3)
        gc.collect()  # the module that the state was made from
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run(5)
        torch.cuda.synchronize()
        found[kind] = {
            "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6,
            "between_steps_mb": (torch.cuda.memory_allocated() - before) / 1e6,
            "parameters_mb": problem.parameters() * 4 / 1e6,
        }
        del run
    return found


def _memory_tables(report: Any, peaks: dict[str, dict[str, float]]) -> list[Any]:
    import memory as on_cpu

    note = "Peak of CUDA's allocator over steady steps above what was allocated before the model was made, in MB."
    groups = {
        "24 M MLP, peak memory": on_cpu.KINDS,
        "Recipe on the 24 M MLP (clip, EMA, bf16-mixed), peak memory": on_cpu.RECIPE,
        "Accumulation x 8 on the 24 M MLP, peak memory": on_cpu.PARTS,
    }
    tables = []
    for title, kinds in groups.items():
        rows = [
            [
                on_cpu.LABELS[kind],
                f"{peaks[kind]['peak_mb']:.0f}",
                f"{peaks[kind]['between_steps_mb']:.0f}",
                f"{peaks[kind]['peak_mb'] / peaks[kinds[0]]['peak_mb']:.2f}",
            ]
            for kind in kinds
        ]
        tables.append(report.Table(title, note, ["", "peak", "between steps", "x hand-written"], rows))
    return tables


def _memory_bars(report: Any, peaks: dict[str, dict[str, float]]) -> list[Any]:
    found = []
    for text, bound, over, under in (
        ("24 M MLP: peak memory donated / hand-written", 0.85, "donated", "hand"),
        ("24 M MLP, clip + EMA + bf16-mixed: peak memory / hand-written", 1.00, "recipe_donated", "recipe_hand"),
    ):
        value = peaks[over]["peak_mb"] / peaks[under]["peak_mb"]
        found.append(report.Bar(text, bound, report.Spread(value, value, value)))
    return found


def timing(device: str, number: int, report: Any) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """The tables, the bars, and the samples by problem."""
    import cases
    import optimization
    import rounds
    import torch

    def run(contenders: list[Any], count: int, warm: int, agree: Callable[[], object]) -> Any:
        return rounds.measure(
            contenders,
            count,
            sync=torch.cuda.synchronize if device == "cuda" else lambda: None,
            tell=lambda text: print(f"time: {text}", file=sys.stderr, flush=True),
            ready=agree,
            warm=warm,
        )

    note = f"AdamW, float32, batches on the device, {number} rounds; the columns are those of cpu.md."
    few, steps = max(number // 2, 3), 2 if device == "cpu" else 50
    tables, bars, data = [], [], {}
    lightning = importlib.util.find_spec("lightning") is not None
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = cases.small_contenders(cases.small(device), root if lightning else None, scale=2)
        small = run(own, number, 20, lambda: cases.agree(own))
        heavy = cases.large_contenders(cases.large(device), steps)
        large = run(heavy, few, 1, lambda: cases.agree(heavy))
        tables += [
            report.times("Small MLP, time", f"32-32-32-10, ReLU, batch 16, {note}", small, "hand_eager"),
            report.times("24 M MLP, time", f"Batch 32, {note}", large, "hand_eager"),
        ]
        data |= {"small": report.samples(small), "large": report.samples(large)}
        more = []
        for precision in ("bf16-mixed",) if device == "cpu" else ("bf16-mixed", "16-mixed"):
            problem = cases.large(device)
            made = optimization.recipe_contenders(problem, steps, precision)
            more.append((f"24 M MLP, clip + EMA + {precision}", 1.10, problem, made, precision))
        for problem in (optimization.parts_large(device), optimization.parts_small(device)):
            made = optimization.parts_contenders(problem, max(steps // 2, 1))
            more.append((f"{problem.name}, accumulation x 8", 1.05, problem, made, "32-true"))
        for title, bound, problem, made, precision in more:
            agree = functools.partial(optimization.agree, made, problem, precision)
            found = run(made, few, 1, agree)
            data[title] = report.samples(found)
            tables.append(report.times(f"{title}, time", f"AdamW, {few} rounds.", found, "hand"))
            wall = rounds.ratio(found["ft_donated"].step, found["hand"].step)
            bars.append(report.Bar(f"{title}: ft.compile / hand-written", bound, wall))
    return tables, bars, data


if __name__ == "__main__":
    sys.exit(main())
