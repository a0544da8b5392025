"""What hooks that hear every step change for those that do not: nothing, and they are not even asked."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import ftrain as ft
from ftrain.loops import session
from ftrain.loops.cadences import Cadence, Clock, Moment

NEVER = 10**6


def run(hooks: list[Any], steps: int = 25, **options: Any) -> ft.Result:
    state = ft.init(torch.nn.Linear(1, 1), ft.optim.sgd(0.1))

    def step(state: ft.TrainState, batch: Any) -> Any:
        return state.advance(1), {"loss": torch.ones(())}

    data = [torch.zeros(1, 1)] * 100
    options = {"log": ft.every(steps=NEVER), "progress": False, "compile": False, **options}
    return ft.fit(state, step, data, steps=steps, hooks=hooks, **options)


def idle(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
    return state


def writes(seen: list[int]) -> Any:
    def write(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
        seen.append(event.step)
        return state

    return write


class Asked(Cadence):
    """At every n-th step, and counts the questions."""

    def __init__(self, n: int) -> None:
        self.inner, self.times = ft.every(steps=n), 0

    def fires(self, before: Clock | None, now: Clock) -> bool:
        self.times += 1
        return self.inner.fires(before, now)

    def moments(self, now: Clock) -> list[Moment]:
        return self.inner.moments(now)


@pytest.mark.parametrize("steady", [False, True], ids=["alone", "beside a hook that hears every step"])
def test_a_hook_is_asked_only_when_something_is_due(steady: bool) -> None:
    seen: list[int] = []
    rare, never, every = Asked(10), Asked(NEVER), list[int]()
    hooks = [ft.on(never, idle), ft.on(rare, writes(seen)), *([ft.on("step", writes(every))] if steady else [])]
    run(hooks, steps=95)
    assert seen == list(range(10, 95, 10))
    assert every == (list(range(1, 96)) if steady else [])
    # Each is asked whether there is an event at all, and whether it wants it: at the start, at 9 of the 95 steps, and after the
    # first step, for which nothing is known.
    assert never.times <= 2 * (1 + 9 + 1)


@pytest.mark.parametrize("steady", [False, True], ids=["alone", "beside a hook that hears every step"])
@pytest.mark.parametrize("slow_at", [3, 10], ids=["at a step of its own", "at a step where it is due as well"])
def test_what_falls_due_while_hooks_run_comes_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch, steady: bool, slow_at: int
) -> None:
    now, seen = [100.0], list[int]()
    monkeypatch.setattr(session, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
        now[0] += 60.0
        return state

    hooks = [ft.on(ft.every(seconds=50) | ft.at(10), writes(seen)), ft.on(ft.at(slow_at), slow)]
    run([*hooks, ft.on("step", idle)] if steady else hooks, steps=20)
    assert seen == ([4, 10] if slow_at == 3 else [10, 11])


def test_after_going_back_at_a_step_of_no_cadence_what_was_undone_is_due_again() -> None:
    seen, kept = list[int](), dict[str, Any]()

    def back(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
        if event.step == 8 and not kept:
            kept["state"] = state.copy()
        if event.step == 12 and "done" not in kept:
            kept["done"] = True
            return kept["state"]
        return state

    assert run([ft.on(ft.every(steps=10), writes(seen)), ft.on("step", back)]).state.counters().step == 25
    assert seen == [10, 10, 20]
