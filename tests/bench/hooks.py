"""What happens around the steps: hooks that do not fire and hooks that do, evaluation, metrics, and what skips a bad batch.

Hooks and metrics are timed around a step that does nothing, so that what is timed is `fit`; evaluation and skipping around compiled steps.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cases
import report
import torch
from data import Nothing, difference, overheads
from rounds import Contender, Samples, Spread, measure, ratio
from torch import Tensor, nn

import ftrain as ft
from ftrain.errors import ProfileWarning
from ftrain.metrics import normalise
from ftrain.steps.compile import CompiledStep

MOST = 3.0  # microseconds a step that ten hooks may take that do not fire
LATE = 10**8  # steps: never reached
STEPS = 100_000
NAMES = 50


# ---------------------------------------------------------------------------------------------------------------------- hooks


def idle(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
    return state


def ten(root: str) -> list[Any]:
    """Ten hooks as a run may have them, none of which fires in the middle of an epoch."""
    return [
        ft.on("epoch", idle),
        ft.on(ft.every(epochs=1), idle),
        ft.on(ft.every(steps=LATE), idle),
        ft.on(ft.every(seconds=3600), idle),
        ft.once(ft.at(LATE), idle),
        ft.hooks.early_stop("val/loss"),
        ft.hooks.plateau("val/loss"),
        ft.hooks.device_stats(every=ft.every(steps=LATE)),
        ft.hooks.learning_rate(every=ft.every(steps=LATE)),
        ft.profile(at=LATE, path=f"{root}/profile"),
    ]


def counter() -> ft.Hook:
    """A hook with memory that does a little at every event."""

    def update(state: ft.TrainState, memory: dict[str, Tensor], event: ft.Event) -> Any:
        return state, {"calls": memory["calls"] + 1}

    return ft.Hook("calls", lambda state: {"calls": torch.zeros((), dtype=torch.int64)}, update)


def identity(state: ft.TrainState, batch: Any) -> Any:
    """The identity step as a user writes it."""
    return state, {"loss": _ONE}


_ONE = torch.ones(())


def fits(root: str) -> Callable[..., Callable[[int], object]]:
    """Makes what runs `fit` with certain hooks, for so many steps in the middle of one epoch."""
    data = [{"x": torch.zeros(16, 32), "y": torch.zeros(16, dtype=torch.int64)}] * (STEPS + 1)
    model, tx = nn.Linear(2, 2), ft.optim.inject(ft.optim.sgd)(lr=0.1)
    state = ft.init(model, tx)
    looked = ft.eval_step(model, lambda model, batch: {"loss": model(batch).mean()})
    # Before the first step: whatever waits for an evaluation has seen one, and none falls between the steps.
    evals = {"val": ft.Evaluator(looked, [torch.ones(4, 2)], every=ft.at(0))}

    def make(hooks: Callable[[], list[Any]], step: Any) -> Callable[[int], object]:
        def run(steps: int) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ProfileWarning)  # the steps to profile are never reached: on purpose
                options = {"evals": evals, "progress": False, "compile": False}
                found = ft.fit(state, step, data, steps=steps, epochs=1, hooks=hooks(), **options)
            assert found.reason == "steps", found

        return run

    return make


def hook_contenders(root: str, scale: int) -> list[Contender]:
    """On a step that is ready: what is timed is `fit` itself."""
    make, nothing = fits(root), Nothing()

    def one(key: str, label: str, hooks: Callable[[], list[Any]], steps: int = STEPS // 5) -> Contender:
        return Contender(key, label, make(hooks, nothing), steps // scale, sets_up=True)

    samples = ft.every(samples=LATE * 16)
    return [
        one("none", "no hooks", list, STEPS),
        one("ten", "ten hooks that do not fire", lambda: ten(root), STEPS),
        one("step", "one at every step, which does nothing", lambda: [ft.on("step", idle)]),
        one("ten_step", "ten that do not fire, and one at every step", lambda: [*ten(root), ft.on("step", idle)]),
        one("when", "one behind a predicate: False", lambda: [ft.on("step", ft.when(lambda event: False, idle))]),
        one("memory", "one with memory at every step: counts", lambda: [ft.on("step", counter())]),
        one("samples", "one at every(samples=), which does not fire", lambda: [ft.on(samples, idle)]),
        one("ten_samples", "ten at every(samples=), which do not fire", lambda: [ft.on(samples, idle)] * 10),
    ]


def eager_contenders(root: str, scale: int) -> list[Contender]:
    """On a function of the user's, with `compile=False`: memory that hooks keep in the state is carried through the step."""
    make = fits(root)
    steps = 5000 // scale
    return [
        Contender("none", "no hooks", make(list, identity), steps, sets_up=True),
        Contender("ten", "ten hooks that do not fire", make(lambda: ten(root), identity), steps, sets_up=True),
    ]


# ----------------------------------------------------------------------------------------------------------------- evaluation


class Watched(CompiledStep):
    """A compiled step whose calls are timed one by one."""

    def __init__(self, step: CompiledStep) -> None:
        self.__dict__.update(step.__dict__)
        self.wall = self.busy = 0.0

    def __call__(self, state: ft.TrainState, batch: Any) -> Any:
        wall, busy = time.perf_counter(), time.process_time()
        out = super().__call__(state, batch)
        self.busy += time.process_time() - busy
        self.wall += time.perf_counter() - wall
        return out


def evaluation(rounds: int, scale: int, tell: Callable[[str], object]) -> dict[str, Samples]:
    """The calls of the step alone, in runs with and without an evaluation after every 100 of them."""
    problem = cases.small()
    model, tx = problem.model(), cases.ft_adamw()
    step = Watched(ft.compile(ft.train_step(model, cases.loss_fn, tx)))
    looked = ft.compile(ft.eval_step(model, lambda model, batch: {"loss": cases.loss_fn(model, batch)}), donate=False)
    state, steps = ft.init(model, tx, seed=0), 2000 // scale
    evals = {"val": ft.Evaluator(looked, problem.batches[:20], every=ft.every(steps=100))}
    kinds = {"without": ("no evaluation", {}), "with": ("20 batches evaluated after every 100 steps", evals)}
    found = {}
    for key, (label, wanted) in kinds.items():
        tell(f"first call: {label}")
        began = time.perf_counter()
        ft.fit(state, step, problem.batches, steps=200, evals=wanted, progress=False)
        found[key] = Samples(label, round(time.perf_counter() - began, 3))
    dice = random.Random(0)
    for number in range(rounds):
        tell(f"evaluation: round {number + 1} of {rounds}")
        for key in dice.sample(list(kinds), len(kinds)):
            gc.collect()
            step.wall = step.busy = 0.0
            result = ft.fit(state, step, problem.batches, steps=steps, evals=kinds[key][1], progress=False)
            evaluated = sum(record.split == "val" for record in result.history)
            assert evaluated == (steps // 100 if key == "with" else 0), evaluated
            found[key].step.append(step.wall / steps * 1e6)
            found[key].cpu.append(step.busy / steps * 1e6)
    return found


# -------------------------------------------------------------------------------------------------------------------- metrics

_READS = ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__")


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts how often a tensor is read."""
    found, own, deep = dict.fromkeys(_READS, 0), {name: getattr(Tensor, name) for name in _READS}, [False]

    def counting(name: str) -> Callable[..., Any]:
        def read(self: Tensor, *args: Any, **options: Any) -> Any:
            if deep[0]:
                return own[name](self, *args, **options)
            found[name] += 1
            deep[0] = True
            try:
                return own[name](self, *args, **options)
            finally:
                deep[0] = False

        return read

    try:
        for name in _READS:
            setattr(Tensor, name, counting(name))
        yield found
    finally:
        for name, method in own.items():
            setattr(Tensor, name, method)


class Telling(Nothing):
    """A step that does nothing, and tells metrics of so many names."""

    def __init__(self, count: int) -> None:
        super().__init__()
        told = {f"metric_{i}": torch.full((), float(i)) for i in range(count)}
        self._metrics = normalise(told, None, "the step's metrics")


def told_step(problem: cases.Problem, count: int) -> tuple[ft.TrainState, Any]:
    """A compiled step whose loss function tells `count` metrics, the loss among them."""
    model, tx = problem.model(), cases.ft_adamw()

    def loss_fn(model: nn.Module, batch: cases.Batch) -> Any:
        loss = cases.loss_fn(model, batch)
        return loss, {f"metric_{i}": loss.detach() + i for i in range(1, count)}

    return ft.init(model, tx, seed=0), ft.compile(ft.train_step(model, loss_fn, tx))


def metric_contenders(scale: int) -> tuple[list[Contender], dict[str, float]]:
    """One name and many, through a step that does nothing and a compiled one; and their transfers for each log point."""
    problem, found, transfers = cases.small(), [], {}
    empty = ft.init(nn.Linear(2, 2), ft.optim.sgd(0.1))
    # A tensor of each metric, as a step written by hand tells them; and one vector of all, as a compiled step does.
    kinds: dict[str, tuple[str, ft.TrainState, Any, int]] = {}
    for count in (1, NAMES):
        label = f"{count} name{'' if count == 1 else 's'}"
        kinds[f"nothing {count}"] = (f"step that does nothing, {label}", empty, Telling(count), 20_000)
    for count in (1, NAMES):
        label = f"{count} name{'' if count == 1 else 's'}"
        kinds[f"compiled {count}"] = (f"compiled step of the small MLP, {label}", *told_step(problem, count), 3000)
    for key, (label, state, step, steps) in kinds.items():

        def run(steps: int, state: ft.TrainState = state, step: Any = step, log: int = 50) -> ft.Result:
            return ft.fit(state, step, problem.batches, steps=steps, progress=False, log=ft.every(steps=log))

        names = {
            len(set(record.metrics) - {"lr"}) for record in run(200).history
        }  # the optimizer tells its rate besides
        assert names == {int(key.split()[1])}, names
        few, many = _reads(lambda run=run: run(400, log=100)), _reads(lambda run=run: run(400, log=10))  # type: ignore[misc]
        transfers[key] = (many[0] - few[0]) / (many[1] - few[1])
        found.append(Contender(key, label, run, steps // scale, sets_up=True))
    return found, transfers


def _reads(run: Callable[[], ft.Result]) -> tuple[int, int]:
    """How often a run read the device, and how many records it made."""
    with counted() as found:
        result = run()
    return sum(found.values()), len(result.history)


# -------------------------------------------------------------------------------------------------------------------- skipping


def middle() -> cases.Problem:
    """An MLP of 1.6 M parameters, where a copy of the state takes longer than a hook."""
    return cases.Problem.make("1.6 M MLP", (512, 1024, 1024, 10), batch=32, count=50)


def skip_contenders(problem: cases.Problem, steps: int) -> list[Contender]:
    """`fit` without any, with the hook that goes back, and with the step that skips."""

    def one(key: str, label: str, hooks: Callable[[], list[Any]] = list, wrap: Any = lambda step: step) -> Contender:
        state, inner = cases.ft_parts(problem)
        step = ft.compile(wrap(inner))

        def run(steps: int) -> None:
            ft.fit(state, step, problem.batches, steps=steps, hooks=hooks(), progress=False)

        return Contender(key, label, run, steps, sets_up=True)

    def guard(policy: str, **options: Any) -> Callable[[], list[Any]]:
        return lambda: [ft.hooks.spike_guard(policy, factor=float("inf"), **options)]

    return [
        one("plain", "ft.fit"),
        one("with_skip", "ft.with_skip", wrap=lambda step: ft.with_skip(step, factor=float("inf"))),
        one("rollback", 'spike_guard("rollback"), looks every 100 steps', guard("rollback", every=ft.every(steps=100))),
        one("skip", 'spike_guard("skip"), looks at every step', guard("skip")),
    ]


# ------------------------------------------------------------------------------------------------------------------------ all


def run(
    rounds: int, quick: bool, root: str, tell: Callable[[str], object]
) -> tuple[list[report.Table], list[report.Bar], dict[str, Any]]:
    """Tables, bars and samples."""
    scale, few = (10, 3) if quick else (1, max(rounds // 5, 3))
    hooks = measure(hook_contenders(root, scale), few, tell=tell, warm=500)
    eager = measure(eager_contenders(root, scale), 2 * few, tell=tell, warm=500)
    looked = evaluation(2 * few, scale, tell)
    contenders, transfers = metric_contenders(scale)
    told = measure(contenders, 2 * few, tell=tell, warm=200)
    skips = {"small MLP": measure(skip_contenders(cases.small(), 2000 // scale), few, tell=tell, warm=200)}
    large = middle()
    skips[large.name] = measure(skip_contenders(large, 200 // scale), few, tell=tell, warm=10)

    note = (
        f"A step that does nothing, ready batches, in the middle of an epoch; {STEPS // scale} steps a round with none and with the ten: at "
        "ends of epochs (two), at late steps, at a late second, once at a late step, early_stop, plateau, device_stats, learning_rate and "
        "ft.profile, three of them with memory. `set-up`: a run of one step; the times per step are without it."
    )
    tables = [
        overheads("Hooks, without the step", note, hooks, "no hooks"),
        overheads(
            "Hooks, an identity step with compile=False",
            "The same ten around a function that gives its state back; what is carried through an eager step is looked at leaf by leaf.",
            eager,
            "no hooks",
        ),
        report.times(
            "Steps beside evaluation",
            "Calls of the compiled step of the small MLP alone, each timed by itself, in runs of `fit`; the evaluations are not in them.",
            looked,
            "without",
        ),
        _told(told, transfers),
    ]
    for name, one in skips.items():
        title = f"Skipping bad batches, {name}"
        size = f"{(cases.small() if name != large.name else large).parameters() / 1e6:.3g} M parameters"
        tables.append(
            report.times(
                title,
                f"`fit` over the compiled step, {size}, AdamW, one thread; no batch is bad.",
                one,
                "plain",
                unit="us" if name != large.name else "ms",
            )
        )
    bars = [
        _more("ten hooks that do not fire, around a step that does nothing: us a step more than with none", hooks),
        _more("ten hooks that do not fire, an identity step with compile=False: us a step more than with none", eager),
        report.Bar(
            "compiled step beside evaluations / without",
            1.05,
            *(ratio(getattr(looked["with"], one), getattr(looked["without"], one)) for one in ("step", "cpu")),
        ),
        *[
            report.Bar(f"transfers for each log point, {told[key].label}", 1.0, Spread(n, n, n))
            for key, n in transfers.items()
            if key.endswith(str(NAMES))
        ],
    ]
    samples = {"hooks": hooks, "hooks, eager": eager, "evaluation": looked, "metrics": told}
    samples |= {f"skipping, {name}": one for name, one in skips.items()}
    return tables, bars, {**{name: report.samples(one) for name, one in samples.items()}, "transfers": transfers}


def _more(text: str, found: dict[str, Samples]) -> report.Bar:
    wall, cpu = (difference(getattr(found["ten"], one), getattr(found["none"], one)) for one in ("step", "cpu"))
    return report.Bar(text, MOST, wall, cpu)


def _told(found: dict[str, Samples], transfers: dict[str, float]) -> report.Table:
    rows = []
    for key, one in found.items():
        alone = found[f"{key.split()[0]} 1"]
        step, more = Spread.of(one.step), difference(one.step, alone.step)
        rows.append(
            [
                one.label,
                f"{step.median:.1f}",
                f"{step.low:.1f} .. {step.high:.1f}",
                f"{more.median:.1f}",
                f"{difference(one.cpu, alone.cpu).median:.1f}",
                f"{transfers[key]:.2f}",
            ]
        )
    note = (
        "`fit`, which records every 50 steps. `transfers`: how often a tensor is read for each log point (tolist, item, cpu, numpy, float, "
        "int, bool), from two runs with different numbers of them."
    )
    columns = ["", "us/step", "quartiles", "us more than 1 name", "by CPU", "transfers"]
    return report.Table("Metrics of many names", note, columns, rows)
