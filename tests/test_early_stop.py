"""`ft.hooks.early_stop`: value by value against an independent rule, each reason, metrics of training, resuming, and wrong uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain as ft
from ftrain.errors import ArgumentError, HookError, LimitError

from .test_laws import bits
from .test_resume import Memory, assert_same

stop = ft.hooks.early_stop
MODEL, TX = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 1)), ft.optim.adam(1e-2)


def told(values: list[float], hook: Any, name: str = "val/loss") -> tuple[int | None, str | None, Any]:
    """The hook at one evaluation after the other: at which it stopped, why, and its memory."""
    inner, state = hook.hook, ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1))
    memory = inner.init(state)
    for number, value in enumerate(values):
        event = ft.Event("evaluation", number + 1, 0, 8, metrics={name: value, "val/other": 1.0})
        out, memory = inner.update(state, memory, event)
        if isinstance(out, ft.Outcome):
            assert out.state is state
            assert not out.metrics
            return number, out.stop, memory
        assert out is state
    return None, None, memory


# ------------------------------------------------------------------------------------------------------------- the rule


def expected(values: list[float], patience: int, delta: float, mode: str, bounds: Any) -> int | None:
    """Written for the metric as a loss: what is to be large is turned round."""
    good, bad, finite = bounds
    flip = (lambda v: v) if mode == "min" else (lambda v: -v)
    best, since = math.inf, 0
    for number, value in enumerate(values):
        v = flip(value)
        since += 1
        if v < best - delta:
            best, since = v, 0
        if finite and not math.isfinite(value):
            return number
        if (good is not None and v <= flip(good)) or (bad is not None and v >= flip(bad)) or since == patience:
            return number
    return None


@given(
    st.lists(st.integers(-6, 6).map(lambda n: n / 2) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=20),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(["min", "max"]),
    st.tuples(st.sampled_from([None, -2.0]), st.sampled_from([None, 2.5]), st.booleans()),
)
def test_it_stops_where_the_rule_says(
    values: list[float], patience: int, delta: float, mode: str, rest: tuple[Any, Any, bool]
) -> None:
    good, bad, finite = rest
    if mode == "max":
        good, bad = (None if good is None else -good), (None if bad is None else -bad)
    hook = stop("val/loss", patience=patience, min_delta=delta, mode=mode, stop_at=good, diverged_at=bad, finite=finite)
    at, why, memory = told(values, hook)
    assert at == expected(values, patience, delta, mode, (good, bad, finite))
    assert (why is None) == (at is None)
    assert memory["seen"] == (len(values) if at is None else at + 1)


REASONS: dict[str, tuple[dict[str, Any], list[float], int, str]] = {
    "patience": ({}, [0.5, 0.31, 0.4, 0.31, 0.35], 4, "val/loss did not get better than 0.31 in 3 evaluations"),
    "at once": ({"patience": 1}, [0.5, 0.5], 1, "val/loss did not get better than 0.5 in 1 evaluation"),
    "not enough": (
        {"min_delta": 0.1, "patience": 2},
        [1.0, 0.95, 0.9],
        2,
        "val/loss did not get better than 1 by more than 0.1 in 2 evaluations",
    ),
    "more is better": ({"mode": "max", "patience": 2}, [1, 2, 1.5, 2], 3, "did not get better than 2 in 2 evaluations"),
    "good": ({"stop_at": 0.2}, [0.5, 0.3, 0.2], 2, "val/loss reached 0.2 (stop_at=0.2)"),
    "good, max": ({"stop_at": 0.9, "mode": "max"}, [0.5, 0.95], 1, "val/loss reached 0.95 (stop_at=0.9)"),
    "diverged": ({"diverged_at": 10}, [5.0, 10.0], 1, "val/loss diverged to 10 (diverged_at=10)"),
    "diverged, max": ({"diverged_at": 0.1, "mode": "max"}, [0.5, 0.05], 1, "diverged to 0.05 (diverged_at=0.1)"),
    "nan": ({"diverged_at": 10}, [5.0, math.nan], 1, "val/loss is nan"),
    "inf": ({"diverged_at": 10}, [math.inf], 0, "val/loss is inf"),
    "inf, as diverged": ({"diverged_at": 10, "finite": False}, [math.inf], 0, "diverged to inf (diverged_at=10)"),
    "nan is not better": (
        {"finite": False, "patience": 2},
        [1.0, math.nan, math.nan, 0.5],
        2,
        "did not get better than 1 in 2 evaluations",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_each_reason(name: str) -> None:
    options, values, at, words = REASONS[name]
    found, why, _ = told(values, stop("val/loss", **options))
    assert found == at
    assert why is not None
    assert why.startswith("early_stop: val/loss")
    assert why.endswith(words)


def test_a_better_value_begins_the_count_anew() -> None:
    at, _, memory = told([1.0, 1.1, 1.1, 0.9, 1.0, 0.8], stop("val/loss"))
    assert at is None
    assert {name: value.item() for name, value in memory.items()} == {"best": 0.8, "bad": 0, "seen": 6}


# --------------------------------------------------------------------------------------------------- metrics of training


def run(hooks: list[Any], values: list[list[float]], *, state: Any = None, **options: Any) -> Any:
    """Epochs of steps whose loss is what the batch says, beside a real gradient, with dropout."""

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        own = model(torch.ones(len(batch), 2)).square().mean()
        return own - own.detach() + batch.mean()

    step = ft.train_step(MODEL, loss_fn, TX)
    val = ft.Evaluator(ft.eval_step(MODEL, lambda model, batch: {"loss": batch.mean(), "acc": -batch.mean()}), VAL)
    options = {"epochs": len(values), "compile": False, "progress": False, "log": ft.every(steps=1), **options}
    if options.pop("evaluate", False):
        options["evals"] = {"val": val}

    def data(epoch: int) -> Iterator[Tensor]:
        for value in values[epoch]:
            yield torch.full((2, 1), value)

    return ft.fit(state or ft.init(MODEL, TX, seed=1), step, data, hooks=hooks, **options)


VAL = [torch.full((2, 1), 0.25)]


def test_the_mean_over_an_epoch_is_what_is_looked_at() -> None:
    values = [[1.0, 3.0], [4.0, 0.0], [2.0, 1.5], [5.0, 5.0], [0.0, 4.0]]  # means 2, 2, 1.75, 5, 2
    result = run([stop("loss", patience=2)], values)
    assert result.reason == "early_stop: loss did not get better than 1.75 in 2 epochs"
    assert result.state.counters().epoch == 5
    assert result.state.extra["early_stop"]["seen"] == 5
    assert result.state.extra["early_stop"]["weight"] == 0
    assert run([stop("loss", patience=1)], values).reason.endswith("better than 2 in 1 epoch")


def test_it_looks_when_the_cadence_fires() -> None:
    values = [[1.0, 3.0, 4.0, 1.0, 0.5, 9.0, 0.0, 0.0]]
    result = run([stop("loss", patience=2, every=ft.every(steps=2))], values)
    assert result.reason == "early_stop: loss did not get better than 2 in 2 looks"  # 2, 2.5, 4.75
    assert result.state.counters().step == 6
    at = run([stop("loss", stop_at=0.0, patience=99, every=ft.every(steps=1))], values)
    assert (at.reason, at.state.counters().step) == ("early_stop: loss reached 0 (stop_at=0)", 7)


def test_nan_in_an_epoch_and_divergence() -> None:
    assert run([stop("loss")], [[1.0, math.nan], [1.0, 1.0]]).reason == "early_stop: loss is nan"
    result = run([stop("loss", diverged_at=50)], [[1.0], [99.0], [1.0]])
    assert result.reason == "early_stop: loss diverged to 99 (diverged_at=50)"
    assert result.state.counters().step == 2


def test_weights_count() -> None:
    """As in the record of the same steps: a mean with its weights; other kinds count once for each step."""
    inner, look = (one.hook for one in stop("m").hooks)
    state = ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1))

    def after(*metrics: Any) -> tuple[float, float]:
        memory = inner.init(state)
        for metric in metrics:
            _, memory = inner.update(state, memory, ft.Event("step", 1, 0, 2, metrics={"m": metric}))
        return memory["total"].item(), memory["weight"].item()

    def tensors(kind: Any, *fields: float) -> Any:
        return kind(*[torch.tensor(value) for value in fields])

    mean, perplexity = ft.metrics.Mean, ft.metrics.Perplexity
    assert after(tensors(mean, 6.0, 2.0), tensors(mean, 1.0, 3.0)) == (7.0, 5.0)
    assert after(tensors(mean, 6.0, 2.0), tensors(mean, 0.0, 0.0)) == (6.0, 2.0)
    total, weight = after(tensors(perplexity, 0.0, 2.0), tensors(perplexity, 3.0 * math.log(4.0), 3.0))
    assert (total, weight) == (pytest.approx(14.0), 5.0)
    assert after(tensors(ft.metrics.Sum, 3.0), tensors(ft.metrics.Max, 4.0)) == (7.0, 2.0)
    nothing = state.replace(extra={"early_stop": inner.init(state)})
    assert look(nothing, ft.Event("epoch", 1, 1, 2)) is nothing


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_between_two_looks() -> None:
    inner = stop("loss").hooks[0].hook
    state = ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1))
    memory = inner.init(state)
    with Reads() as reads:
        for _ in range(3):
            metrics = {"loss": ft.metrics.Mean(torch.tensor(1.0), torch.tensor(2.0))}
            _, memory = inner.update(state, memory, ft.Event("step", 1, 0, 2, metrics=metrics))
    assert reads.count == 0
    assert memory["weight"] == 6


# --------------------------------------------------------------------------------------------------------------- in runs


KINDS: dict[str, Any] = {
    "training": lambda **more: stop("loss", **more),
    "looks": lambda **more: stop("loss", every=ft.every(steps=2), **more),
    "evaluation": lambda **more: stop("val/loss", **more),
}
FALLING = [[3.0 - epoch, 2.5 - epoch, 2.0 - epoch] for epoch in range(4)]


@pytest.mark.parametrize(("kind", "compile"), [*[(kind, False) for kind in KINDS], ("training", True)])
def test_where_it_does_not_stop_the_run_is_the_one_without_it(kind: str, compile: bool) -> None:
    options = {"compile": compile, "backend": "eager", "evaluate": True}
    plain = run([], FALLING, **options)
    result = run([KINDS[kind](patience=99)], FALLING, **options)
    rest = result.state.replace(extra={})
    assert bits(rest) == bits(plain.state)
    assert [dict(r.metrics) for r in result.history] == [dict(r.metrics) for r in plain.history]
    assert result.state.extra["early_stop"]["seen"] > 0
    assert bits(run([], FALLING[:3], **options).state.params) != bits(plain.state.params)


@pytest.mark.filterwarnings("ignore::ftrain.errors.DataWarning")  # that a generator is read again is said elsewhere
@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_in_the_middle(kind: str) -> None:
    values = [[3.0, 2.0, 1.0], [2.0, 2.0, 2.5], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]

    def go(saver: Any = None, **more: Any) -> Any:
        return run([KINDS[kind](patience=3)], values, evaluate=True, checkpoint=saver, **more)

    whole = go()
    assert whole.reason.startswith("early_stop: ")
    assert whole.state.counters().step < 15
    saver = Memory(ft.every(steps=1) | ft.every(epochs=1))
    assert_same(go(saver), whole)
    for shot in saver.shots:
        assert_same(go(Memory(ft.every(epochs=9), shot), resume="auto"), whole)


def test_several_of_them_and_the_first_reason_counts() -> None:
    hooks = [
        stop("val/loss", patience=4),
        stop("loss", stop_at=0.5, name="good"),
        stop("val/acc", mode="max", patience=3, name="acc"),
    ]
    result = run(hooks, [[1.0]] * 2 + [[0.4]] + [[1.0]] * 9, evaluate=True)
    assert result.reason == "good: loss reached 0.4 (stop_at=0.5)"
    assert {"early_stop", "good", "acc"} <= result.state.extra.keys()
    rest = run([hooks[0], hooks[2]], [[1.0]] * 9, evaluate=True)
    assert rest.reason == "acc: val/acc did not get better than -0.25 in 3 evaluations"
    assert rest.state.counters().epoch == 4


def test_at_least_lets_it_wait() -> None:
    values = [[1.0]] * 9
    result = run([stop("loss", patience=2)], values, at_least=ft.until(epochs=6))
    assert result.reason == "early_stop: loss did not get better than 1 in 2 epochs"
    assert result.state.counters().epoch == 6


# ----------------------------------------------------------------------------------------------------------- wrong uses


def test_a_name_that_the_evaluator_does_not_give() -> None:
    with pytest.raises(HookError) as caught:
        run([stop("val/los")], FALLING, evaluate=True)
    for part in (
        "ft.hooks.early_stop('val/los'): the evaluator 'val' gives no such metric",
        "the evaluation after step 3",
        "'val/loss' or 'val/acc'",
        "fix:      ft.hooks.early_stop('val/loss')",
    ):
        assert part in str(caught.value)


def test_a_name_that_the_step_does_not_give() -> None:
    with pytest.raises(HookError) as caught:
        run([stop("los")], FALLING)
    for part in ("ft.hooks.early_stop('los'): the step gives no such metric", "where:    step 1", "'loss'", "monitor="):
        assert part in str(caught.value)


@pytest.mark.parametrize("evaluate", [False, True])
def test_an_evaluator_that_never_ran(evaluate: bool) -> None:
    with pytest.raises(HookError) as caught:
        run([stop("test/loss")], FALLING, evaluate=evaluate)
    assert "ft.hooks.early_stop('test/loss'): the run has no evaluator 'test'." in str(caught.value)
    wanted = "ft.hooks.early_stop('val/loss')" if evaluate else "hooks=[ft.hooks.early_stop('test/loss')])"
    assert wanted in str(caught.value)


def test_a_run_that_ends_before_the_first_evaluation_is_no_mistake() -> None:
    result = run([stop("val/loss")], FALLING, evaluate=True, epochs=None, steps=2)
    assert result.reason == "steps"
    assert result.state.extra["early_stop"]["seen"] == 0


def test_a_metric_that_is_no_number() -> None:
    with pytest.raises(HookError, match=r"the metric is not a number(?s:.*)Collect"):
        told([torch.ones(3).numpy()], stop("val/loss"))  # type: ignore[list-item]


ARGUMENTS: dict[str, tuple[dict[str, Any], type, tuple[str, ...]]] = {
    "patience": ({"patience": 0}, LimitError, ("patience=0 makes no sense", "an integer >= 1", "patience=1")),
    "half a patience": ({"patience": 1.5}, LimitError, ("patience=1.5 makes no sense",)),
    "true": ({"patience": True}, LimitError, ("patience=True makes no sense",)),
    "min_delta": ({"min_delta": -0.1}, LimitError, ("min_delta=-0.1 makes no sense", "a number >= 0")),
    "mode": ({"mode": "lowest"}, LimitError, ("mode='lowest' is unknown", "'min' or 'max'")),
    "stop_at": ({"stop_at": math.nan}, LimitError, ("stop_at=nan is no threshold", "a finite number", "stop_at=None")),
    "stop_at text": ({"stop_at": "0.1"}, LimitError, ("stop_at='0.1' is no threshold",)),
    "diverged_at": ({"diverged_at": math.inf}, LimitError, ("diverged_at=inf is no threshold", "finite=True")),
    "thresholds": (
        {"stop_at": 1.0, "diverged_at": 0.5},
        LimitError,
        ("good enough is as bad as what has diverged", "stop_at below diverged_at, with mode='min'", "mode='max'"),
    ),
    "thresholds, max": (
        {"stop_at": 0.5, "diverged_at": 1.0, "mode": "max"},
        LimitError,
        ("stop_at above diverged_at, with mode='max'", "mode='min'"),
    ),
    "the same threshold": ({"stop_at": 1, "diverged_at": 1}, LimitError, ("only one of them",)),
    "every": ({"monitor": "loss", "every": 5}, LimitError, ("every= is no cadence", "ft.every(steps=50)")),
    "every of an evaluator": (
        {"every": ft.every(steps=5)},
        LimitError,
        ("every= is for metrics of training", "ft.Evaluator(..., every=every(steps=5))"),
    ),
    "monitor": ({"monitor": None}, ArgumentError, ("monitor= is a name", 'ft.hooks.early_stop("val/loss")')),
    "name": ({"name": ""}, ArgumentError, ("name= is a name",)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_make_no_sense(name: str) -> None:
    options, kind, wanted = ARGUMENTS[name]
    with pytest.raises(kind) as caught:
        stop(**{"monitor": "val/loss", **options})
    for part in ("ft.hooks.early_stop", *wanted):
        assert part in str(caught.value)
