"""What data costs: the device feed, seeking, and what the loop and `fit` take to know where in the data they are.

Times are of the host alone: ready batches from a list, and a step that does nothing.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import report
import torch
from rounds import Contender, Samples, Spread, measure, ratio
from torch import Tensor

import ftrain as ft
from ftrain.data import Feed, Reader
from ftrain.metrics import normalise
from ftrain.steps.compile import CompiledStep

Batch = dict[str, Any]
NEAR, FAR = 10, 1_000_000
MOST = 5.0  # microseconds of the feed for a step
COUNT = 500  # ready batches, an epoch


# ------------------------------------------------------------------------------------------------------------------- the feed


def batches() -> list[Batch]:
    """As those of the small MLP."""
    return [{"x": torch.zeros(16, 32), "y": torch.zeros(16, dtype=torch.int64)} for _ in range(COUNT)]


def feed_contenders() -> list[Contender]:
    flat = batches()
    nested = [{"input": {"x": one["x"], "mask": one["x"]}, "target": (one["y"], one["y"])} for one in flat]
    device = torch.device("cpu")

    def over(epoch: Callable[[], Iterator[Any]]) -> Callable[[int], object]:
        def run(steps: int) -> None:
            for _ in itertools.islice(itertools.chain.from_iterable(epoch() for _ in itertools.count()), steps):
                pass

        return run

    return [
        Contender("bare", "bare loop over the list", over(lambda: iter(flat)), 200_000),
        Contender("reader", "Reader", over(lambda: Reader(iter(flat))), 40_000),
        Contender(
            "feed", "Feed(Reader), batches of two tensors", over(lambda: Feed(Reader(iter(flat)), device)), 40_000
        ),
        Contender(
            "feed_nested",
            "Feed(Reader), batches of four tensors in dicts and tuples",
            over(lambda: Feed(Reader(iter(nested)), device)),
            10_000,
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- loop and fit


class Nothing(CompiledStep):
    """A step that is ready and does nothing: what is timed is what is around it."""

    def __init__(self) -> None:
        super().__init__(
            lambda state, batch: (state, {}), donate=False, rung="eager", compiler=lambda fn: fn, dynamic=None
        )
        self._metrics = normalise({"loss": torch.ones(())}, None, "the step's metrics")

    def __call__(self, state: ft.TrainState, batch: Any) -> Any:
        return state, self._metrics


def loop_contenders(root: str) -> list[Contender]:
    """The loop, and `fit`, over ready batches. Each call of `fit` with checkpoints writes its history and its last state under `root`."""
    ready, step = batches(), Nothing()
    state = ft.init(torch.nn.Linear(2, 2), ft.optim.sgd(0.1))

    def bare(steps: int) -> None:
        for batch in itertools.islice(itertools.cycle(ready), steps):
            step(state, batch)

    def loop(steps: int) -> None:
        for _ in ft.loop(state, step, ready, steps=steps):
            pass

    def positions(steps: int) -> None:
        for tick in ft.loop(state, step, ready, steps=steps):
            tick.position()

    def fit(steps: int, **options: Any) -> None:
        ft.fit(state, step, ready, steps=steps, progress=False, **options)

    def saving(steps: int) -> None:
        folder = tempfile.mkdtemp(dir=root)
        fit(steps, checkpoint=ft.Checkpoints(folder, every=ft.every(steps=1 << 40)))
        shutil.rmtree(folder)

    return [
        Contender("bare", "bare loop", bare, 100_000),
        Contender("loop", "ft.loop", loop, 20_000, sets_up=True),
        Contender("positions", "ft.loop, tick.position() after each step", positions, 10_000, sets_up=True),
        Contender("fit", "ft.fit, history", fit, 10_000, sets_up=True),
        Contender("fit_saving", "ft.fit, history, checkpoint= that is never due", saving, 40_000, sets_up=True),
    ]


def overheads(heading: str, note: str, found: dict[str, Samples], first: str = "bare") -> report.Table:
    """One row for each contender, with what it takes more than the first, which the heading calls `first`."""
    bare = next(iter(found.values()))
    rows = []
    for one in found.values():
        step, more = Spread.of(one.step), difference(one.step, bare.step)
        rows.append(
            [
                one.label,
                f"{step.median:.2f}",
                f"{step.low:.2f} .. {step.high:.2f}",
                f"{more.median:.2f}",
                f"{difference(one.cpu, bare.cpu).median:.2f}",
                f"{Spread.of(one.set_up).median:.1f}" if one.set_up else "-",
            ]
        )
    columns = ["", "us/step", "quartiles", f"us more than {first}", "by CPU", "set-up ms"]
    return report.Table(heading, note, columns, rows)


def difference(over: list[float], under: list[float]) -> Spread:
    """`over - under`, round by round."""
    return Spread.of([a - b for a, b in zip(over, under, strict=True)])


# -------------------------------------------------------------------------------------------------------------------- seeking


class Squares:
    """A dataset of any length that takes no memory."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"i": index, "square": index * index}


def twice(item: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**item, "twice": item["i"] * 2}


def seek(epochs: Any, batch: int, first: int, *, anew: bool) -> Callable[[int], object]:
    """Come to a batch and read it, as a run does that goes on there; `anew`: each time in an epoch that nobody has read."""
    numbers = itertools.count(1)

    def run(steps: int) -> None:
        for _ in range(steps):
            reader = epochs(next(numbers) if anew else 0, {"batch": batch})
            found = next(reader)
            assert len(found["i"]) == first, found
            assert reader.place() == {"batch": batch + 1}, reader.place()
            reader.close()

    return run


def seek_contenders(quick: bool) -> tuple[list[Contender], dict[str, str]]:
    """Two of each kind of data, near and far; and the kinds with their names."""
    n = 8 * FAR + 1000
    arrays = {"i": torch.arange(n)}
    large = (n, 8) if quick else (128 * FAR + 10_000, 128)
    shuffled = ft.data.source(arrays, batch_size=8, shuffle=True)
    dataset = ft.data.source(Squares(large[0]), batch_size=large[1], shuffle=True)
    chain = ft.data.source(arrays).shuffle().map(twice).take(n - 100).batch(8)
    kinds = {
        "plain": ("arrays in their order", ft.data.source(arrays, batch_size=8), 8, 4000),
        "shuffled": ("arrays shuffled", shuffled, 8, 4000),
        "anew": ("arrays shuffled, the order made first", shuffled, 8, 1),
        "chain": ("arrays, shuffle().map(fn).take(n).batch(8)", chain, 8, 500),
        "dataset": (f"dataset of {large[0] / 1e6:.0f} M items shuffled", dataset, large[1], 200),
    }
    contenders = []
    for kind, (label, source, size, steps) in kinds.items():
        epochs = source.epochs(seed=0)
        for where in (NEAR, FAR):
            run = seek(epochs, where, size, anew=kind == "anew")
            contenders.append(Contender(f"{kind} {where}", f"{label}, batch {where}", run, steps))
    return contenders, {kind: label for kind, (label, *_) in kinds.items()}


def seek_rows(found: dict[str, Samples], kinds: dict[str, str]) -> tuple[report.Table, list[report.Bar]]:
    rows, bars = [], []
    for kind, label in kinds.items():
        near, far = found[f"{kind} {NEAR}"], found[f"{kind} {FAR}"]
        wall, cpu = ratio(far.step, near.step), ratio(far.cpu, near.cpu)
        rows.append(
            [
                label,
                *(f"{Spread.of(one.step).median:.0f}" for one in (near, far)),
                f"{wall.median:.2f}",
                f"{cpu.median:.2f}",
                f"{near.first_call:.2f}",
            ]
        )
        bars.append(report.Bar(f"seeking batch 1 000 000 / seeking batch 10: {label}", 1.10, wall, cpu))
    note = (
        "Until the first batch is there, as for a run that goes on at this batch, in an epoch whose order is known (unless it says "
        "otherwise). Arrays of 8 M rows in batches of 8. `first s`: seconds until the first batch of a process, for which the order of "
        "a shuffled epoch is made as a whole, whatever the batch."
    )
    columns = ["", "batch 10, us", "batch 1 000 000, us", "ratio", "by CPU", "first s"]
    return report.Table("Seeking", note, columns, rows), bars


# ----------------------------------------------------------------------------------------------------------------------- all


def run(
    rounds: int, quick: bool, root: str, tell: Callable[[str], object]
) -> tuple[list[report.Table], list[report.Bar], dict[str, Any]]:
    """Tables, bars and samples."""
    feed = measure(feed_contenders(), rounds, tell=tell)
    loops = measure(loop_contenders(root), max(rounds // 2, 3), tell=tell)
    contenders, kinds = seek_contenders(quick)
    sought = measure(contenders, max(rounds // 3, 3), tell=tell, warm=2)
    table, seeking = seek_rows(sought, kinds)
    tables = [
        overheads(
            "Device feed",
            f"A loop that does nothing over {COUNT} ready batches on the CPU, for each step; an epoch's set-up is in it.",
            feed,
        ),
        overheads(
            "Loop and fit, without the step",
            f"A step that does nothing, over {COUNT} ready batches. `set-up`: a run of one step; the times per step are without it.",
            loops,
        ),
        table,
    ]
    wall, cpu = (difference(getattr(feed["feed"], one), getattr(feed["bare"], one)) for one in ("step", "cpu"))
    bars = [report.Bar("device feed over ready batches: us a step more than a bare loop", MOST, wall, cpu), *seeking]
    samples = {"feed": feed, "loops": loops, "seeking": sought}
    return tables, bars, {name: report.samples(one) for name, one in samples.items()}
