"""Ready hooks that look: rates, throughput, time, devices, garbage. Whatever they tell, training is bitwise the one without them."""

from __future__ import annotations

import datetime
import gc
import math
import os
import sys
import time
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain as ft
from ftrain import errors
from ftrain.loops.hooks import device_stats as device_stats_function

from .test_resume import Memory

CLOCK = ft.loops.Clock
torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
TX = ft.optim.adamw(1e-2)
DATA = list(torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(1)))


def loss_fn(model: Any, batch: Any) -> Any:
    return (model(batch) - batch[:, :2]).square().mean()


STEP = ft.train_step(MODEL, loss_fn, TX)


def run(hooks: Any = (), *, step: Any = STEP, tx: Any = TX, **options: Any) -> ft.Result:
    more = {"epochs": 3, "log": ft.every(steps=2), "progress": False, "compile": False, **options}
    return ft.fit(ft.init(MODEL, tx, seed=0), step, more.pop("data", DATA), hooks=list(hooks), **more)


def trained(state: ft.TrainState) -> list[bytes]:
    parts = (state.params, state.buffers, state.opt, state.step, state.epoch, state.samples)
    return [leaf.numpy().tobytes() for leaf in ft.tree.leaves(parts)]


def told(result: ft.Result, name: str) -> list[tuple[int, float]]:
    return [(record.step, record.metrics[name]) for record in result.history if name in record.metrics]


WATCHING = {
    "learning_rate": lambda when: ft.hooks.learning_rate(every=when, prefix="own_"),
    "throughput": lambda when: ft.hooks.throughput(every=when, flops_per_step=1e6, peak="H100"),
    "timer": lambda when: ft.hooks.timer("1d", every=when),
    "device_stats": lambda when: ft.hooks.device_stats(every=when),
    "garbage_collection": lambda when: ft.hooks.garbage_collection(every=when),
}


@pytest.mark.parametrize("name", WATCHING)
@pytest.mark.parametrize("when", [ft.every(steps=1), ft.every(steps=10**9), ft.every(epochs=1)], ids=str)
def test_training_is_bitwise_the_one_without(name: str, when: Any) -> None:
    without, result = run(), run([WATCHING[name](when)])
    assert trained(result.state) == trained(without.state)
    fired = when != ft.every(steps=10**9)
    news = {key for record in result.history for key in record.metrics} - {"loss", "lr"}
    assert bool(news) == (fired and name != "garbage_collection")
    plain = [{k: v for k, v in record.metrics.items() if k not in news} for record in result.history]
    assert [one for one in plain if one] == [record.metrics for record in without.history]


@pytest.mark.parametrize("name", WATCHING)
def test_a_donated_compiled_step_bears_them(name: str) -> None:
    fast = ft.compile(STEP, backend="eager")
    result = run([WATCHING[name](ft.every(steps=1))], step=fast, compile=True)
    assert trained(result.state) == trained(run(step=ft.compile(STEP, backend="eager"), compile=True).state)
    assert fast.compiles == 1


@pytest.mark.parametrize("name", ["learning_rate", "throughput", "device_stats"])
def test_nothing_is_read_from_the_device(name: str) -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    hooks = ft.loops.calling.Hooks([WATCHING[name](ft.every(steps=1))])
    state = hooks.init(ft.init(MODEL, TX))
    state.counters()
    hooks.passed(CLOCK(steps=1))
    with Reads() as reads:
        outcome = hooks(state, ft.Event("step", 2, 0, 12, CLOCK(2, 0, 12, 1.0)))
        assert outcome.metrics
        assert not reads.count
        float(next(iter(state.params.values())).sum())
    assert reads.count == 1, "the test would not see a read"


# -------------------------------------------------------------------------------------------------------- learning rates


def by_hand(tx: Any) -> Any:
    update = ft.make_update(ft.value_and_grad(ft.bind(MODEL, loss_fn)), tx)
    return ft.as_step(lambda state, batch: (update(state, batch)[0], {}), uses=[update])


def test_a_step_that_tells_nothing_has_its_rates_told() -> None:
    schedule = ft.schedules.piecewise_constant(0.1, {2: 0.1, 4: 0.5})
    tx = ft.optim.partition(
        {"0.*": "old", "*": "new"},
        {
            "old": ft.optim.inject(ft.optim.sgd)(lr=schedule, momentum=0.5),
            "new": ft.optim.from_torch(torch.optim.SGD, lr=0.25),
        },
    )
    hook = ft.hooks.learning_rate(every=ft.every(steps=1), hyper=("lr", "momentum"))
    result = run([hook], step=by_hand(tx), tx=tx, log=ft.every(steps=1), epochs=2)
    expected = [float(schedule(torch.tensor(i))) for i in range(8)]
    assert len(set(expected)) == 3
    assert told(result, "lr/old") == [(i + 1, pytest.approx(rate, rel=1e-15)) for i, rate in enumerate(expected)]
    assert {rate for _, rate in told(result, "lr/new")} == {0.25}
    assert {rate for _, rate in told(result, "momentum/old")} == {0.5}
    only = run([ft.hooks.learning_rate(every=ft.every(steps=1))], step=by_hand(tx), tx=tx)
    assert {name for record in only.history for name in record.metrics} == {"lr/old", "lr/new"}
    assert trained(only.state) == trained(run(step=by_hand(tx), tx=tx).state)


def test_what_the_step_tells_is_not_told_again() -> None:
    plain, hooked = run(), run([ft.hooks.learning_rate(every=ft.every(steps=1))])
    assert [record.metrics for record in plain.history] == [record.metrics for record in hooked.history]
    named = run([ft.hooks.learning_rate(every=ft.every(steps=2), prefix="optimizer_")])
    assert told(named, "optimizer_lr") == told(named, "lr")
    chained = ft.optim.chain(ft.optim.sgd(0.1), ft.optim.inject(ft.optim.sgd)(lr=0.2))
    two = run([ft.hooks.learning_rate(every=ft.every(steps=1))], step=by_hand(chained), tx=chained)
    assert {name for record in two.history for name in record.metrics} == {"lr", "lr_2"}


def test_what_is_in_no_state_is_refused_before_the_first_step() -> None:
    with pytest.raises(errors.HookError) as error:
        run([ft.hooks.learning_rate(hyper=["lr", "weight_decay"])])
    for part in (
        "ft.hooks.learning_rate: no optimizer has 'weight_decay' in its state",
        "where:    state.opt",
        "expected: one of: lr",
        "weight_decay=...)",
    ):
        assert part in str(error.value)


# ------------------------------------------------------------------------------------------------------------ throughput


def look(hook: Any, memory: Any, clock: Any, state: Any) -> tuple[dict[str, float], Any]:
    out, memory = hook.hook.update(state, memory, ft.Event("step", clock.steps, 0, clock.samples, clock))
    return {name: float(value) for name, value in out.metrics.items()}, memory


def test_rates_are_differences_of_the_clock() -> None:
    state = ft.init(MODEL, TX)
    hook = ft.hooks.throughput(flops_per_token=2e9, peak=4e12)
    memory = hook.hook.init(state)
    first, memory = look(hook, memory, CLOCK(10, 0, 80, 5.0, 800), state)
    assert first == {
        "steps_per_second": 2.0,
        "samples_per_second": 16.0,
        "tokens_per_second": 160.0,
        "tflops_per_second": 0.32,
        "mfu": 0.08,
    }
    second, memory = look(hook, memory, CLOCK(20, 0, 180, 7.0, 2800), state)
    assert second == {
        "steps_per_second": 5.0,
        "samples_per_second": 50.0,
        "tokens_per_second": 1000.0,
        "tflops_per_second": 2.0,
        "mfu": 0.5,
    }
    assert {name: (float(value), value.dtype) for name, value in memory.items()} == {
        "steps": (20.0, torch.int64),
        "samples": (180.0, torch.int64),
        "tokens": (2800.0, torch.int64),
        "seconds": (7.0, torch.float64),
    }


@pytest.mark.parametrize(
    ("given", "tflops"), [({"flops_per_step": 4e12}, 20.0), ({"flops_per_sample": 1e12}, 50.0), ({}, None)]
)
def test_operations_of_a_step_or_a_sample(given: dict[str, float], tflops: float | None) -> None:
    state, hook = ft.init(MODEL, TX), ft.hooks.throughput(**given)
    found, _ = look(hook, hook.hook.init(state), CLOCK(10, 0, 100, 2.0), state)
    assert found.get("tflops_per_second") == tflops
    assert "mfu" not in found
    assert "tokens_per_second" not in found


@pytest.mark.parametrize(
    ("peak", "flops"),
    [
        ("H100", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("nvidia l40s", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        (1e12, 1e12),
    ],
)
def test_peaks_of_devices(peak: Any, flops: float) -> None:
    state, hook = ft.init(MODEL, TX), ft.hooks.throughput(flops_per_step=flops, peak=peak)
    assert look(hook, hook.hook.init(state), CLOCK(1, 0, 1, 1.0), state)[0]["mfu"] == 1.0


class Ticking:
    """A clock that goes on when somebody says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def step(self, seconds: float) -> Any:
        def step(state: Any, batch: Any) -> Any:
            self.now += seconds
            return STEP(state, batch)

        return step


def test_throughput_of_a_run_and_of_its_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking = Ticking(monkeypatch)

    def measured(saver: Any = None, **more: Any) -> ft.Result:
        hook = ft.hooks.throughput(every=ft.every(steps=2))
        return run([hook], step=ticking.step(0.5), tokens=lambda batch: 7, checkpoint=saver, **more)

    saver = Memory(ft.every(steps=1))
    whole = measured(saver)
    assert [rate for _, rate in told(whole, "steps_per_second")] == [2.0] * 6
    assert [rate for _, rate in told(whole, "samples_per_second")] == [12.0] * 6
    assert [rate for _, rate in told(whole, "tokens_per_second")] == [14.0] * 6
    assert float(whole.state.extra["throughput"]["seconds"]) == 6.0
    for shot in saver.shots:  # in the middle between two looks, too
        ticking.now += 1000.0  # between two processes: nobody's time
        again = measured(Memory(ft.every(epochs=9), shot), resume="auto")
        assert [r.metrics for r in again.history] == [r.metrics for r in whole.history]
        assert ft.tree.map(float, again.state.extra) == ft.tree.map(float, whole.state.extra)


def test_tokens_that_nobody_counts() -> None:
    with pytest.raises(
        errors.HookError, match=r"flops_per_token= is given, but nobody counts tokens(.|\n)*tokens=lambda batch"
    ):
        run([ft.hooks.throughput(every=ft.every(steps=1), flops_per_token=1.0)])


# ----------------------------------------------------------------------------------------------------------------- timer


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("08:00:00", 28800),
        ("0:0:1.5", 1.5),
        ("100:00:00", 360000),
        ("1:12:00:00", 129600),
        ("1d 2h", 93600),
        ("90 min", 5400),
        ("1h30m5s", 5405),
        ("1.5h", 5400),
        (90, 90),
        (0.5, 0.5),
        (datetime.timedelta(minutes=2), 120),
    ],
)
def test_durations(duration: Any, seconds: float) -> None:
    hook = ft.hooks.timer(duration)
    state = ft.init(MODEL, TX)
    before = hook.hook(state, ft.Event("step", 1, 0, 1, CLOCK(seconds=seconds * 0.75)))
    assert before.stop is None
    assert before.metrics == {"elapsed_seconds": seconds * 0.75, "remaining_seconds": pytest.approx(seconds * 0.25)}
    after = hook.hook(state, ft.Event("step", 1, 0, 1, CLOCK(seconds=seconds)))
    assert after.stop.startswith("timer: ")
    assert after.metrics["remaining_seconds"] == 0.0


@pytest.mark.parametrize(
    "duration",
    ["", "8", "8:00", "1:60:00", "1d 2x", "soon", 0, -1, math.nan, math.inf, True, None, datetime.timedelta(0)],
)
def test_what_is_no_duration(duration: Any) -> None:
    with pytest.raises(
        errors.LimitError, match=r"is no duration\.(.|\n)*\(h:m:s\)(.|\n)*ft\.hooks\.timer\(\"8:00:00\"\)"
    ):
        ft.hooks.timer(duration)


def test_the_time_is_up_at_the_first_step_after_it_and_survives_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking = Ticking(monkeypatch)

    def timed(saver: Any = None, **more: Any) -> ft.Result:
        hook = ft.hooks.timer("0:01:10", every=ft.every(steps=3))
        return run([hook], step=ticking.step(10.0), checkpoint=saver, **more)

    saver = Memory(ft.every(steps=1))
    whole = timed(saver)
    assert (whole.reason, whole.state.counters().step) == ("timer: 0:01:10 are over", 7)
    assert told(whole, "remaining_seconds") == [(4, 40.0), (6, 10.0), (7, 0.0)]
    assert told(whole, "elapsed_seconds") == [(4, 30.0), (6, 60.0), (7, 70.0)]
    for shot in saver.shots:
        ticking.now += 1000.0
        again = timed(Memory(ft.every(epochs=9), shot), resume="auto")
        assert (again.reason, trained(again.state)) == (whole.reason, trained(whole.state))
        assert [r.metrics for r in again.history] == [r.metrics for r in whole.history]


# --------------------------------------------------------------------------------------------------------------- devices


def test_memory_of_this_process() -> None:
    keep = bytearray(os.urandom(1)) * 2**26
    before = run([ft.hooks.device_stats(every=ft.every(steps=2))])
    _, resident = told(before, "resident")[-1]
    assert resident == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert len(keep) < resident
    assert all(0 <= percent < 100 * (os.cpu_count() or 1) + 50 for _, percent in told(before, "cpu_percent"))
    assert any(percent > 0 for _, percent in told(before, "cpu_percent"))
    assert told(before, "load")[-1][1] >= 0


def test_processor_time_is_that_since_the_look_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"cpu": 100.0, "wall": 50.0}
    monkeypatch.setattr(time, "process_time", lambda: now["cpu"])
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    hook, state = ft.hooks.device_stats(), ft.init(MODEL, TX)
    found = []
    for cpu, wall in ((3.0, 1.0), (1.0, 2.0)):
        now["cpu"], now["wall"] = now["cpu"] + cpu, now["wall"] + wall
        found.append(hook.hook(state, ft.Event("step", 1, 0, 1)).metrics["cpu_percent"])
    assert found == [300.0, 50.0]


def test_memory_of_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stats(device: Any) -> dict[str, int]:
        asked.append(device)
        return {"allocated_bytes.all.current": 10, "allocated_bytes.all.peak": 30, "reserved_bytes.all.current": 40}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    hook = ft.hooks.device_stats(devices=["cuda:1", 0], process=False)
    told = hook.hook(ft.init(MODEL, TX), ft.Event("step", 1, 0, 1)).metrics
    assert told == {
        f"cuda{index}_{name}": value
        for index in (0, 1)
        for name, value in {"allocated": 10.0, "peak_allocated": 30.0, "reserved": 40.0, "retries": 0.0}.items()
    }
    assert asked == [torch.device("cuda:1"), torch.device("cuda:0")]


def test_without_proc_it_is_psutil_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[device_stats_function.__module__]
    monkeypatch.setattr(module, "_STATM", "/no/such/file")
    assert told(run([ft.hooks.device_stats(every=ft.every(steps=2))]), "resident")[-1][1] > 1e7
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(errors.HookError, match=r"nothing tells how much memory(.|\n)*pip install psutil"):
        run([ft.hooks.device_stats(every=ft.every(steps=2))])
    assert run([ft.hooks.device_stats(every=ft.every(steps=2), process=False)]).reason == "epochs"


# --------------------------------------------------------------------------------------------------------------- garbage


class Collections:
    """What the collector does, and when: (step, generation)."""

    def __init__(self) -> None:
        self.step, self.found = 0, []

    def __enter__(self) -> Collections:
        gc.collect()
        gc.callbacks.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        gc.callbacks.remove(self)

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.found.append((self.step, info["generation"]))

    def hook(self, state: Any, event: Any) -> Any:
        self.step = event.step
        return state


def test_garbage_is_collected_at_the_cadence_and_at_no_other_time() -> None:
    gc_was = gc.get_threshold()
    gc.set_threshold(50)  # often, where it is not turned off
    try:
        with Collections() as plain:
            run([ft.on("step", plain.hook)])
        assert len({step for step, _ in plain.found}) > 3
        with Collections() as ours:
            hooks = [
                ft.on("step", ours.hook),
                ft.hooks.garbage_collection(every=ft.every(steps=5), generation=2),
            ]
            result = run(hooks)
            found = [one for one in ours.found if one[0] < 12]  # when the run is over, it is on again
    finally:
        gc.set_threshold(*gc_was)
    inside = [one for one in found if one[0] > 0]
    assert inside == [(5, 2), (10, 2)]
    assert (0, 2) in found  # at the start
    assert result.reason == "epochs"
    assert gc.isenabled()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("ends", ["end", "exception", "stop"])
def test_the_collector_is_left_as_it_was(enabled: bool, ends: str) -> None:
    seen = []

    def hook(state: Any, event: Any) -> Any:
        seen.append(gc.isenabled())
        if event.step == 3 and ends == "exception":
            raise OSError("no more paper")
        return ft.Outcome(state, stop="enough" if ends == "stop" and event.step == 3 else None)

    (gc.enable if enabled else gc.disable)()
    try:
        try:
            run([ft.hooks.garbage_collection(), ft.on("step", hook)])
        except OSError:
            assert ends == "exception"
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert seen == [False] * (12 if ends == "end" else 3)


def test_a_run_that_is_resumed_turns_the_collector_off_too() -> None:
    saver = Memory(ft.every(steps=1))
    run([ft.hooks.garbage_collection()], checkpoint=saver)
    seen = []
    watch = ft.on("step", lambda state, event: seen.append(gc.isenabled()) or state)
    again = Memory(ft.every(epochs=9), saver.shots[4])
    run([ft.hooks.garbage_collection(), watch], checkpoint=again, resume="auto")
    assert seen == [False] * 7
    assert gc.isenabled()


# ---------------------------------------------------------------------------------------------------- a function of one's own


def test_a_lambda_is_a_hook() -> None:
    seen = []
    hook = ft.on("epoch", lambda state, event: seen.append((event.epoch, event.step)) or state)
    assert trained(run([hook]).state) == trained(run().state)
    assert seen == [(1, 4), (2, 8), (3, 12)]
    halve = ft.on("epoch", lambda state, event: state.replace(params={k: v / 2 for k, v in state.params.items()}))
    state = ft.init(MODEL, TX, seed=0)
    for _ in range(3):
        for batch in DATA:
            state, _ = STEP(state, batch)
        state = state.replace(params={k: v / 2 for k, v in state.params.items()})
    assert trained(state.replace(epoch=state.epoch + 3)) == trained(run([halve]).state)


# ------------------------------------------------------------------------------------------------------------- bad input


BAD = {
    "every": (
        lambda: ft.hooks.learning_rate(every=10),
        errors.LimitError,
        r"learning_rate: every= is no cadence(.|\n)*got: +10",
    ),
    "hyper": (lambda: ft.hooks.learning_rate(hyper=[3]), errors.ArgumentError, r"hyper= are names(.|\n)*got: +\[3\]"),
    "no hyper": (lambda: ft.hooks.learning_rate(hyper=()), errors.ArgumentError, r"hyper= are names"),
    "prefix": (lambda: ft.hooks.learning_rate(prefix=3), errors.ArgumentError, r"prefix= is text"),
    "flops": (lambda: ft.hooks.throughput(flops_per_step=-1), errors.LimitError, r"flops_per_step=-1 makes no sense"),
    "two flops": (
        lambda: ft.hooks.throughput(flops_per_step=1.0, flops_per_token=1.0),
        errors.LimitError,
        r"operations of one step, one sample or one token(.|\n)*got: +flops_per_step= and flops_per_token=",
    ),
    "peak alone": (
        lambda: ft.hooks.throughput(peak="H100"),
        errors.LimitError,
        r"peak= is what the operations(.|\n)*got: +none",
    ),
    "peak": (
        lambda: ft.hooks.throughput(flops_per_step=1.0, peak="H10"),
        errors.LimitError,
        r"the peak of 'H10' is not in the table(.|\n)*H100 PCIe(.|\n)*peak='H100'",
    ),
    "peak number": (
        lambda: ft.hooks.throughput(flops_per_step=1.0, peak=0),
        errors.LimitError,
        r"peak=0 makes no sense",
    ),
    "timer": (lambda: ft.hooks.timer("1h", every="step"), errors.LimitError, r"ft\.hooks\.timer: every= is no cadence"),
    "devices": (
        lambda: ft.hooks.device_stats(devices=["cpu"]),
        errors.DeviceError,
        r"'cpu' keeps no books(.|\n)*expected: CUDA",
    ),
    "no device": (lambda: ft.hooks.device_stats(devices=["gpu"]), errors.DeviceError, r"'gpu' keeps no books"),
    "no cuda": (
        lambda: ft.hooks.device_stats(devices=[0]),
        errors.DeviceError,
        r"has no CUDA(.|\n)*leave out devices=",
    ),
    "nothing": (lambda: ft.hooks.device_stats(devices=[], process=False), errors.ArgumentError, r"nothing to tell"),
    "generation": (
        lambda: ft.hooks.garbage_collection(generation=3),
        errors.LimitError,
        r"no such generation(.|\n)*0, 1 or 2",
    ),
    "gc every": (
        lambda: ft.hooks.garbage_collection(every=100),
        errors.LimitError,
        r"every= is no cadence(.|\n)*steps=1000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    make, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        make()
