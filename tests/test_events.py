"""Events and hooks: who hears what in which order, what they can change, and going back to an earlier state."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ftrain as ft
from ftrain.errors import HookError, LimitError, MetricError, StateError

from .corpus import MODELS, setup
from .test_resume import Memory


def fit(*args: Any, **kwargs: Any) -> ft.Result:
    return ft.fit(*args, **{"progress": False, "compile": False, **kwargs})


def equal(a: Any, b: Any) -> bool:
    return ft.tree.same_structure(a, b) and all(
        torch.equal(x, y) for x, y in zip(ft.tree.leaves(a), ft.tree.leaves(b), strict=True)
    )


def after(saver: Memory, step: int) -> Memory:
    """A checkpointer that goes on from what another one kept of a step."""
    found = [shot for shot in saver.shots if shot.state.counters().step == step]
    return Memory(saver.every, found[0])


class Listener:
    """A hook without conditions, written down under its name."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.__name__, self.told = name, told

    def __call__(self, state: Any, event: ft.Event) -> Any:
        self.told.append(f"{event.kind} {event.step} {self.__name__}")
        return state


def evaluator(told: list[str], name: str, every: Any = None, **more: Any) -> ft.Evaluator:
    def step(state: Any, batch: Any) -> dict[str, float]:
        told.append(f"{name} at {state.counters().step}")
        return {"loss": 1.0}

    return ft.Evaluator(step, [torch.ones(2, 1)], **({} if every is None else {"every": every}), **more)


# -- the order


def test_the_events_of_a_run_with_everything_on(tmp_path: Path) -> None:
    case, step, state = setup("mlp")
    told: list[str] = []
    a, b = Listener("a", told), Listener("b", told)

    def counted(state: Any, batch: Any) -> Any:
        new = step(state, batch)
        told.append(f"the step {new[0].counters().step}")
        return new

    def sink(record: ft.Record) -> None:
        told.append(f"sink {record.step} {record.split}")

    saving = Listener("saving", told)
    fit(
        state,
        counted,
        case.batches(3),
        epochs=2,
        hooks=[a, ft.on(("saved", "exception"), saving), ft.on("evaluation", b), ft.on(ft.every(steps=4), b)],
        evals={
            "val": evaluator(told, "val", ft.every(epochs=1) | ft.at(0)),
            "ood": evaluator(told, "ood", ft.every(steps=4)),
        },
        log=ft.every(steps=2),
        sinks=[sink],
        checkpoint=ft.Checkpoints(tmp_path / "run", every=ft.every(steps=4)),
    )
    assert told == [
        "start 0 a", "val at 0", "evaluation 0 a", "evaluation 0 b", "sink 0 val",
        "the step 1", "step 1 a",
        "the step 2", "step 2 a", "sink 2 train",
        "the step 3", "step 3 a",
        "epoch 3 a", "val at 3", "evaluation 3 a", "evaluation 3 b", "sink 3 train", "sink 3 val",
        "the step 4", "step 4 a", "step 4 b", "ood at 4", "evaluation 4 a", "evaluation 4 b", "saved 4 saving", "sink 4 train", "sink 4 ood",
        "the step 5", "step 5 a",
        "the step 6", "step 6 a",
        "epoch 6 a", "val at 6", "evaluation 6 a", "evaluation 6 b", "sink 6 train", "sink 6 val",
        "saved 6 saving", "end 6 a",
    ]  # fmt: skip


def test_a_resumed_run_hears_the_rest(tmp_path: Path) -> None:
    def run(told: list[str], steps: int, resume: Any) -> None:
        case, step, state = setup("mlp")
        saver = ft.Checkpoints(tmp_path / "run", every=ft.every(steps=2))
        evals = {"val": evaluator(told, "val", ft.every(epochs=1))}
        hooks = [Listener("a", told), ft.on("saved", Listener("saving", told))]
        fit(state, step, case.batches(3), steps=steps, hooks=hooks, evals=evals, checkpoint=saver, resume=resume)

    first: list[str] = []
    run(first, 4, None)
    second: list[str] = []
    run(second, 7, "auto")
    assert first[-5:] == ["evaluation 3 a", "step 4 a", "saved 4 saving", "end 4 a"][-4:] or first[-1] == "end 4 a"
    assert second == [
        "step 5 a", "step 6 a", "epoch 6 a", "val at 6", "evaluation 6 a", "saved 6 saving", "step 7 a", "saved 7 saving", "end 7 a"
    ]  # fmt: skip


def test_what_events_tell(tmp_path: Path) -> None:
    case, step, state = setup("mlp")
    seen: dict[str, ft.Event] = {}

    def look(state: Any, event: ft.Event) -> Any:
        seen[event.kind] = event
        return state

    kinds = ("start", "step", "evaluation", "epoch", "saved", "end")
    saver = ft.Checkpoints(tmp_path / "run")
    evals = {"val": evaluator([], "val")}
    batches = case.batches(2)
    size = batches[0]["x"].numel()
    fit(
        state, step, batches, hooks=[ft.on(kinds, look)], evals=evals, checkpoint=saver, tokens=lambda b: b["x"].numel()
    )
    assert tuple(sorted(seen)) == tuple(sorted(kinds))
    assert isinstance(seen["step"].metrics["loss"], ft.metrics.Mean)  # on the device
    assert seen["evaluation"].metrics == {"val/loss": 1.0}
    assert {"loss", "val/loss"} <= seen["end"].metrics.keys()
    assert (seen["end"].reason, seen["saved"].path) == ("epochs", str(tmp_path / "run"))
    assert (seen["step"].tokens, seen["step"].clock.tokens, seen["step"].clock.batch) == (2 * size, 2 * size, 2)
    assert (seen["epoch"].clock.batch, seen["epoch"].clock.epochs, seen["epoch"].epoch) == (0, 1, 1)


def test_an_exception_is_seen_with_the_newest_state() -> None:
    case, step, state = setup("mlp")
    seen: list[Any] = []

    def look(state: Any, event: ft.Event) -> Any:
        seen.append((state.counters().step, event.kind, repr(event.error)))
        return state

    def broken(state: Any, event: ft.Event) -> Any:
        raise OSError("no more paper")

    hooks = [ft.on("exception", look), ft.on(ft.at(2), broken)]
    with pytest.raises(OSError, match="no more paper"):
        fit(state, step, case.batches(3), hooks=hooks)
    assert seen == [(2, "exception", "OSError('no more paper')")]
    with pytest.raises(OSError, match="no more paper") as caught:
        fit(state, step, case.batches(3), hooks=[ft.on("exception", broken), ft.on(ft.at(2), broken)])
    assert "a hook failed at the 'exception' event" in str(caught.value.__notes__)


# -- conditions


def heard(hook: Callable[[Any], Any], steps: int = 6, **more: Any) -> list[str]:
    case, step, state = setup("mlp")
    told: list[str] = []
    fit(state, step, case.batches(3), steps=steps, hooks=[hook(Listener("a", told))], **more)
    return [one.rpartition(" ")[0] for one in told]


@pytest.mark.parametrize(
    ("make", "events"),
    [
        (lambda hook: ft.on("epoch", hook), ["epoch 3", "epoch 6"]),
        (lambda hook: ft.on(ft.every(epochs=1), hook), ["epoch 3", "epoch 6"]),
        (lambda hook: ft.on(ft.every(steps=4), hook), ["step 4"]),
        (lambda hook: ft.on(("epoch", ft.every(steps=4), ft.at(0)), hook), ["start 0", "epoch 3", "step 4", "epoch 6"]),
        (lambda hook: ft.on(ft.every(fraction=0.4), hook), ["step 2", "epoch 3", "step 4", "step 5", "epoch 6"]),
        (lambda hook: ft.when(lambda event: event.step == 3, hook), ["step 3", "epoch 3"]),
        (lambda hook: ft.on("step", ft.when(lambda event: event.step > 4, hook)), ["step 5", "step 6"]),
        (lambda hook: ft.when(lambda event: event.step > 4, ft.on("step", hook)), ["step 5", "step 6"]),
        (lambda hook: ft.on("step", ft.on(ft.every(steps=4), hook)), ["step 4"]),
        (lambda hook: ft.on(ft.every(steps=2) & ft.after(steps=3), hook), ["step 4", "step 6"]),
        (lambda hook: ft.on(ft.every(steps=2) & ~ft.after(steps=3), hook), ["step 2"]),
        (lambda hook: ft.once("epoch", hook, name="x"), ["epoch 3"]),
        (lambda hook: ft.once(ft.every(steps=2), hook), ["step 2"]),
        (lambda hook: ft.when(lambda event: event.step > 2, ft.once("step", hook)), ["step 3"]),
        (lambda hook: ft.on(("epoch", "end"), ft.compose(hook, hook)), ["epoch 3", "epoch 3", "epoch 6", "epoch 6", "end 6", "end 6"]),
    ],
)  # fmt: skip
def test_when_a_hook_is_called(make: Any, events: list[str]) -> None:
    assert heard(make) == events


def test_once_is_once_also_after_a_resume() -> None:
    case, step, state = setup("mlp")
    told: list[str] = []
    hooks = [ft.once(ft.every(steps=2), Listener("a", told))]
    saver = Memory(ft.every(steps=3))
    fit(state, step, case.batches(8), hooks=hooks, checkpoint=saver)
    assert told == ["step 2 a"]
    fit(state, step, case.batches(8), hooks=hooks, checkpoint=after(saver, 3), resume="auto")
    assert told == ["step 2 a"]


def test_a_memory_of_another_form_is_begun_anew() -> None:
    case, step, state = setup("mlp")

    def counter(start: Any) -> Any:
        return ft.on("step", ft.Hook("n", lambda state: start, lambda s, m, e: (s, ft.tree.map(lambda x: x + 1, m))))

    first = fit(state, step, case.batches(2), hooks=[counter(torch.zeros(()))])
    assert float(first.state.extra["n"]) == 2
    assert float(fit(first.state, step, case.batches(2), hooks=[counter(torch.zeros(()))]).state.extra["n"]) == 4
    for other in (torch.zeros(2), torch.zeros((), dtype=torch.int64), {"n": torch.zeros(())}):
        again = fit(first.state, step, case.batches(2), hooks=[counter(other)]).state.extra["n"]
        assert equal(again, ft.tree.map(lambda x: x + 2, other))
    guard = {"progress": False, "compile": False}
    spiky = ft.fit(state, step, case.batches(2), hooks=[ft.hooks.spike_guard("skip", window=8)], **guard)
    ft.fit(spiky.state, step, case.batches(2), hooks=[ft.hooks.spike_guard("skip", window=9)], **guard)


def test_a_hook_with_memory_may_be_called_once() -> None:
    case, step, state = setup("mlp")
    counter = ft.Hook("counter", lambda state: {"n": torch.zeros(())}, lambda s, m, e: (s, {"n": m["n"] + 1}))
    done = fit(state, step, case.batches(4), hooks=[ft.once("step", counter)])
    assert float(done.state.extra["once_counter"]["inner"]["n"]) == 1


# -- metrics of hooks


def test_metrics_of_hooks_stay_on_the_device_until_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    case, step, state = setup("mlp")
    transfers: list[int] = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.numel()) or plain(self))

    def tell(state: Any, event: ft.Event) -> Any:
        n = torch.tensor(float(event.step))
        many = {f"m{i}": n + i for i in range(50)}
        return ft.Outcome(
            state, {"last": n, "mean": ft.metrics.Mean(n, torch.ones(())), "most": ft.metrics.Max(n), **many}
        )

    state.counters()
    done = fit(state, step, case.batches(6), hooks=[ft.on("step", tell)], log=ft.every(steps=3))
    rows = [(r.metrics["last"], r.metrics["mean"], r.metrics["most"], r.metrics["m49"]) for r in done.history]
    assert rows == [(3, 2, 3, 52), (6, 5, 6, 55)]
    assert len([n for n in transfers if n > 50]) == 2  # one for each record, those of the step among them


def test_a_metric_of_a_hook_takes_the_place_of_one_of_the_step() -> None:
    case, step, state = setup("mlp")
    tell = ft.on("step", lambda state, event: ft.Outcome(state, {"loss": torch.tensor(7.0)}))
    assert fit(state, step, case.batches(3), hooks=[tell]).history["loss"].tolist() == [7.0]


def test_metrics_of_hooks_survive_a_resume() -> None:
    case, step, state = setup("mlp")
    tell = ft.on(
        "step", lambda state, event: ft.Outcome(state, {"sum": ft.metrics.Sum(torch.tensor(1.0)), "n": event.step})
    )
    arguments = {"hooks": [tell], "log": ft.every(steps=5)}
    whole = fit(state, step, case.batches(5), **arguments)
    saver = Memory(ft.every(steps=2))
    fit(state, step, case.batches(5), checkpoint=saver, **arguments)
    again = fit(state, step, case.batches(5), checkpoint=after(saver, 2), resume="auto", **arguments)
    assert again.history["sum"].tolist() == whole.history["sum"].tolist() == [5.0]
    assert again.history["n"].tolist() == [5.0]


# -- going back


def undo(at: int, keep: int) -> Any:
    """A hook that keeps the state after one step, and goes back to it after another, once."""

    def init(state: ft.TrainState) -> Any:
        return {
            "kept": state.params,
            "opt": state.opt,
            "step": state.step,
            "samples": state.samples,
            "done": state.step * 0,
        }

    def update(state: ft.TrainState, memory: Any, event: ft.Event) -> Any:
        if event.step == keep and not memory["done"]:
            kept = {
                "kept": state.params,
                "opt": state.opt,
                "step": state.step,
                "samples": state.samples,
                "done": memory["done"],
            }
            memory = ft.tree.map(torch.clone, kept)
        if event.step == at and not memory["done"]:
            back = {
                "params": memory["kept"],
                "opt": memory["opt"],
                "step": memory["step"],
                "samples": memory["samples"],
            }
            memory = {**memory, "done": memory["done"] + 1}
            return state.replace(**ft.tree.map(torch.clone, back)), memory
        return state, memory

    return ft.on("step", ft.Hook("undo", init, update))


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_that_goes_back_equals_the_run_without_those_batches(compile: bool) -> None:
    case, step, state = setup("mlp")
    batches = case.batches(8)
    options: dict[str, Any] = {"compile": compile, "backend": "eager", "log": ft.every(steps=100)}
    told: list[str] = []
    after = ft.on("step", Listener("after", told))
    went = fit(state, step, batches, hooks=[undo(4, 2), after], **options)
    _, step, state = setup("mlp")  # another step: one that is compiled knows the hook's memory
    without = fit(state, step, [*batches[:2], *batches[4:]], **options)
    plain = went.state.replace(extra={})
    assert equal(plain, without.state.replace(extra={}))
    assert went.state.counters() == without.state.counters()
    assert went.history["loss"].tolist() == without.history["loss"].tolist()  # those of the undone steps do not count
    assert told == [f"step {n} after" for n in (1, 2, 3, 3, 4, 5, 6)]  # not for the step that did not happen


@pytest.mark.parametrize("more", [{}, {"checkpoint": 1}, {"evals": 5}], ids=["alone", "saved", "evaluated"])
def test_what_was_undone_falls_due_again(more: dict[str, int]) -> None:
    case, step, state = setup("mlp")
    arguments: dict[str, Any] = {"checkpoint": Memory(ft.every(steps=1))} if "checkpoint" in more else {}
    if "evals" in more:
        arguments = {"evals": {"val": evaluator([], "val", ft.every(steps=5))}}
    done = fit(state, step, case.batches(11), hooks=[undo(5, 2)], log=ft.every(steps=3), **arguments)
    assert [r.step for r in done.history if r.split == "train"] == [3, 3, 6, 8]


def test_limits_count_what_was_not_undone_and_epochs_go_on() -> None:
    case, step, state = setup("mlp")
    done = fit(state, step, case.batches(5), steps=7, hooks=[undo(4, 2)])
    assert (done.reason, done.state.counters().step, done.state.counters().epoch) == ("steps", 7, 1)
    assert done.history[-1].step == 7


@pytest.mark.parametrize("kept", range(1, 9))
def test_a_run_that_goes_back_is_resumed_from_anywhere(kept: int) -> None:
    case, step, state = setup("mlp")
    arguments: dict[str, Any] = {"hooks": [undo(4, 2)], "log": ft.every(steps=3), "epochs": 2}
    whole = fit(state, step, case.batches(5), **arguments)
    saver = Memory(ft.every(steps=1))
    assert equal(fit(state, step, case.batches(5), checkpoint=saver, **arguments).state, whole.state)
    again = fit(state, step, case.batches(5), checkpoint=after(saver, kept), resume="auto", **arguments)
    assert equal(again.state, whole.state)


def test_a_state_of_an_earlier_epoch_is_refused() -> None:
    case, step, state = setup("mlp")
    early: list[ft.TrainState] = []

    def back(state: ft.TrainState, event: ft.Event) -> ft.TrainState:
        early.append(state.copy())
        return early[0] if event.step == 4 else state

    saver = Memory(ft.every(steps=1))
    with pytest.raises(HookError, match=re.escape("the hook 'back' returned a state of another epoch.")):
        fit(state, step, case.batches(3), epochs=2, hooks=[ft.on("step", back)], checkpoint=saver)
    assert [shot.state.counters()[:2] for shot in saver.shots] == [(1, 0), (2, 0), (3, 1), (4, 1)]  # good ones alone
    ticks = ft.loop(state, step, case.batches(3), epochs=2)
    early = [next(ticks).state for _ in range(4)]
    with pytest.raises(StateError, match=re.escape("the state sent to the loop is of another epoch.")):
        ticks.send(early[0])


def test_a_hook_cannot_change_the_seed() -> None:
    case, step, state = setup("mlp")
    with pytest.raises(HookError, match="returned a state of another seed"):
        fit(state, step, case.batches(3), hooks=[ft.on("step", lambda s, e: s.replace(seed=s.seed + 1))])


def test_a_hook_may_begin_to_count_anew() -> None:
    case, step, state = setup("mlp")
    state = fit(state, step, case.batches(2)).state
    afresh = ft.on("start", lambda s, e: s.replace(step=s.step * 0, samples=s.samples * 0))
    arguments: dict[str, Any] = {"steps": 4, "hooks": [afresh], "log": ft.every(steps=3)}
    whole = fit(state, step, case.batches(6), **arguments)
    assert [r.step for r in whole.history] == [3, 4]
    saver = Memory(ft.every(steps=2))
    fit(state, step, case.batches(6), checkpoint=saver, **arguments)
    again = fit(state, step, case.batches(6), checkpoint=after(saver, 2), resume="auto", **arguments)
    assert equal(again.state, whole.state)


def test_checkpoints_of_steps_that_did_not_happen_are_deleted(tmp_path: Path) -> None:
    case, step, state = setup("mlp")
    there: list[list[int]] = []

    def look(state: Any, event: ft.Event) -> Any:
        there.append([entry.step for entry in ft.Checkpoints(tmp_path / "run").entries()])
        return state

    saver = ft.Checkpoints(tmp_path / "run", every=ft.every(steps=1), background=False)
    hooks = [undo(4, 2), ft.on("saved", look)]
    done = fit(state, step, case.batches(8), steps=3, hooks=hooks, checkpoint=saver)
    assert there == [[1], [1, 2], [1, 2, 3]]
    there.clear()
    done = fit(state, step, case.batches(8), steps=5, hooks=hooks, checkpoint=saver, resume="auto")
    assert there == [[2, 3], [2, 3, 4], [3, 4, 5]]  # 3 was deleted, and is there anew; two are kept
    whole = fit(state, step, case.batches(8), steps=5, hooks=[undo(4, 2)])
    assert equal(done.state, whole.state)
    assert equal(ft.restore(tmp_path / "run", like=done.state), whole.state)


def test_every_hook_sees_an_exception() -> None:
    case, step, state = setup("mlp")
    told: list[str] = []

    def broken(state: Any, event: ft.Event) -> Any:
        raise OSError("no more paper")

    hooks = [ft.on(("exception", ft.at(1)), broken), ft.on("exception", Listener("last", told))]
    with pytest.raises(OSError, match="no more paper"):
        fit(state, step, case.batches(2), hooks=hooks)
    assert told == ["exception 1 last"]


def test_what_falls_due_while_hooks_run_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    case, step, state = setup("mlp")
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow(state: Any, event: ft.Event) -> Any:
        now[0] += 0.7
        return state

    told: list[str] = []
    evals: list[str] = []
    hooks = [ft.on(ft.every(seconds=1), Listener("pulse", told)), ft.on(("step", "evaluation"), slow)]
    val = evaluator(evals, "val", ft.every(seconds=1))
    fit(state, step, case.batches(8), hooks=hooks, evals={"val": val})
    # 0.7 s a step, and as much again for each evaluation: every second of the clock that is passed between two steps is heard.
    assert len(told) >= 5
    assert len(evals) >= 5


def test_a_signal_in_the_trial_of_the_evaluation() -> None:
    case, step, state = setup("mlp")
    told: list[str] = []
    calls: list[int] = []

    def metrics(state: Any, batch: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return {"loss": 1.0}

    def run(saver: Memory, **more: Any) -> ft.Result:
        val = ft.Evaluator(metrics, [torch.ones(2, 1)] * 2, every=ft.every(epochs=1) | ft.at(0), sanity=2)
        hooks = [ft.on("start", Listener("a", told))]
        return fit(state, step, case.batches(3), hooks=hooks, evals={"val": val}, checkpoint=saver, **more)

    saver = Memory(ft.every(steps=1))
    assert run(saver).reason == "terminated"
    assert told == []
    done = run(after(saver, 0), resume="auto")
    assert told == ["start 0 a"]
    assert [(r.split, r.step) for r in done.history] == [("val", 0), ("train", 3), ("val", 3)]


@pytest.mark.parametrize(
    "until",
    [ft.at(fraction=0.5), ft.every(samples=10) & ft.after(epochs=1), ft.every(steps=4) & ft.after(steps=5), ft.at(6)],
    ids=repr,
)
def test_moments_that_end_a_run_are_found_again(until: Any) -> None:
    case, step, state = setup("mlp")
    whole = fit(state, step, case.batches(4), epochs=3, until=until)
    saver = Memory(ft.every(steps=1))
    fit(state, step, case.batches(4), epochs=3, until=until, checkpoint=saver)
    for shot in saver.shots:
        again = fit(
            state, step, case.batches(4), epochs=3, until=until, checkpoint=Memory(saver.every, shot), resume="auto"
        )
        assert (again.state.counters(), again.reason) == (whole.state.counters(), whole.reason)
        assert equal(again.state, whole.state)


def test_going_back_drops_the_metrics_of_undone_steps_also_where_they_were_packed() -> None:
    case, step, state = setup("mlp")

    def told(state: Any, batch: Any) -> Any:
        new, metrics = step(state, batch)
        n = new.counters().step
        rows = {"all": ft.metrics.Collect((torch.tensor([n]),))} if n % 2 else {}
        return new, {} if n == 5 else {**metrics, **rows}

    arguments: dict[str, Any] = {"hooks": [undo(6, 4)], "log": ft.every(steps=100)}
    plain = fit(state, told, case.batches(9), **arguments)
    saved = fit(state, told, case.batches(9), checkpoint=Memory(ft.every(steps=1)), **arguments)
    assert plain.history["all"].tolist() == saved.history["all"].tolist() == [[1, 3, 7]]
    assert plain.history["loss"].tolist() == saved.history["loss"].tolist()


def test_one_name_told_in_several_forms() -> None:
    case, step, state = setup("mlp")

    def number(state: Any, event: ft.Event) -> Any:
        return ft.Outcome(state, {"x": 1.0 if event.step < 2 else torch.tensor(2.0)})

    def total(state: Any, event: ft.Event) -> Any:
        return ft.Outcome(state, {"sum": ft.metrics.Sum(torch.tensor(1.0))})

    done = fit(state, step, case.batches(3), hooks=[ft.on("step", number), ft.on("step", total), ft.on("step", total)])
    assert (done.history["x"].tolist(), done.history["sum"].tolist()) == ([2.0], [6.0])
    other = ft.on("step", lambda s, e: ft.Outcome(s, {"sum": ft.metrics.Mean(torch.tensor(1.0), torch.tensor(1.0))}))
    with pytest.raises(MetricError, match="tells a metric that another hook tells in another form"):
        fit(state, step, case.batches(3), hooks=[ft.on("step", total), other])


def test_a_first_batch_that_is_skipped_is_no_reason_to_stop() -> None:
    case, _, _ = setup("mlp")
    model, tx = case.model(), ft.optim.adam(1e-2)
    step = ft.train_step(model, case.loss_fn, tx)
    batches = case.batches(4)
    bad = {key: value * torch.nan if value.is_floating_point() else value for key, value in batches[0].items()}
    without = fit(ft.init(model, tx), step, batches[1:])
    guarded = fit(ft.init(model, tx), step, [bad, *batches[1:]], hooks=[ft.hooks.spike_guard("skip")])
    assert equal(guarded.state.params, without.state.params)
    skipping = fit(ft.init(model, tx), ft.with_skip(step), [bad, *batches[1:]])
    assert skipping.state.counters().step == 4
    assert all(bool(leaf.isfinite().all()) for leaf in skipping.state.params.values())
    with pytest.raises(ft.errors.LossError, match="the loss is nan at the first step"):
        fit(ft.init(model, tx), step, [bad, *batches[1:]], hooks=[ft.on("step", lambda s, e: s)])


# -- evaluators


def test_an_evaluator_has_its_own_limit_parameters_and_trial() -> None:
    case, _, state = setup("mlp")
    model = MODELS["mlp"].model()
    step = ft.with_ema(ft.train_step(model, case.loss_fn, ft.optim.adam(1e-2)), decay=0.5)
    state = ft.init(model, ft.optim.adam(1e-2))
    batches = case.batches(4)
    calls: list[int] = []

    def metrics(model: Any, batch: Any) -> dict[str, Any]:
        calls.append(1)
        return {"size": model(batch["x"]).square().mean()}

    one = ft.eval_step(model, metrics)
    evals = {
        "raw": ft.Evaluator(one, batches),
        "ema": ft.Evaluator(one, batches, params="ema"),
        "short": ft.Evaluator(one, batches, limit=1, sanity=3),
    }
    done = fit(state, step, batches, evals=evals)
    assert len(calls) == 1 + 4 + 4 + 1  # the trial, which is limited as well, first
    assert [r.split for r in done.history] == ["train", "raw", "ema", "short"]
    last = done.history.last()
    by_hand = ft.evaluate(done.state, ft.eval_step(model, metrics, params="ema"), batches, compile=False)
    assert last["ema/size"] == by_hand["size"] != last["raw/size"]
    assert last["ema/size"] == ft.evaluate(done.state, one, batches, params="ema", compile=False)["size"]
    assert (
        last["short/size"] == ft.evaluate(done.state, one, batches, limit=1, compile=False)["size"] != last["raw/size"]
    )
    ahead = ft.predict_step(model, lambda model, batch: model(batch["x"]))
    outputs = list(ft.predict(done.state, ahead, batches, limit=2, params="ema", compile=False))
    assert len(outputs) == 2


def test_a_trial_finds_a_broken_evaluation_before_the_first_step() -> None:
    case, step, state = setup("mlp")
    steps: list[int] = []

    def broken(state: Any, batch: Any) -> Any:
        raise ValueError("not like this")

    val = ft.Evaluator(broken, case.batches(2), sanity=1)
    with pytest.raises(ValueError, match="not like this"):
        fit(state, step, case.batches(2), evals={"val": val}, hooks=[ft.on("step", lambda s, e: steps.append(1) or s)])
    assert steps == []


BAD_EVALUATORS = [
    ({"limit": 0}, LimitError, "the evaluator 'val': limit=0 makes no sense."),
    ({"sanity": -1}, LimitError, "the evaluator 'val': sanity=-1 makes no sense."),
    ({"params": "ema"}, StateError, "the evaluator 'val': the state has no averaged parameters 'ema'."),
    ({"data": []}, Exception, "the evaluator 'val'"),
]


@pytest.mark.parametrize(("given", "kind", "text"), BAD_EVALUATORS, ids=[text for _, _, text in BAD_EVALUATORS])
def test_bad_evaluators(given: dict[str, Any], kind: Any, text: str) -> None:
    case, step, state = setup("mlp")
    called: list[int] = []
    val = ft.Evaluator(**{"step": lambda state, batch: {"n": 1.0}, "data": case.batches(1), **given})
    hook = ft.on("step", lambda s, e: called.append(1) or s)
    with pytest.raises(kind, match=re.escape(text)):
        fit(state, step, case.batches(2), evals={"val": val}, hooks=[hook])
    assert not called


def test_averaged_parameters_twice() -> None:
    case, _, _ = setup("mlp")
    model = case.model()
    tx = ft.optim.sgd(0.1)
    step = ft.with_ema(ft.train_step(model, case.loss_fn, tx))
    val = ft.Evaluator(ft.eval_step(model, lambda m, b: {"n": 1.0}, params="ema"), case.batches(1), params="ema")
    with pytest.raises(StateError, match="params='ema', and the step takes 'ema' already"):
        fit(ft.init(model, tx), step, case.batches(1), evals={"val": val})


# -- bad input


def test_where_the_time_went() -> None:
    case, step, state = setup("mlp")
    done = fit(state, step, case.batches(4), log=ft.every(steps=2), evals={"val": evaluator([], "val")})
    train = [r for r in done.history if r.split == "train"]
    assert [set(r.spent) for r in train] == [{"data", "step", "evaluation", "hooks", "checkpoint", "sinks"}] * 2
    assert all(value >= 0 for r in train for value in r.spent.values())
    assert sum(sum(r.spent.values()) for r in train) <= max(r.seconds for r in done.history)
    assert [r.spent["data"] for r in train] == [r.waited for r in train]


BAD_HOOKS = [
    (lambda s, e: None, "forgot to return state?", HookError),
    (lambda s, e: s.replace(params={}), "returned a state that is not like the one it was given", Exception),
    (lambda s, e: 3, "got:      int", HookError),
    (ft.on("saved", lambda s, e: s.replace(step=s.step + 1)), "changed something at a 'saved' event", HookError),
    (ft.on("saved", lambda s, e: ft.Outcome(s, {"n": 1})), "changed something at a 'saved' event", HookError),
    (ft.when(lambda e: torch.ones(()), lambda s, e: s), "the predicate of the hook '<lambda>' gave no bool", HookError),
    (lambda s, e: ft.Outcome(s, {"n": torch.ones(2)}), "returned a metric that is not a number", MetricError),
    (lambda s, e: ft.Outcome(s, {"n": ft.metrics.Collect((torch.ones(2),))}), "other than Collect", MetricError),
    (lambda s, e: ft.Outcome(s, stop=True), "returned an outcome that makes no sense", HookError),
    (lambda s, e: ft.Outcome(s, stop=""), "returned an outcome that makes no sense", HookError),
    (lambda s, e: ft.Outcome(s, [1, 2]), "returned an outcome that makes no sense", HookError),
    (ft.on("step", lambda s, e: s.replace(step=s.step + 10)), "of steps that were not made", HookError),
    (ft.Hook("m", lambda s: {"n": 3}, lambda s, m, e: (s, m)), "holds something that is no tensor", HookError),
    (ft.once("step", ft.Hook("m", lambda s: {}, lambda s, m, e: s)), "did not return (state, memory)", HookError),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "text", "kind"), BAD_HOOKS, ids=[text for _, text, _ in BAD_HOOKS])
def test_bad_hooks(hook: Any, text: str, kind: Any) -> None:
    case, step, state = setup("mlp")
    with pytest.raises(kind, match=re.escape(text)):
        fit(state, step, case.batches(2), hooks=[hook], checkpoint=Memory(ft.every(steps=1)))


def test_an_event_cannot_be_changed() -> None:
    case, step, state = setup("mlp")
    with pytest.raises(AttributeError):
        fit(state, step, case.batches(2), hooks=[ft.on("step", lambda s, e: e.metrics.clear())])


def test_a_step_that_trains_is_no_evaluation() -> None:
    case, step, state = setup("mlp")
    with pytest.raises(ft.errors.DataError, match="the evaluator 'val': its step is one that trains"):
        fit(state, step, case.batches(2), evals={"val": ft.Evaluator(step, case.batches(1))})


def test_a_step_that_predicts_is_no_evaluation() -> None:
    case, step, state = setup("mlp")
    val = ft.Evaluator(ft.predict_step(case.model()), case.batches(1))
    with pytest.raises(ft.errors.DataError, match="the evaluator 'val': its step is one that predicts"):
        fit(state, step, case.batches(2), evals={"val": val})


@pytest.mark.parametrize("name", [3, "", "train", "a/b"])
def test_what_an_evaluator_cannot_be_called(name: Any) -> None:
    case, step, state = setup("mlp")
    with pytest.raises(ft.errors.DataError, match="an evaluator cannot be called"):
        fit(state, step, case.batches(2), evals={name: evaluator([], "val")})


def test_an_average_that_is_not_there_is_missed_before_the_first_step() -> None:
    case, step, state = setup("mlp")
    calls: list[int] = []
    hooks = [ft.hooks.swap_average("ema"), ft.on("step", lambda s, e: calls.append(1) or s)]
    with pytest.raises(StateError, match="the state has no averaged parameters 'ema'"):
        fit(state, step, case.batches(2), hooks=hooks)
    assert not calls


SENSELESS = [
    (lambda: ft.on((), lambda s, e: s), "at none of these events is the hook ever called"),
    (lambda: ft.on("step", ft.hooks.early_stop), "early_stop cannot be called with a state and an event"),
    (lambda: ft.on("step", lambda state: state), "cannot be called with a state and an event"),
    (lambda: ft.compose(ft.Hook("a/b", dict, dict)), "this is no hook with memory"),
    (lambda: ft.compose(ft.Hook(3, dict, dict)), "this is no hook with memory"),
    (lambda: ft.on("never", lambda s, e: s), "there are no events of kind 'never'"),
    (lambda: ft.on(3, lambda s, e: s), "ft.on wants a kind of event or a cadence."),
    (lambda: ft.on("step", 3), "ft.on: this is no hook."),
    (lambda: ft.on("step", Listener), "got:      the class Listener"),
    (lambda: ft.when(True, lambda s, e: s), "ft.when wants a function of the event."),
    (lambda: ft.when(ft.every(steps=1), lambda s, e: s), "ft.on(ft.every(steps=10), hook)"),
    (ft.compose, "ft.compose wants at least one hook."),
    (lambda: ft.compose(lambda s, e: s, None), "ft.compose: this is no hook."),
    (lambda: ft.once("step", ft.on("epoch", lambda s, e: s)), "ft.once wants a single hook."),
]


@pytest.mark.parametrize(("make", "text"), SENSELESS, ids=[text for _, text in SENSELESS])
def test_senseless_conditions(make: Any, text: str) -> None:
    with pytest.raises(HookError, match=re.escape(text)):
        make()


def test_hooks_that_do_not_fire_are_not_asked() -> None:
    case, step, state = setup("mlp")
    asked: list[int] = []

    class Counted(ft.loops.Cadence):
        def fires(self, before: Any, now: Any) -> bool:
            asked.append(now.steps)
            return False

        def moments(self, now: Any) -> list[Any]:
            return ft.every(steps=4).moments(now)

    fit(state, step, case.batches(9), hooks=[ft.on(Counted(), lambda s, e: s), ft.on("evaluation", lambda s, e: s)])
    assert set(asked) == {0, 4, 8, 9}  # at the start, at its moments, at the end of the epoch


def test_a_checkpoint_whose_metrics_came_later_can_be_gone_on_from(tmp_path: Path) -> None:
    case, step, state = setup("mlp")

    def run(fails: bool, **more: Any) -> ft.Result:
        calls: list[int] = []

        def metrics(state: Any, batch: Any) -> dict[str, float]:
            calls.append(1)
            if fails and len(calls) == 2:
                raise OSError("no more paper")
            return {"loss": 1.0}

        val = ft.Evaluator(metrics, [torch.ones(2, 1)], every=ft.every(steps=2))
        saver = ft.Checkpoints(tmp_path / "run", every=ft.every(steps=50))
        return fit(state, step, case.batches(6), evals={"val": val}, checkpoint=saver, resume="auto", **more)

    with pytest.raises(OSError, match="no more paper"):
        run(True)
    run(False, steps=4)
    assert equal(run(False).state, fit(state, step, case.batches(6)).state)


def test_a_hook_goes_back_in_an_event_that_was_pending() -> None:
    case, step, state = setup("mlp")

    def run(saver: Memory, fails: bool, **more: Any) -> ft.Result:
        def metrics(state: Any, batch: Any) -> dict[str, float]:
            if fails and state.counters().step == 4:
                raise OSError("no more paper")
            return {"loss": 1.0}

        val = ft.Evaluator(metrics, [torch.ones(2, 1)], every=ft.every(steps=2))
        hooks = [ft.on("evaluation", undo(4, 2).hook)]
        return fit(state, step, case.batches(8), evals={"val": val}, hooks=hooks, checkpoint=saver, **more)

    whole = run(Memory(ft.every(steps=100)), False)
    assert whole.state.counters().step == 6
    saver = Memory(ft.every(steps=100))
    with pytest.raises(OSError, match="no more paper"):
        run(saver, True)
    again = run(Memory(saver.every, saver.shots[-1]), False, resume="auto")
    assert equal(again.state, whole.state)


def test_predictions_draw_from_streams_of_their_own() -> None:
    case, _, state = setup("mlp")

    def noisy(state: Any, batch: Any) -> torch.Tensor:
        return torch.tensor([np.random.rand(), random.random()])

    found = []
    for seed in (1, 2):
        np.random.seed(seed)
        random.seed(seed)
        before = np.random.get_state(legacy=False)["state"]["pos"], random.getstate()
        found.append(torch.stack(list(ft.predict(state, noisy, case.batches(3), compile=False))))
        assert (np.random.get_state(legacy=False)["state"]["pos"], random.getstate()) == before
    assert torch.equal(*found)
