"""The language of time: when cadences fire, also where they are asked only at the moments that they name."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import ftrain as ft
from ftrain.errors import ArgumentError, LimitError
from ftrain.loops.cadences import Clock, Moment, bounds

LENGTH = 5  # of an epoch


def clocks(epochs: int = 3, length: int = LENGTH) -> list[Clock]:
    """The clocks of a run's ticks: after each step, and once more at the end of each epoch; two tokens a step, half a second."""
    found = [Clock()]
    for epoch in range(epochs):
        for batch in range(1, length + 1):
            n = epoch * length + batch
            found.append(Clock(n, epoch, n * 10, n * 0.5, n * 2, batch))
        found.append(Clock(n, epoch + 1, n * 10, n * 0.5, n * 2, 0))
    return found


def fired(cadence: ft.loops.Cadence, ticks: list[Clock]) -> list[Clock]:
    cadence = cadence.bound(LENGTH, True, "the test")
    found = [ticks[0]] if cadence.fires(None, ticks[0]) else []
    return found + [now for before, now in itertools.pairwise(ticks) if cadence.fires(before, now)]


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [
        (ft.every(steps=3), [3, 6, 9, 12, 15]),
        (ft.at(4), [4]),
        (ft.at(0), [0]),
        (ft.at(epochs=2), [10]),
        (ft.at(tokens=9), [5]),
        (ft.every(steps=4) | ft.at(1), [1, 4, 8, 12]),
        (ft.every(steps=2) & ft.every(steps=3), [6, 12]),
        (ft.every(steps=2) & ft.after(steps=7), [8, 10, 12, 14]),
        (ft.every(steps=2) & ~ft.after(epochs=1), [2, 4]),
        (ft.every(samples=25), [3, 5, 8, 10, 13, 15]),
        (ft.every(tokens=7), [4, 7, 11, 14]),
        (ft.every(epochs=1), [5, 10, 15]),
        (ft.every(fraction=0.4), [2, 4, 6, 8, 10, 12, 14]),
        (ft.every(fraction=1), [5, 10, 15]),
        (ft.every(fraction=0.1), list(range(1, 16))),
        (ft.at(fraction=0.5), [3]),
        (ft.until(steps=13), [13, 14, 15, 15]),
        (ft.until(fraction=2.5), [13, 14, 15, 15]),
        (ft.every(seconds=2), [4, 8, 12]),
    ],
    ids=repr,
)
def test_when_a_cadence_fires(cadence: ft.loops.Cadence, steps: list[int]) -> None:
    assert [now.steps for now in fired(cadence, clocks())] == steps


def test_what_falls_together_with_the_end_of_an_epoch_is_then() -> None:
    ticks = fired(ft.every(fraction=0.2), clocks(1))
    assert [(now.batch, now.epochs) for now in ticks] == [(1, 0), (2, 0), (3, 0), (4, 0), (0, 1)]


NUMBERS: dict[str, Any] = {
    "steps": st.integers(1, 9),
    "epochs": st.integers(1, 3),
    "samples": st.integers(1, 90),
    "tokens": st.integers(1, 20),
    "seconds": st.sampled_from([0.4, 0.5, 1.0, 2.25]),
    "fraction": st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]),
}


@st.composite
def timed(draw: Callable[..., Any]) -> ft.loops.Cadence:
    unit = draw(st.sampled_from(sorted(NUMBERS)))
    kind = draw(st.sampled_from([ft.every, ft.until, ft.after, ft.at]))
    return kind(**{unit: draw(NUMBERS[unit])}) if (kind, unit) != (ft.at, "steps") else ft.at(draw(NUMBERS[unit]))


CADENCES = st.recursive(
    timed(),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=4,
)


@given(CADENCES, st.integers(1, 7))
def test_asked_only_at_its_moments_it_fires_as_often(cadence: ft.loops.Cadence, length: int) -> None:
    ticks = clocks(3, length)
    bound = cadence.bound(length, True, "the test")
    full = [now for before, now in itertools.pairwise(ticks) if bound.fires(before, now)]
    asked, due, found = ticks[0], bounds(bound.moments(ticks[0]), ticks[0]), []
    for now in ticks[1:]:
        reached = now.steps >= due.step or now.seconds >= due.second
        if now.batch == 0 or reached or now.samples >= due.sample or now.tokens >= due.token:
            found += [now] if bound.fires(asked, now) else []
            asked, due = now, bounds(bound.moments(now), now)
    assert found == full


@given(CADENCES)
def test_a_cadence_reads_as_it_is_written(cadence: ft.loops.Cadence) -> None:
    names = {name: getattr(ft, name) for name in ("every", "until", "after", "at")}
    assert repr(eval(repr(cadence), names)) == repr(cadence)
    again = eval(repr(cadence), names)
    assert fired(again, clocks()) == fired(cadence, clocks())


def test_rare_cadences_are_asked_rarely() -> None:
    now = Clock(5)
    assert bounds(ft.every(steps=1000).moments(now), now) == Moment(1000, math.inf, math.inf, math.inf)
    assert bounds(ft.every(epochs=1).moments(now), now) == Moment(math.inf, math.inf, math.inf, math.inf)
    assert bounds(ft.every(seconds=60).moments(now), now) == Moment(math.inf, 60, math.inf, math.inf)
    assert bounds(ft.every(samples=64).moments(now), now) == Moment(math.inf, math.inf, 64, math.inf)
    assert bounds(ft.until(tokens=99).moments(now), now) == Moment(math.inf, math.inf, math.inf, 99)
    rare = ft.every(steps=10) & ft.after(steps=500)
    assert bounds(rare.moments(now), now).step == 10
    assert bounds(ft.every(fraction=0.5).bound(100, False, "the test").moments(Clock(5, batch=5)), now).step == 50


SENSELESS = [
    (lambda: ft.every(steps=0), "ft.every(steps=0) makes no sense."),
    (lambda: ft.every(steps=-3), "a positive integer"),
    (lambda: ft.every(epochs=0.5), "a positive integer"),
    (lambda: ft.every(seconds=math.nan), "a positive number"),
    (lambda: ft.every(fraction=1.5), "a part of an epoch: a number in (0, 1]"),
    (lambda: ft.every(fraction=-0.5), "a positive number"),
    (lambda: ft.until(tokens=True), "a positive integer"),
    (ft.every, "ft.every wants exactly one unit."),
    (lambda: ft.after(steps=1, epochs=1), "steps=1, epochs=1"),
    (lambda: ft.at(-1), "ft.at: -1 is not a step."),
    (lambda: ft.at(1, epochs=2), "ft.at wants exactly one unit."),
    (lambda: ft.every(steps=1) | "epoch", "cannot join a cadence and 'epoch'."),
]


@pytest.mark.parametrize(("make", "text"), SENSELESS, ids=[text for _, text in SENSELESS])
def test_senseless_cadences(make: Callable[[], Any], text: str) -> None:
    with pytest.raises((LimitError, ArgumentError), match=re.escape(text)):
        make()


# -- in a run


def setup() -> tuple[Any, Any]:
    model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    return ft.init(model, tx), ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)


def run(data: Any = None, **arguments: Any) -> ft.Result:
    state, step = setup()
    data = [torch.ones(4, 1)] * LENGTH if data is None else data
    return ft.fit(state, step, data, progress=False, compile=False, **arguments)


@pytest.mark.parametrize("where", ["until", "log", "hook", "evaluator", "snapshot", "at_least"])
def test_a_fraction_of_endless_data(where: str) -> None:
    def endless(epoch: int) -> Any:
        return iter(lambda: torch.ones(4, 1), None)

    cadence = ft.until(fraction=0.5) if where == "at_least" else ft.every(fraction=0.5)
    val = ft.Evaluator(lambda state, batch: {"n": 1.0}, [torch.ones(4, 1)], every=cadence)
    given = {"hook": ("hooks", [ft.on(cadence, lambda state, event: state)]), "evaluator": ("evals", {"val": val})}
    name, value = given.get(where, (where, cadence))
    with pytest.raises(LimitError, match=re.escape("is a fraction of an epoch, and the data has no length.")):
        run(endless, steps=10, **{name: value})


def test_tokens_that_nobody_counts() -> None:
    with pytest.raises(LimitError, match="nobody counts tokens"):
        run(until=ft.until(tokens=100))
    with pytest.raises(LimitError, match="tokens= gave no count"):
        run(tokens=lambda batch: batch.sum())
    with pytest.raises(LimitError, match="tokens= makes no sense"):
        run(tokens=7)


def test_stops_by_tokens_samples_and_fractions() -> None:
    count = lambda batch: batch.numel()  # noqa: E731  # 4 a batch
    done = run(epochs=3, tokens=count, until=ft.until(tokens=18))
    assert (done.reason, done.state.counters().step, done.history[-1].tokens) == ("until", 5, 20)
    done = run(epochs=3, until=ft.until(samples=9))
    assert done.state.counters().step == 3
    done = run(until=ft.until(fraction=0.6), epochs=2)
    assert done.state.counters().step == 3


def test_evaluation_by_fraction_and_log_by_tokens() -> None:
    step = lambda state, batch: {"n": 1.0}  # noqa: E731
    val = ft.Evaluator(step, [torch.ones(1)], every=ft.every(fraction=0.5) | ft.at(0))
    done = run(epochs=2, evals={"val": val}, log=ft.every(tokens=8), tokens=lambda batch: batch.numel())
    assert [(r.step, r.epoch) for r in done.history if r.split == "val"] == [(0, 0), (3, 0), (5, 1), (8, 1), (10, 2)]
    assert [r.step for r in done.history if r.split == "train"] == [2, 4, 5, 6, 8, 10]


CONTRADICTIONS = [
    ({"steps": 3, "at_least": ft.until(steps=4)}, "at_least=until(steps=4), and steps=3"),
    ({"epochs": 1, "at_least": ft.until(epochs=2)}, "at_least=until(epochs=2), and epochs=1"),
    ({"epochs": 1, "at_least": ft.until(steps=6)}, "at_least=until(steps=6), and epochs=1 with 5 steps an epoch"),
    ({"steps": 6, "at_least": ft.until(epochs=2)}, "at_least=until(epochs=2), and steps=6 with 5 steps an epoch"),
    (
        {"until": ft.until(seconds=5) | ft.until(samples=10), "at_least": ft.until(samples=11) & ft.until(steps=1)},
        "and until(samples=10)",
    ),
]


@pytest.mark.parametrize(("limits", "text"), CONTRADICTIONS, ids=[text for _, text in CONTRADICTIONS])
def test_contradictory_limits(limits: dict[str, Any], text: str) -> None:
    with pytest.raises(LimitError, match=re.escape("the limits contradict each other.")) as caught:
        run(**limits)
    assert text in str(caught.value)


@pytest.mark.parametrize("cadence", [ft.at(3), ft.every(steps=2), ft.at(epochs=1) & ft.until(steps=2)], ids=repr)
def test_at_least_holds_from_some_moment_on(cadence: ft.loops.Cadence) -> None:
    with pytest.raises(LimitError, match="holds at single moments only"):
        run(at_least=cadence)


def test_limits_that_go_together() -> None:
    run(epochs=2, at_least=ft.until(steps=10))
    run(until=ft.until(steps=4) & ft.until(seconds=0.001), at_least=ft.until(steps=8))  # both have to be reached


def stopper(step: int) -> Any:
    return ft.on("step", lambda state, event: ft.Outcome(state, stop="enough") if event.step == step else state)


@pytest.mark.parametrize(
    ("least", "last"),
    [
        (None, 2),
        (ft.until(steps=7), 7),
        (ft.until(epochs=1), 5),
        (ft.until(steps=1), 2),
        (ft.until(steps=7) & ft.until(epochs=2), 10),
    ],
    ids=repr,
)
def test_a_run_does_at_least_so_much(least: Any, last: int) -> None:
    done = run(epochs=3, hooks=[stopper(2)], at_least=least)
    assert (done.reason, done.state.counters().step) == ("enough", last)
