"""Hooks that come with ftrain: reduce-on-plateau, value by value against torch, as a law, in a run, and asked for wrongly."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain as ft
from ftrain import errors
from ftrain.loops.hooks.hyper import injected, replace_hyper

from .corpus import MODELS

CLOCK = ft.loops.Clock


def evaluated(metrics: Mapping[str, Any], kind: str = "evaluation", step: int = 1) -> ft.Event:
    return ft.Event(kind, step, 0, 8, CLOCK(steps=step), metrics)


def subject(tx: Any = None) -> Any:
    return ft.init(nn.Linear(2, 1), tx or ft.optim.inject(ft.optim.sgd)(lr=0.1))


def bare(hook: Any) -> ft.Hook:
    """The hook inside of `on`."""
    return getattr(hook, "hook", hook)


def drive(hook: ft.Hook, state: Any, values: list[Any], name: str = "val/loss") -> tuple[Any, Any, list[float]]:
    """The hook at one evaluation after the other; gives the rate after each."""
    memory, rates = bare(hook).init(state), []
    for value in values:
        state, memory = bare(hook).update(state, memory, evaluated({name: value}))
        rates.append(state.opt.hyper["lr"].item())
    return state, memory, rates


# ------------------------------------------------------------------------------------------------------- against torch


def noisy(seed: int, length: int = 60) -> list[float]:
    """Falls, then stays with ties, small steps around the thresholds, jumps, infinities and NaN."""
    draw = random.Random(seed)
    value, found = draw.choice([2.0, -1.0, 0.5]), []
    for _ in range(length):
        move = draw.choice(["fall", "tie", "tie", "little", "little", "rise", "special"])
        value -= {"fall": 0.3, "little": draw.choice([1e-5, 3e-3, -1e-5]), "rise": -0.2}.get(move, 0.0)
        found.append(draw.choice([math.nan, math.inf, -math.inf, 0.0]) if move == "special" else value)
    return [value for value in found if value != -math.inf or draw.random() < 0.1]


OPTIONS = [
    {"mode": mode, "threshold_mode": threshold_mode, **more}
    for mode, threshold_mode in itertools.product(("min", "max"), ("rel", "abs"))
    for more in (
        {"patience": 2},
        {"patience": 0, "factor": 0.7, "threshold": 0.0},
        {"patience": 1, "factor": 0.5, "cooldown": 2, "threshold": 1e-2},
        {"patience": 3, "factor": 0.3, "cooldown": 5, "min_lr": 1e-3},
        {"patience": 1, "factor": 0.9, "eps": 5e-3, "min_lr": 0.01},
        {"patience": 1, "min_lr": 0.5},
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_rule_is_that_of_torch(options: dict[str, Any]) -> None:
    changes = 0
    for seed in range(12):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        scheduler = ReduceLROnPlateau(optimizer, **{"patience": 10, "factor": 0.1, **options})
        state, hook = subject(), ft.hooks.plateau("val/loss", **options)
        memory = bare(hook).init(state)
        for value in noisy(seed):
            before = state.opt.hyper["lr"].item()
            scheduler.step(value)
            state, memory = bare(hook).update(state, memory, evaluated({"val/loss": value}))
            assert state.opt.hyper["lr"].item() == optimizer.param_groups[0]["lr"]
            assert memory["best"].item() == scheduler.best
            assert memory["bad"].item() == scheduler.num_bad_epochs
            assert memory["cooldown"].item() == scheduler.cooldown_counter
            changes += state.opt.hyper["lr"].item() != before
    assert changes > 10 or options.get("min_lr") == 0.5


def test_nan_is_not_better_and_does_not_become_the_best() -> None:
    hook = ft.hooks.plateau("val/loss", patience=1, factor=0.5)
    _, memory, rates = drive(hook, subject(), [1.0, math.nan, math.nan, 0.5])
    assert rates == [0.1, 0.1, 0.05, 0.05]
    assert memory["best"] == 0.5


def test_metrics_of_all_kinds_count() -> None:
    hook = ft.hooks.plateau("val/loss", patience=0, factor=0.5)
    kinds = [
        1.0,
        1,
        torch.tensor(1.0),
        ft.metrics.Mean(torch.tensor(4.0), torch.tensor(4.0)),
        ft.metrics.Mean(2.0, 2.0),
    ]
    assert drive(hook, subject(), kinds)[2] == pytest.approx([0.1, 0.05, 0.025, 0.0125, 0.00625])


def test_a_metric_of_training_is_watched_by_its_mean_over_the_epoch() -> None:
    model, tx = nn.Linear(1, 1), ft.optim.inject(ft.optim.sgd)(lr=0.1)

    def step(state: Any, batch: Any) -> Any:
        losses = ft.metrics.Mean(batch.sum(), torch.tensor(float(len(batch))))
        return state.advance(len(batch)), {"loss": losses, "lr": state.opt.hyper["lr"]}

    # Means over the epochs: 2, 2 (worse by its last batch), 1.5, 1.5.
    epochs = [([1.0, 1.0], [4.0]), ([1.0], [2.5, 2.5]), ([1.5], [1.5]), ([1.5], [1.5])]
    data = [[torch.tensor(batch) for batch in batches] for batches in epochs]
    hook = ft.hooks.plateau("loss", patience=0, factor=0.5, threshold=0.0)
    seen: list[float] = []
    look = ft.on("epoch", lambda state, event: seen.append(state.opt.hyper["lr"].item()) or state)
    arguments: dict[str, Any] = {"epochs": 4, "hooks": [hook, look], "progress": False, "compile": False}
    ft.fit(ft.init(model, tx), step, lambda epoch: data[epoch], **arguments)
    assert seen == [0.1, 0.05, 0.05, 0.025]


def test_an_evaluator_that_is_not_there_is_missed_before_the_first_step() -> None:
    calls: list[int] = []
    hooks = [ft.hooks.plateau("vall/loss"), ft.on("step", lambda s, e: calls.append(1) or s)]
    with pytest.raises(errors.HookError, match=re.escape("the run has no evaluator 'vall'.")) as caught:
        run(hooks)
    assert "ft.hooks.plateau('val/loss')" in str(caught.value)
    assert not calls


# ------------------------------------------------------------------------------------------------- where the rate lies


NESTED: dict[str, Callable[[], Any]] = {
    "bare": lambda: ft.optim.inject(ft.optim.adamw)(lr=0.1, weight_decay=0.1),
    "in a chain": lambda: ft.optim.chain(
        ft.optim.clip_by_global_norm(1.0), ft.optim.chain(ft.optim.inject(ft.optim.sgd)(lr=0.1), ft.optim.identity())
    ),
    "groups": lambda: ft.optim.partition(
        lambda path, p: "matrix" if p.ndim == 2 else "vector",
        {"matrix": ft.optim.inject(ft.optim.sgd)(lr=0.1), "vector": ft.optim.inject(ft.optim.adam)(lr=0.4)},
    ),
    "one inside the other": lambda: ft.optim.inject(lambda lr: ft.optim.inject(ft.optim.sgd)(lr=0.2))(lr=0.1),
}


@pytest.mark.parametrize("name", NESTED)
def test_the_rate_is_found_wherever_it_lies(name: str) -> None:
    state = subject(NESTED[name]())
    before = [one.hyper for one in injected(state.opt)]
    hook = ft.hooks.plateau("val/loss", patience=0, factor=0.5)
    new, _ = bare(hook).update(
        *bare(hook).update(state, bare(hook).init(state), evaluated({"val/loss": 1.0})), evaluated({"val/loss": 1.0})
    )
    after = [one.hyper for one in injected(new.opt)]
    assert [one["lr"].item() for one in after] == [one["lr"].item() / 2 for one in before]
    assert [one.get("weight_decay") for one in after] == [one.get("weight_decay") for one in before]
    ft.tree.check_same(state, new, root="state", what="the hook changed the form of the state.")
    with pytest.raises(AssertionError):
        assert ft.tree.leaves(new.opt) == ft.tree.leaves(state.opt)


def test_containers_keep_their_kind() -> None:
    one = ft.optim.inject(ft.optim.sgd)(lr=1.0).init({"w": torch.ones(1)})
    opt = {"b": [one, (one,)], "a": None, "c": torch.ones(1)}
    new = replace_hyper(opt, "lr", lambda lr: lr * 3)
    assert ft.tree.same_structure(opt, new)
    assert list(new) == ["b", "a", "c"]
    assert [found.hyper["lr"].item() for found in injected(new)] == [3.0, 3.0]
    assert one.hyper["lr"] == 1.0


def test_another_hyper_parameter() -> None:
    state = subject(ft.optim.inject(ft.optim.adamw)(lr=0.1, weight_decay=0.2))
    hook = ft.hooks.plateau("val/loss", patience=0, factor=0.5, hyper="weight_decay")
    state, _, rates = drive(hook, state, [1.0, 1.0])
    assert rates == [0.1, 0.1]
    assert state.opt.hyper["weight_decay"] == 0.1


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device() -> None:
    hook, state = ft.hooks.plateau("val/loss", patience=0), subject()
    memory = bare(hook).init(state)
    with Reads() as reads:
        for value in (1.0, torch.tensor(1.0), math.nan):
            state, memory = bare(hook).update(state, memory, evaluated({"val/loss": value}))
    assert reads.count == 0
    assert state.opt.hyper["lr"].item() == pytest.approx(0.001)
    with Reads() as reads:
        state.opt.hyper["lr"].item()
    assert reads.count == 1


# ------------------------------------------------------------------------------------------------------------ in a run


def run(hooks: list[Any], *, epochs: int = 6, state: Any = None, metric: Any = None, **options: Any) -> ft.Result:
    """`mlp` of the corpus, with dropout; its evaluation gives `metric(model, batch)`, at first a constant."""
    case = MODELS["mlp"]
    model, tx = case.model(), ft.optim.inject(ft.optim.adamw)(lr=1e-2)
    metric = metric or (
        lambda model, batch: {"loss": (model(batch["x"]) * 0).mean() + 1, "acc": model(batch["x"]).mean()}
    )
    evals = {"val": ft.Evaluator(ft.eval_step(model, metric), case.batches(1))}
    options = {"compile": False, "evals": evals, **options}
    step = ft.train_step(model, case.loss_fn, tx)
    return ft.fit(
        state or ft.init(model, tx), step, case.batches(3), epochs=epochs, hooks=hooks, progress=False, **options
    )


def same(a: Any, b: Any) -> bool:
    one, two = ft.tree.leaves(a), ft.tree.leaves(b)
    return len(one) == len(two) and all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_in_a_run_the_rate_falls_and_the_steps_follow() -> None:
    log = ft.every(steps=1)
    result = run([ft.hooks.plateau("val/loss", factor=0.5, patience=1)], epochs=6, log=log)
    # The first evaluation is the best; the third and the fifth are the second in a row that is not better.
    assert result.history["lr"].tolist() == pytest.approx([1e-2] * 9 + [5e-3] * 6 + [2.5e-3] * 3)
    assert result.state.opt.hyper["lr"].item() == 2.5e-3
    without = run([], epochs=6, log=log)
    before, after = (r.history["loss"].tolist() for r in (without, result))
    assert before[:9] == after[:9]
    assert before[10:] != after[10:]


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_where_it_does_not_fire_training_is_bitwise_the_same(compile: bool) -> None:
    options = {"compile": compile, "backend": "eager"}
    with_hook = run([ft.hooks.plateau("val/loss", patience=100)], **options)
    without = run([], **options)
    moved = run([], epochs=5, **options)
    for part in ("params", "buffers", "opt", "step", "seed"):
        assert same(getattr(with_hook.state, part), getattr(without.state, part)), part
    assert not same(moved.state.params, without.state.params)
    fired = run([ft.hooks.plateau("val/loss", patience=0)], **options)
    assert not same(fired.state.params, without.state.params)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_the_memory_resumes(cut: int) -> None:
    def hook() -> ft.Hook:
        return ft.hooks.plateau("val/loss", factor=0.5, patience=1, cooldown=1)

    whole = run([hook()], epochs=6)
    first = run([hook()], epochs=cut)
    resumed = run([hook()], epochs=6 - cut, state=first.state.copy())
    assert same(resumed.state, whole.state)
    assert whole.state.opt.hyper["lr"] < 1e-2
    assert set(whole.state.extra["plateau"]) == {"best", "bad", "cooldown", "seen"}
    if cut == 2:  # one evaluation was not better: without the memory of it, the rate falls later
        forgotten = run([hook()], epochs=6 - cut, state=first.state.replace(extra={}))
        assert not same(forgotten.state.params, whole.state.params)


def test_two_of_them_with_names_of_their_own() -> None:
    hooks = [
        ft.hooks.plateau("val/loss", patience=0, factor=0.5),
        ft.hooks.plateau("val/loss", patience=2, factor=0.1, name="slow"),
    ]
    result = run(hooks, epochs=4)
    assert result.state.opt.hyper["lr"].item() == pytest.approx(1e-2 * 0.5**3 * 0.1)
    assert {"plateau", "slow"} <= result.state.extra.keys()


def test_events_that_are_not_its_own_cost_no_new_state() -> None:
    hook, state = ft.hooks.plateau("val/loss"), subject()
    hooks = ft.loops.calling.Hooks([hook])
    state = hooks.init(state)
    assert hooks(state, evaluated({"loss": 1.0}, "step")).state is state
    assert hooks(state, evaluated({"val/loss": 1.0})).state is not state


def test_an_evaluation_only_every_other_epoch_and_a_second_evaluator() -> None:
    case = MODELS["mlp"]
    step = ft.eval_step(case.model(), lambda model, batch: {"loss": (model(batch["x"]) * 0).mean()})
    evals = {
        "val": ft.Evaluator(step, case.batches(1), every=ft.every(epochs=2)),
        "test": ft.Evaluator(step, case.batches(1)),
    }
    result = run([ft.hooks.plateau("val/loss", patience=0, factor=0.5)], epochs=6, evals=evals)
    assert result.state.opt.hyper["lr"].item() == 1e-2 / 4


# ---------------------------------------------------------------------------------------------------------- wrong uses

FIX = "tx = ft.optim.inject(ft.optim.adamw)(lr=1e-3)"
NOT_THERE: dict[str, tuple[Callable[[], Any], str, tuple[str, ...]]] = {
    "not injected": (
        lambda: ft.optim.adamw(1e-3),
        "lr",
        ("finds no hyper-parameter 'lr'", "where:    state.opt", "constants", "fixed when the optimizer is made", FIX),
    ),
    "left at its default": (
        lambda: ft.optim.inject(ft.optim.adamw)(1e-3),
        "weight_decay",
        ("finds no hyper-parameter 'weight_decay'", "only 'lr'", "was not", "(weight_decay=1e-3)"),
    ),
    "scheduled": (
        lambda: ft.optim.inject(ft.optim.adamw)(lr=ft.schedules.step(1e-3, 10)),
        "lr",
        ("and a schedule both set 'lr'", "that is a number", "sets it anew at each step", FIX),
    ),
    "one group scheduled": (
        lambda: ft.optim.chain(
            ft.optim.inject(ft.optim.sgd)(lr=1e-3), ft.optim.inject(ft.optim.sgd)(lr=ft.schedules.step(1e-3, 10))
        ),
        "lr",
        ("and a schedule both set 'lr'",),
    ),
}


@pytest.mark.parametrize("name", NOT_THERE)
@pytest.mark.parametrize("when", ["new", "resumed"])
def test_no_rate_that_it_could_change(name: str, when: str) -> None:
    make, hyper, parts = NOT_THERE[name]
    case, tx, hook = MODELS["mlp"], make(), ft.hooks.plateau("val/loss", hyper=hyper)
    model = case.model()
    state = ft.init(model, tx)
    if when == "resumed":  # with the memory of a run whose optimizer was another
        state = state.replace(
            extra={"plateau": bare(hook).init(subject(ft.optim.inject(ft.optim.adamw)(lr=1, weight_decay=1)))}
        )
    steps: list[Any] = []
    step = ft.train_step(model, case.loss_fn, tx)
    with pytest.raises(errors.HookError) as caught:
        ft.fit(
            state,
            lambda state, batch: steps.append(1) or step(state, batch),
            case.batches(2),
            hooks=[hook],
            progress=False,
            compile=False,
        )
    for part in ("ft.hooks.plateau('val/loss')", *parts):
        assert part in str(caught.value)
    assert not steps, "the run began all the same"


def test_another_hyper_parameter_may_be_scheduled() -> None:
    tx = ft.optim.inject(ft.optim.adamw)(lr=0.1, weight_decay=ft.schedules.linear(0.1, 0.0, 10))
    assert drive(ft.hooks.plateau("val/loss", patience=0, factor=0.5), subject(tx), [1.0, 1.0])[2] == [0.1, 0.05]


def test_a_name_that_the_evaluator_does_not_give_is_said_at_its_first_evaluation() -> None:
    with pytest.raises(errors.HookError) as caught:
        run([ft.hooks.plateau("val/los")], epochs=2)
    for part in (
        "ft.hooks.plateau('val/los'): the evaluator 'val' gives no such metric",
        "the evaluation after step 3",
        "expected: 'val/loss' or 'val/acc'",
        "got:      'val/los'",
        "fix:      ft.hooks.plateau('val/loss')",
    ):
        assert part in str(caught.value)
    assert "after step 3" in caught.value.__notes__[0]


AT_THE_START: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "another evaluator": ("test/loss", {}, ("expected: 'val/...'", "got:      'test/loss'", "plateau('val/loss')")),
    "no evaluator": ("val/loss", {"evals": None}, ("expected: an evaluator", "evals={", "hooks=[ft.hooks.plateau")),
}


@pytest.mark.parametrize("name", AT_THE_START)
def test_an_evaluator_that_the_run_does_not_have_is_said_at_the_start(name: str) -> None:
    monitor, options, parts = AT_THE_START[name]
    with pytest.raises(errors.HookError) as caught:
        run([ft.hooks.plateau(monitor)], epochs=2, **options)
    for part in (f"ft.hooks.plateau('{monitor}'): the run has no evaluator", *parts, "before the first step"):
        assert part in str(caught.value) + str(caught.value.__notes__)


def test_a_metric_that_never_appeared_is_said_at_the_end() -> None:
    case = MODELS["mlp"]
    step = ft.eval_step(case.model(), lambda model, batch: {"loss": model(batch["x"]).mean()})
    evals = {"val": ft.Evaluator(step, case.batches(1), every=ft.every(epochs=5))}
    with pytest.warns(errors.HookWarning) as caught:
        assert run([ft.hooks.plateau("val/loss")], epochs=2, evals=evals).reason == "epochs"
    for part in ("the metric never appeared, so the hook did nothing", "its cadence did not fire", "every=ft.every("):
        assert part in str(caught[0].message)


def test_a_run_that_ends_before_the_first_evaluation_is_no_mistake() -> None:
    result = run([ft.hooks.plateau("val/loss")], epochs=None, steps=2)
    assert result.reason == "steps"
    assert result.state.extra["plateau"]["seen"] == 0


def test_a_run_that_goes_on_after_the_metric_was_seen_is_no_mistake() -> None:
    first = run([ft.hooks.plateau("val/loss")], epochs=1)
    case = MODELS["mlp"]
    step = ft.eval_step(case.model(), lambda model, batch: {"loss": model(batch["x"]).mean()})
    evals = {"val": ft.Evaluator(step, case.batches(1), every=ft.every(epochs=5))}
    assert run([ft.hooks.plateau("val/loss")], epochs=1, state=first.state, evals=evals).reason == "epochs"


def test_a_metric_that_is_no_number() -> None:
    hook, state = ft.hooks.plateau("val/all"), subject()
    with pytest.raises(errors.HookError, match=r"the metric is not a number(?s:.*)got: +ndarray(?s:.*)Collect"):
        bare(hook).update(state, bare(hook).init(state), evaluated({"val/all": torch.ones(3).numpy()}))


ARGUMENTS: dict[str, tuple[dict[str, Any], type, tuple[str, ...]]] = {
    "factor 1": (
        {"factor": 1.0},
        errors.LimitError,
        ("factor=1.0 makes nothing smaller", "0 < factor < 1", "factor=0.1"),
    ),
    "factor 0": ({"factor": 0}, errors.LimitError, ("factor=0 makes nothing smaller",)),
    "factor text": ({"factor": "0.1"}, errors.LimitError, ("factor='0.1'",)),
    "factor nan": ({"factor": math.nan}, errors.LimitError, ("factor=nan",)),
    "patience": ({"patience": -1}, errors.LimitError, ("patience=-1 makes no sense", "an integer >= 0", "patience=1")),
    "half a patience": ({"patience": 1.5}, errors.LimitError, ("patience=1.5 makes no sense", "an integer >= 0")),
    "true patience": ({"patience": True}, errors.LimitError, ("patience=True",)),
    "cooldown": ({"cooldown": -2}, errors.LimitError, ("cooldown=-2", "cooldown=2")),
    "threshold": ({"threshold": -1e-4}, errors.LimitError, ("threshold=-0.0001", "a number >= 0")),
    "threshold nan": ({"threshold": math.nan}, errors.LimitError, ("threshold=nan", "threshold=1")),
    "min_lr": ({"min_lr": "0"}, errors.LimitError, ("min_lr='0'", "a number >= 0")),
    "eps": ({"eps": -1e-8}, errors.LimitError, ("eps=-1e-08",)),
    "mode": ({"mode": "minimum"}, errors.LimitError, ("mode='minimum' is unknown", "'min' or 'max'", "mode='min'")),
    "threshold_mode": ({"threshold_mode": "relative"}, errors.LimitError, ("'rel' or 'abs'", "threshold_mode='rel'")),
    "monitor": ({"monitor": None}, TypeError, ("monitor= is a name", "got:      None", 'ft.hooks.plateau("val/loss")')),
    "name": ({"name": ""}, TypeError, ("name= is a name",)),
    "hyper": ({"hyper": 1}, TypeError, ("hyper= is a name",)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_make_no_sense(name: str) -> None:
    given, kind, parts = ARGUMENTS[name]
    with pytest.raises(kind) as caught:
        ft.hooks.plateau(**{"monitor": "val/loss", **given})
    for part in ("ft.hooks.plateau", *parts):
        assert part in str(caught.value)
