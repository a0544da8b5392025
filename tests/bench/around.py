"""What is around the steps, on a GPU: hooks, memory that runs out, the profiler, predictions, replay. Called by gpu.py.

Each check is a function of the device that returns what it found, and raises an AssertionError where it does not hold. On a CPU
(tests/test_gpu_checks.py, `gpu.py --cpu`) the steps are not compiled, the problems are small, and where a GPU really runs out of
memory the loss says so.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import pickletools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import children
import numpy as np
import torch
import torch.nn.functional as F
from syncs import Between, no_sync
from torch import Tensor, nn

import ftrain as ft
from ftrain.tune.peak import peak

MIB = 1 << 20


def _cuda(device: str) -> bool:
    return device == "cuda"


def _how(device: str) -> dict[str, Any]:
    """How `fit` runs a step: compiled on a GPU; on a CPU, where this is tried out, not."""
    return {"compile": "auto" if _cuda(device) else False, "progress": False}


def _here(device: str) -> torch.device:
    return torch.zeros((), device=device).device


def _differing(a: Any, b: Any) -> list[str]:
    """Paths of leaves that differ in a bit or lie elsewhere."""
    both = zip(ft.tree.items(a), ft.tree.items(b), strict=True)
    return [path for (path, x), (_, y) in both if x.device != y.device or not torch.equal(x, y)]


@contextlib.contextmanager
def _limited(device: str, more: int) -> Iterator[None]:
    """Context in which torch may take so many bytes more of a GPU than it has taken; beyond that it runs out of memory."""
    if not _cuda(device):
        yield
        return
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------------- hooks


def _staged(device: str) -> tuple[Any, Any, Any]:
    """A state, a step and batches with all that hooks work on: masks, averages, frozen groups, counts of skipped steps."""
    problem = cases.small(device)
    model = problem.model(0.1)
    tx = ft.optim.freezable(
        ft.optim.skip_nonfinite(ft.optim.inject(ft.optim.adamw)(lr=1e-3, weight_decay=1e-2)), ["0.*"]
    )
    step = ft.with_mask(ft.with_ema(ft.train_step(model, cases.loss_fn, tx), 0.9))
    return ft.init(model, tx, seed=0), step, problem.batches


def _norm(state: ft.TrainState, event: ft.Event) -> ft.Outcome:
    """A hook of the user's with metrics on the device."""
    size = torch.stack([p.square().sum() for p in state.params.values()]).sum().sqrt()
    return ft.Outcome(state, {"param_norm": size, "mean_norm": ft.metrics.Mean.of(size)})


def _hooks(device: str, look: Any) -> list[Any]:
    """All ready hooks that hear steps, at cadences that fall between two log points; what has to read looks at `look`."""
    often = ft.every(steps=10)
    found = [
        ft.on("step", _norm),
        ft.hooks.learning_rate(every=often, hyper=("lr", "weight_decay"), prefix="opt_"),
        ft.hooks.throughput(every=often, flops_per_step=1e6, peak="H100"),
        ft.hooks.device_stats(every=often),
        ft.hooks.timer("10:00:00", every=often),
        ft.hooks.garbage_collection(every=ft.every(steps=50)),
        ft.hooks.prune(lambda step: 0.001 * step, when=ft.every(steps=20)),
        ft.hooks.unfreeze({"0.*": ft.at(50)}),
        ft.hooks.swap_average("ema", on=ft.at(60)),
        ft.hooks.nonfinite("stop", every=look),
        ft.hooks.early_stop("loss", every=look),
        ft.hooks.spike_guard("rollback", factor=1e6, every=look),
    ]
    if _cuda(device):  # its flag lies on the CPU, where reading it is no wait; but there a read is a read
        found.insert(0, ft.once(ft.at(70), lambda state, event: state, name="once"))
    return found


def hooks_wait_for_nothing(device: str) -> str:
    """Hooks: none of the ready ones waits for the device between two log points."""
    state, step, batches = _staged(device)
    said = []
    for compiled in (True, False) if _cuda(device) else (False,):
        fast = ft.compile(step) if compiled else step
        data = Between(device, batches, 10, 190)
        end = ft.every(steps=300)
        with data.watching():
            result = ft.fit(state, fast, data, steps=300, log=end, hooks=_hooks(device, end), **_how(device))
        row = result.history.last()
        wanted = {"param_norm", "mean_norm", "opt_lr", "mfu", "resident", "elapsed_seconds", "sparsity"}
        wanted |= (
            {"cuda0_allocated", "cuda0_peak_allocated", "cuda0_reserved", "cuda0_retries"} if _cuda(device) else set()
        )
        assert wanted <= set(row), f"not told: {sorted(wanted - set(row))}"
        assert len(result.history) == 1, f"{len(result.history)} log points in between"
        assert abs(row["sparsity"] - 0.3) < 0.01, f"pruned {row['sparsity']}"
        assert row["param_norm"] > 0, "no norm"
        assert not _cuda(device) or row["cuda0_peak_allocated"] >= row["cuda0_allocated"] > 0, (
            "the allocator tells nothing"
        )
        moved = not torch.equal(result.state.params["0.bias"], state.params["0.bias"])
        assert moved, "what was unfrozen did not train"
        kept = int(result.state.extra["spike_guard_copy"]["step"])
        assert kept == 300, f"the newest copy of the guard is of step {kept}"
        said.append(f"rung {fast.rung}" if compiled else "not compiled")
    return f"180 of 300 steps, {len(_hooks(device, end))} hooks; {', '.join(said)}"


def hook_that_waits_is_seen(device: str) -> str:
    """Hooks: one that reads a value at a step is noticed."""
    state, step, batches = _staged(device)
    seen: list[float] = []

    def reads(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
        seen.append(event.metrics["loss"].compute().item())
        return state

    data = Between(device, batches, 10, 30)
    try:
        with data.watching():
            ft.fit(state, step, data, steps=40, hooks=[ft.on("step", reads)], progress=False, compile=False)
    except AssertionError as error:
        return f"seen: {str(error)[:60]}"
    raise AssertionError(f"it went unnoticed, {len(seen)} reads")


def hooks_are_resumed(device: str) -> str:
    """Hooks: resumed from a checkpoint on disk, each memory on the device where it was, bit by bit; `once` only once."""
    state, step, batches = _staged(device)
    metric = ft.eval_step(cases.small(device).model(0.1), lambda model, batch: {"loss": cases.loss_fn(model, batch)})
    calls: list[int] = []

    def called(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
        calls.append(event.step)
        return state.replace(params={name: p * 0.5 for name, p in state.params.items()})

    def count(state: ft.TrainState, memory: dict[str, Tensor], event: ft.Event) -> Any:
        return state, {"steps": memory["steps"] + 1, "loss": memory["loss"] + event.metrics["loss"].compute()}

    def begin(state: ft.TrainState) -> dict[str, Tensor]:
        return {"steps": torch.zeros((), dtype=torch.int64), "loss": torch.zeros((), device=state.device)}

    def run(steps: int, folder: str | None) -> Any:
        look = ft.every(steps=4)
        hooks = [
            ft.once(ft.every(steps=3), called, name="halved"),
            ft.once(ft.every(steps=9), called, name="halved_again"),
            ft.on("step", ft.Hook("counted", begin, count)),  # one of its numbers lies on the CPU
            # For the time of day goes into no state that is compared: without `throughput`, which keeps it.
            ft.hooks.prune(lambda step: 0.02 * step, when=ft.every(steps=3)),
            ft.hooks.unfreeze({"0.*": ft.at(7)}),
            ft.hooks.swap_average("ema", on=ft.at(8)),
            ft.hooks.nonfinite("stop", every=look),
            ft.hooks.early_stop("loss", every=look, patience=100),
            ft.hooks.early_stop("val/loss", patience=100, name="stop_on_val"),
            ft.hooks.plateau("val/loss", patience=1),
            ft.hooks.spike_guard("rollback", factor=1e6, every=look),
        ]
        evals = {"val": ft.Evaluator(metric, batches[:2], every=look)}
        saved: dict[str, Any] = {}
        if folder is not None:
            saved = {"checkpoint": ft.Checkpoints(folder, every=ft.every(steps=6)), "resume": "auto"}
        return ft.fit(state, step, batches, steps=steps, hooks=hooks, evals=evals, **saved, **_how(device)).state

    straight = run(14, None)
    assert calls == [3, 9], f"called after the steps {calls}"
    calls.clear()
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as folder:
        first = run(6, folder)
        again = run(14, folder)
    assert calls == [3, 9], f"with a stop in between, called after the steps {calls}"
    assert int(first.step) == 6, f"stopped after {int(first.step)} steps"
    off = _differing(straight.extra, again.extra) + _differing(straight.params, again.params)
    off += _differing(straight.opt, again.opt)
    assert not off, f"{len(off)} leaves differ: {', '.join(off[:4])}"
    placed = {path: leaf.device.type for path, leaf in ft.tree.items(again.extra)}
    on_cpu = sorted(path for path, kind in placed.items() if kind == "cpu")
    if _cuda(device):
        named = [path for path in on_cpu if not any(word in path for word in ("done", "steps"))]
        assert not named, f"on the CPU: {named}"
        assert len(on_cpu) >= 3, f"on the CPU only: {on_cpu}"
    there = sum(kind == _here(device).type for kind in placed.values())
    return f"{len(placed)} leaves of memory, {there} on {device}, those on the CPU: {len(on_cpu)}"


# ----------------------------------------------------------------------------------------------------- out of memory, for real


def _wide(device: str) -> tuple[nn.Module, Any]:
    """A model whose activations are what takes memory: some 50 KiB a sample on a GPU."""
    width = 1024 if _cuda(device) else 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(width, width), nn.GELU()] * 4
        return nn.Sequential(*layers, nn.Linear(width, 1)).to(device), width


def batch_size_is_found(device: str) -> str:
    """find_batch_size: memory that really runs out; what is found fits, the next size does not, nothing is left behind."""
    model, width = _wide(device)
    tx = ft.optim.adamw(1e-3)
    step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    state = ft.init(model, tx, seed=0)
    before = state.copy()
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    step(state, rows.to(device))  # what cuBLAS keeps for itself is taken now
    said = []
    for mode, compiled in (("bisect", False), ("power", True)) if _cuda(device) else (("bisect", False),):
        gc.collect()
        start, multiple = (512, 64) if _cuda(device) else (8, 8)
        ready = torch.cuda.memory_allocated() if _cuda(device) else 0
        began = time.perf_counter()
        with _limited(device, 512 * MIB):
            found = ft.find_batch_size(
                state,
                step,
                rows,
                start=start,
                multiple=multiple,
                mode=mode,  # type: ignore[arg-type]  # one of the two
                memory=None if _cuda(device) else 1 * MIB,
                compile=compiled,
            )
        took = time.perf_counter() - began
        assert found.limited == "memory", f"limited by {found.limited}"
        failed = [trial for trial in found.trials if not trial.fits]
        assert failed, f"nothing ran out: {found}"
        if _cuda(device):
            texts = {str(trial.error) for trial in failed}
            assert all("out of memory" in text for text in texts), f"{texts}"
            assert found.largest * width * 4 < 512 * MIB, f"{found.largest} cannot fit"
            gc.collect()
            left = torch.cuda.memory_allocated() - ready
            assert left < 40 * MIB, f"{left / MIB:.0f} MiB were left behind"  # a copy of the state has 50
        if mode == "bisect":
            least = min(trial.size for trial in failed)
            assert least == found.largest + multiple, f"{found.largest} fits, {least} does not"
        assert not _differing(state, before), "the state changed"
        said.append(f"{mode}: {found.size} of {len(found.trials)} trials in {took:.1f} s")
    return "; ".join(said)


def micro_batches_are_found(device: str) -> str:
    """auto_accumulate: memory that really runs out; bitwise the run with that many micro-batches from the start."""
    model, width = _wide(device)
    n = 32768 if _cuda(device) else 32
    tx = ft.optim.adamw(1e-3)

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        if not _cuda(device) and len(batch) > n // 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")  # as there
        loss: Tensor = model(batch).square().mean()
        return loss

    def make(k: int) -> Any:
        return ft.with_ema(ft.train_step(model, loss_fn, tx, accumulate=k), 0.9)

    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, width, generator=draw).to(device) for _ in range(4)]
    state = ft.init(model, tx, seed=0)
    said = []
    for compiled in (False, True) if _cuda(device) else (False,):
        more = _between(device, make, state, batches[0])
        auto = ft.auto_accumulate(make)
        flag = ft.once(ft.at(2), lambda state, event: state, name="flag")  # lies on the CPU
        how: dict[str, Any] = {"hooks": [flag], "progress": False, "compile": compiled}
        with _limited(device, more), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = ft.fit(state, auto, batches, **how)
        told = [str(one.message) for one in caught if issubclass(one.category, ft.errors.MemoryWarning)]
        assert auto.k > 1, "memory did not run out"
        assert told, "nobody said so"
        assert int(ours.state.step) == len(batches), f"{int(ours.state.step)} steps"
        by_hand = ft.fit(state, make(auto.k), batches, **how)
        own = {name: ours.state.extra[name] for name in by_hand.state.extra}
        off = _differing(own, by_hand.state.extra) + _differing(ours.state.params, by_hand.state.params)
        off += _differing(ours.state.opt, by_hand.state.opt)
        assert not off, (
            f"k={auto.k}, compiled={compiled}: {len(off)} leaves differ or lie elsewhere: {', '.join(off[:4])}"
        )
        assert (ours.history["loss"] == by_hand.history["loss"]).all(), "the losses differ"
        said.append(f"{'compiled' if compiled else 'eager'}: k={auto.k}")
    return f"{', '.join(said)}, bitwise"


def _between(device: str, make: Callable[[int], Any], state: Any, batch: Tensor) -> int:
    """Bytes that do for a step in eight parts (not compiled) and for half as much again, but not for one in one part."""
    if not _cuda(device):
        return 0

    def takes(k: int) -> int:
        step = make(k)
        return peak(lambda: step(step.init(state), batch), batch.device)

    few, many = takes(8), takes(1)
    assert many > 2 * few, f"parts save nothing: {many} and {few} bytes"
    return min(few + few // 2 + 64 * MIB, many - 16 * MIB)


def peak_is_estimated(device: str) -> str:
    """check: the estimated peak of memory is that of the allocator, within a tenth (a CNN: not below it by more than half)."""
    big = _cuda(device)
    width, rows = (1024, 4096) if big else (64, 256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models: dict[str, tuple[nn.Module, tuple[int, ...], float]] = {
            "update bound": (_mlp(width * 2, 4), (32, width * 2), 0.1),
            "batch bound": (_mlp(width, 4), (rows * 4, width), 0.1),
            "transformer": (
                nn.TransformerEncoderLayer(width // 2, 8, width * 2, dropout=0.0, batch_first=True),
                (rows // 64, 256 if big else 32, width // 2),
                0.1,
            ),
            "cnn": (
                nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
                (64 if big else 4, 3, 64 if big else 24, 64 if big else 24),
                0.5,  # kernels' own memory, which is not estimated
            ),
        }
    said, wrong = [], []
    for name, (made, shape, allowed) in models.items():
        model = made.to(device)
        tx = ft.optim.adamw(1e-3)
        step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
        state = ft.init(model, tx, seed=0)
        batch = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        told = ft.check(step, state, batch, compile=False).memory
        step(state, batch)  # what cuBLAS keeps for itself is taken now
        gc.collect()
        measured = (
            told.state + told.batch + peak(lambda step=step, state=state, batch=batch: step(state, batch), batch.device)
        )
        off = told.peak / measured - 1
        said.append(f"{name} {told.peak / MIB:.1f} of {measured / MIB:.1f} MiB ({off:+.1%})")
        wrong += [said[-1]] if not -allowed < off < 0.1 else []
    assert not wrong, "; ".join(wrong)
    return "; ".join(said)


def _mlp(width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers)


# ------------------------------------------------------------------------------------------------------------------ profile


def profile_is_written(device: str) -> str:
    """profile(memory=True): a trace with the device's kernels, and the snapshot of its memory; recording is off afterwards."""
    problem = cases.small(device)
    model, tx = problem.model(), cases.ft_adamw()
    step = ft.train_step(model, cases.loss_fn, tx)
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as root:
        hook = ft.profile(at=(5, 7), path=root, memory=True)
        result = ft.fit(ft.init(model, tx, seed=0), step, problem.batches, steps=12, hooks=[hook], **_how(device))
        files = {path.name: path for path in Path(root).iterdir()}
        memory = "memory_5-7.pickle" if _cuda(device) else "memory_5-7.txt"
        wanted = {"ops_5-7.txt", "split_5-7.json", "trace_5-7.json", memory}
        assert set(files) == wanted, f"{sorted(files)}"
        trace = json.loads(files["trace_5-7.json"].read_text())["traceEvents"]
        kinds = {str(event.get("cat")) for event in trace}
        steps = [e for e in trace if e.get("name") == "ftrain: step" and e.get("cat") == "user_annotation"]
        assert len(steps) == 3, f"{len(steps)} ranges of steps in the trace"
        said = f"{len(trace)} events"
        if _cuda(device):
            assert "kernel" in kinds, f"no kernels in the trace, but {sorted(kinds)}"
            # Read, not loaded: a pickle can run code.
            words = {str(arg) for _, arg, _ in pickletools.genops(files[memory].read_bytes()) if isinstance(arg, str)}
            missing = {"segments", "device_traces", "alloc"} - words
            assert not missing, f"the snapshot lacks {missing}"
            recorded = getattr(torch._C, "_cuda_isHistoryEnabled", None)
            assert recorded is None or not recorded(), "allocations are recorded still"
            said += f", {sum(e.get('cat') == 'kernel' for e in trace)} kernels, a snapshot of {files[memory].stat().st_size} B"
        split = json.loads(files["split_5-7.json"].read_text())
        assert split["complete"] == 3, f"{split}"
        assert "aten::" in files["ops_5-7.txt"].read_text() or _cuda(device), "no operations"
    without = ft.fit(ft.init(model, tx, seed=0), step, problem.batches, steps=12, **_how(device))
    assert not _differing(result.state, without.state), "the run is another one with the profiler"
    return said


# ----------------------------------------------------------------------------------------------------- the same to the last bit


def deterministic_is_bitwise(device: str) -> str:
    """deterministic: four runs of a CNN in two processes are bitwise equal, without a warning of cuBLAS."""
    processes = [children.start(__file__, "cnn", device) for _ in range(2)]
    found = [children.finish(process) for process in processes]
    runs = [run for one in found for run in one["runs"]]
    assert len(runs) == 4, f"{len(runs)} runs"
    assert len(set(runs)) == 1, f"{len(set(runs))} different results of 4"
    said = [text for one in found for text in one["warned"]]
    assert not said, f"{said[0]}"
    assert all(one["moved"] for one in found), "nothing was trained"
    # Only on a GPU is there an operation here that torch refuses, which shows that its switch was on.
    assert not _cuda(device) or all(one["refused"] for one in found), "adaptive pooling was not refused"
    return f"4 runs of {found[0]['steps']} steps, all {runs[0][:12]}"


def _cnn(device: str) -> dict[str, Any]:
    """What a child does: two runs, in a process whose first use of CUDA is inside of the context."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 3, 16, 16, generator=draw), torch.randint(0, 10, (256,), generator=draw)
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU()]
    model = nn.Sequential(*body, nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 25, 10))

    def loss_fn(model: Any, batch: Any) -> Tensor:
        out = model(batch["x"])
        # Sums by key: atomic additions on a GPU, in any order, unless it is told otherwise.
        sums = torch.zeros(10, 10, device=out.device).index_add(0, batch["y"], out)
        return F.cross_entropy(out, batch["y"]) + 1e-4 * sums.square().mean()

    tx = ft.optim.sgd(0.05, momentum=0.9)
    hashes: list[str] = []
    refused = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ft.deterministic():
            for _ in range(2):
                first = ft.init(model, tx, seed=0, device=device)
                step = ft.train_step(model, loss_fn, tx)
                data = {"x": x, "y": y}
                state = ft.fit(first, step, data, batch_size=32, epochs=3, **_how(device)).state
                digest = hashlib.sha256()
                for leaf in ft.tree.leaves(state):
                    digest.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
                hashes.append(digest.hexdigest())
            try:
                F.adaptive_avg_pool2d(torch.ones(1, 1, 8, 8, device=device, requires_grad=True), 3).sum().backward()
            except RuntimeError:
                refused = True
        assert not torch.are_deterministic_algorithms_enabled(), "the switch stayed"
    warned = [str(one.message) for one in caught if issubclass(one.category, ft.errors.DeterminismWarning)]
    moved = not torch.equal(first.params["0.weight"], state.params["0.weight"])
    return {"runs": hashes, "warned": warned, "refused": refused, "moved": moved, "steps": int(state.step)}


def replay_is_bitwise(device: str) -> str:
    """replay: a step of a run done again from a checkpoint on disk is that of the run, bit by bit."""
    problem = cases.small(device)
    model = problem.model(0.3)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), cases.ft_adamw())
    step = ft.with_ema(ft.train_step(model, cases.loss_fn, tx), 0.9)
    data = {key: torch.cat([batch[key] for batch in problem.batches[:8]])[:120] for key in ("x", "y")}
    state, kept = ft.init(model, tx, seed=0), {}

    def keep(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
        kept[event.step] = state.copy()
        return state

    how = {"batch_size": 16, "epochs": 3, "hooks": [ft.on("step", keep)]}
    said = []
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as folder:
        ckpt = ft.Checkpoints(folder, every=ft.at(0) | ft.every(steps=5), keep=None)
        fast = ft.compile(step) if _cuda(device) else step
        result = ft.fit(state, fast, data, checkpoint=ckpt, log=ft.every(steps=1), **how, **_how(device))
        ran = dict(kept)
        options = {key: value for key, value in _how(device).items() if key != "progress"}
        for at in (3, 8, 14, 24):  # from the begin, a whole stretch later, and with the short batch of an epoch's end
            found = ft.replay(folder, at, state, fast, data, **how, **options)
            off = _differing(ran[at], found.state_after)
            assert not off, f"step {at}: {len(off)} leaves differ: {', '.join(off[:4])}"
            loss, was = float(found.metrics["loss"].compute()), float(result.history["loss"][at - 1])
            assert loss == was, f"step {at}: the loss is {loss} and was {was}"
            assert found.gradients is not None, f"step {at}: {found.note}"
            assert {g.device.type for g in found.gradients.values()} == {device}, "gradients lie elsewhere"
            said.append(f"{found.checkpoint} -> {at}")
    return f"from the checkpoint to the step: {', '.join(said)}"


# -------------------------------------------------------------------------------------------------------------- predictions


def predictions_are_right(device: str) -> str:
    """write_predictions: copied while the next batch is computed, and equal to the CPU's file, bit by bit."""
    from ftrain.loops.predictions import _to_host

    n, width = (20_000, 256) if _cuda(device) else (300, 16)
    draw = torch.Generator().manual_seed(0)
    # Small whole numbers, whose sums are exact in float32 and in TF32: so any device has to give the same.
    data = {"x": torch.randint(-3, 4, (n, width), generator=draw).float(), "key": torch.randperm(n, generator=draw)}
    model = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randint(-3, 4, (width, width), generator=draw).float())

    def outputs(model: Any, batch: Any) -> dict[str, Tensor]:
        out = model(batch["x"])
        busy = out
        for _ in range(20 if _cuda(device) else 1):  # something to do while the rows before are copied
            busy = (busy @ model.weight).clamp(-3, 3).round()
        return {"out": out, "busy": busy, "half": (out / 4).bfloat16()}

    step = ft.predict_step(model, outputs)
    source = ft.data.source(data, batch_size=512 if _cuda(device) else 32, shuffle=True, seed=0)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="ftrain-bench-") as folder:
        for where in ("cpu", device):
            state = ft.init(model, ft.optim.sgd(0.1), seed=0, device=where)
            path = f"{folder}/{len(found)}.npz"
            rows = ft.write_predictions(path, state, step, source, ids="key", compile=False)
            assert rows == n, f"{rows} rows of {n}"
            with np.load(path) as file:
                found[f"{where} {len(found)}"] = {name: file[name] for name in file.files}
    ours, theirs = found.values()
    assert set(ours) == {"out", "busy", "half", "id"}, f"{sorted(ours)}"
    for name in ours:
        same = np.array_equal(ours[name], theirs[name])
        assert same, f"{name}: {int((ours[name] != theirs[name]).sum())} of {ours[name].size} numbers differ"
    exact = data["x"][torch.from_numpy(np.argsort(data["key"].numpy()))[ours["id"]]] @ model.weight.detach().T
    assert np.array_equal(exact.numpy(), ours["out"]), "rows stand beside the ids of others"
    if not _cuda(device):
        return f"{n} rows"
    some = torch.ones(1 << 20, device=device)
    with no_sync(device):
        copy = _to_host(some)
    assert copy.is_pinned(), "the copies go into memory that is not pinned, so they are waited for"
    return f"{n} rows, pinned"


AROUND = [hooks_wait_for_nothing, hook_that_waits_is_seen, hooks_are_resumed, batch_size_is_found]
AROUND += [micro_batches_are_found, peak_is_estimated, profile_is_written, deterministic_is_bitwise]
AROUND += [replay_is_bitwise, predictions_are_right]


if __name__ == "__main__":
    import sys

    print(json.dumps({"cnn": _cnn}[sys.argv[1]](sys.argv[2])))
