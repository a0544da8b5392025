"""`ft.hooks.spike_guard`: a run with a bad batch is, bitwise, the run on the data without it; and it resumes, and says what was wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain as ft
from ftrain.errors import ArgumentError, HookError, LimitError, LossError

from .test_laws import bits
from .test_resume import Memory, rows

guard = ft.hooks.spike_guard


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(F.relu(self.norm(self.a(x)))))


def loss_fn(model: Any, batch: Any) -> Any:
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": ft.metrics.accuracy(logits, batch["y"])}


def made() -> tuple[nn.Module, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(ft.schedules.warmup_cosine(1e-2, 3, 40)))
    return model, tx


def good(number: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return {"x": torch.randn(8, 6, generator=draw), "y": torch.randint(0, 3, (8,), generator=draw)}


NAN = {**good(0), "x": good(0)["x"] * math.nan}
GOOD = [good(number) for number in range(12)]


def run(data: Any, hooks: list[Any], *, state: Any = None, epochs: Any = 1, accumulate: int = 2, **options: Any) -> Any:
    """Dropout, batch norm, AdamW with a schedule, an average, two micro-batches."""
    model, tx = made()
    step = ft.with_ema(ft.train_step(model, loss_fn, tx, accumulate=accumulate), 0.9)
    options = {"compile": False, "progress": False, "log": ft.every(steps=1), **options}
    return ft.fit(state or ft.init(model, tx, seed=3), step, data, epochs=epochs, hooks=hooks, **options)


def all_but_counts(state: ft.TrainState) -> list[bytes]:
    """The whole state, the statistic and the copy included; the counts of going back left out."""
    mine = {k: v for k, v in state.extra["spike_guard"].items() if k not in ("row", "back", "first")}
    return bits(state.replace(extra={**state.extra, "spike_guard": mine}))


def without(state: ft.TrainState) -> list[bytes]:
    return bits(state.replace(extra={k: v for k, v in state.extra.items() if not k.startswith("spike_guard")}))


def losses(result: Any) -> list[tuple[int, float]]:
    return [(record.step, record.metrics["loss"]) for record in result.history if "loss" in record.metrics]


# ------------------------------------------------------------------------------------------------- where nothing is bad


POLICIES: dict[str, dict[str, Any]] = {
    "skip": {},
    "rollback": {"every": ft.every(steps=3)},
    "stop": {"every": ft.every(steps=1)},
    "raise": {"every": ft.every(steps=4)},
}


@pytest.mark.parametrize(("policy", "compile"), [*[(policy, False) for policy in POLICIES], ("rollback", True)])
def test_where_nothing_is_bad_the_run_is_the_one_without_it(policy: str, compile: bool) -> None:
    options = {"compile": compile, "backend": "eager", "accumulate": 1}
    plain = run(GOOD[:7], [], epochs=2, **options)
    guarded = run(GOOD[:7], [guard(policy, **POLICIES[policy])], epochs=2, **options)
    assert without(guarded.state) == bits(plain.state)
    assert losses(guarded) == losses(plain)
    assert guarded.reason == plain.reason == "epochs"
    shorter = run(GOOD[:6], [], epochs=2, **options)
    assert bits(shorter.state.params) != bits(plain.state.params)


# ---------------------------------------------------------------------------------------------------------- going back


WHERE: dict[str, list[int]] = {
    "one": [4],
    "the second": [1],
    "the last": [7],
    "two in a row": [3, 4],
    "several": [2, 5, 7],
}


def planted(positions: list[int]) -> tuple[list[Any], list[Any]]:
    """Eight batches, some of them bad; and the data without these."""
    data = [NAN if number in positions else GOOD[number] for number in range(8)]
    return data, [batch for batch in data if batch is not NAN]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("where", WHERE)
def test_with_skip_the_run_is_the_one_without_the_bad_batches(where: str, epochs: int) -> None:
    data, clean = planted(WHERE[where])
    with_them = run(data, [guard("skip")], epochs=epochs)
    without_them = run(clean, [guard("skip")], epochs=epochs)
    assert all_but_counts(with_them.state) == all_but_counts(without_them.state)
    assert with_them.state.extra["spike_guard"]["back"] == epochs * len(WHERE[where])
    assert losses(with_them) == losses(without_them)  # what the bad steps told is not recorded
    assert without(with_them.state) == bits(run(clean, [], epochs=epochs).state)
    assert with_them.state.counters().step == epochs * len(clean)


@pytest.mark.parametrize("donate", [False, True])
def test_compiled_it_is_so_too(donate: bool) -> None:
    data, clean = planted([2, 5])
    model, tx = made()
    plain = ft.with_ema(ft.train_step(model, loss_fn, tx, accumulate=2), 0.9)
    found = []
    for batches in (data, clean):
        step = ft.compile(plain, backend="eager", donate=donate)
        result = ft.fit(
            ft.init(model, tx, seed=3), step, batches, epochs=2, hooks=[guard("skip")], progress=False, donate=donate
        )
        assert (step.rung, step.compiles) == ("step", 1)
        found.append(all_but_counts(result.state))
    assert found[0] == found[1]


@pytest.mark.parametrize("bad", [3, 4, 5])
def test_with_rollback_it_is_the_run_without_all_batches_since_the_copy(bad: int) -> None:
    data = GOOD.copy()
    data[bad] = NAN
    # Copies are made after 3, 6, 9 steps: the look after the sixth batch finds it, and leaves out the batches 3, 4 and 5.
    result = run(data, [guard("rollback", every=ft.every(steps=3))])
    clean = run(data[:3] + data[6:], [guard("rollback", every=ft.every(steps=3))])
    assert all_but_counts(result.state) == all_but_counts(clean.state)
    assert without(result.state) == bits(run(data[:3] + data[6:], []).state)
    assert (result.state.extra["spike_guard"]["back"], result.state.counters().step) == (1, 9)
    assert [record.metrics["spike_guard"] for record in result.history if "spike_guard" in record.metrics] == [1.0]


def test_before_the_first_look_it_goes_back_to_the_start() -> None:
    data = [GOOD[0], NAN, GOOD[1], *GOOD[2:5]]
    result = run(data, [guard("rollback", every=ft.every(steps=3))])
    assert without(result.state) == bits(run(GOOD[2:5], []).state)


@pytest.mark.parametrize("how", [{"epochs": 1}, {"epochs": None, "steps": 5}], ids=["epoch", "steps"])
def test_it_goes_back_at_the_end_of_an_epoch_and_of_the_run(how: dict[str, Any]) -> None:
    data = [*GOOD[:4], NAN, *GOOD[5:7]] if how.get("steps") else [*GOOD[:4], NAN]
    result = run(data, [guard("rollback", every=ft.every(steps=3))], **how)
    assert result.state.counters().step == 3
    state = result.state.replace(epoch=torch.zeros_like(result.state.epoch))
    assert without(state) == bits(run(data, [], epochs=None, steps=3).state)
    assert result.state.counters().epoch == (1 if how.get("epochs") else 0)


def test_steps_and_samples_go_back_and_the_epoch_does_not() -> None:
    data, _ = planted([6])
    seen: list[tuple[str, int, int, int]] = []

    def hook(state: Any, event: Any) -> Any:
        assert state.counters() == (event.step, event.epoch, event.samples, 3)
        seen.append((event.kind, event.step, event.epoch, event.samples))
        return state

    run(data, [hook, guard("rollback", every=ft.every(steps=4))], epochs=2)
    # Step 8 was looked at, and undone, at the end of the first epoch; step 12 at the end of the second.
    assert [one for one in seen if one[0] in ("epoch", "end")] == [
        ("epoch", 4, 1, 32),
        ("epoch", 8, 2, 64),
        ("end", 8, 2, 64),
    ]
    assert [step for kind, step, *_ in seen if kind == "step"] == [*range(1, 9), *range(5, 13)]


def test_other_hooks_do_not_hear_of_a_step_that_did_not_happen() -> None:
    data, clean = planted([2, 5])
    heard: list[int] = []

    def hook(state: Any, event: Any) -> Any:
        heard.append(event.step)
        return state

    run(data, [guard("skip"), ft.on("step", hook)])
    assert heard == list(range(1, len(clean) + 1))


def counter(name: str = "counter") -> ft.Hook:
    def init(state: Any) -> Any:
        return {"steps": torch.zeros((), dtype=torch.int64)}

    def update(state: Any, memory: Any, event: Any) -> Any:
        return state, {"steps": memory["steps"] + 1}

    return ft.on("step", ft.Hook(name, init, update))


def test_memories_that_are_in_the_state_go_back_with_it() -> None:
    data = [*GOOD[:4], NAN, *GOOD[5:8]]
    model, tx = made()
    extra = {"counter": {"steps": torch.zeros((), dtype=torch.int64)}}
    start = ft.init(model, tx, seed=3).replace(extra=extra)
    result = run(data, [counter(), guard("rollback", every=ft.every(steps=3))], state=start)
    assert result.state.counters().step == 5
    assert result.state.extra["counter"]["steps"] == 5


def test_what_other_hooks_made_of_the_state_at_the_same_event_is_in_the_copy() -> None:
    """A hook that changes the state at the evaluation, or the epoch's end, right after the copy was made."""

    def scaled(kind: str) -> Any:
        return ft.on(kind, lambda state, event: state.replace(params={k: p * 1.5 for k, p in state.params.items()}))

    model, _ = made()
    metric = ft.eval_step(model, lambda model, batch: {"loss": model(batch["x"]).mean()})
    val = ft.Evaluator(metric, GOOD[:1], every=ft.every(steps=3))
    for kind in ("evaluation", "step", "epoch"):
        data = [*GOOD[:3], NAN, *GOOD[4:6]]
        options = {"evals": {"val": val}, "epochs": 1}
        hooks = [scaled(kind), guard("rollback", every=ft.every(steps=3))]
        if kind == "epoch":
            epochs = [GOOD[:3], [NAN, *GOOD[4:6], *GOOD[:3]]]
            found = run(epochs.__getitem__, hooks, epochs=2)
            clean = run(lambda epoch: GOOD[:3], hooks, epochs=2)
        else:
            found, clean = run(data, hooks, **options), run(GOOD[:3], hooks, **options)
        assert bits(found.state.params) == bits(clean.state.params), kind


def test_a_finite_spike_and_an_average_that_goes_back() -> None:
    """Losses that the batch itself says."""
    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.1, momentum=0.9)

    def told(model: Any, batch: Tensor) -> Tensor:
        own = sum(p.sum() for p in model.parameters())
        return own - own.detach() + batch.mean()

    step = ft.with_ema(ft.train_step(model, told, tx), 0.5)

    def go(values: list[float], **options: Any) -> Any:
        hook = guard("skip", window=8, warmup=4, **options)
        data = [torch.full((2, 1), value) for value in values]
        return ft.fit(ft.init(model, tx), step, data, hooks=[hook], progress=False, compile=False).state

    usual = [1.0, 1.1, 0.9, 1.0, 1.05]
    assert all_but_counts(go([*usual, 30.0, 1.0])) == all_but_counts(go([*usual, 1.0]))
    assert all_but_counts(go([*usual, 1.4, 1.0], factor=100.0)) != all_but_counts(go([*usual, 1.0], factor=100.0))
    assert go([1.0, 1.1, 30.0, 1.0]).extra["spike_guard"]["back"] == 0  # no warm-up yet
    assert go([*usual, 1.9], atol=1.0).extra["spike_guard"]["back"] == 0
    assert go([*usual, math.nan, 1.0], nonfinite=False).extra["spike_guard"]["back"] == 0


# ------------------------------------------------------------------------------------------------------------- resuming


def assert_equal(one: Any, two: Any) -> None:
    """As `assert_same` of test_resume.py, where NaN is NaN."""
    assert one.reason == two.reason
    assert bits(one.state) == bits(two.state)
    assert repr(rows(one.history)) == repr(rows(two.history))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_going_on_from_any_snapshot_gives_the_run_that_was_not_stopped(policy: str) -> None:
    """Right before and right after it went back, too."""
    data, _ = planted([1, 4])

    def go(saver: Any = None, **more: Any) -> Any:
        return run(data, [counter(), guard(policy, **POLICIES[policy])], epochs=2, checkpoint=saver, **more)

    whole = go()
    assert whole.state.extra["spike_guard"]["back"] >= 2
    saver = Memory(ft.every(steps=1) | ft.every(epochs=1))
    assert_equal(go(saver), whole)
    assert any(bool(shot.state.extra["spike_guard"]["bad"]) for shot in saver.shots) == (policy == "rollback")
    for shot in saver.shots:
        assert_equal(go(Memory(ft.every(epochs=9), shot), resume="auto"), whole)


def test_from_a_checkpoint_on_disk(tmp_path: Any) -> None:
    data, _ = planted([4])

    def go(folder: str, **more: Any) -> Any:
        saver = ft.Checkpoints(str(tmp_path / folder), every=ft.every(steps=3))
        return run(data, [guard("skip")], epochs=2, checkpoint=saver, **more)

    whole = go("whole")
    first = run(
        data,
        [guard("skip")],
        epochs=None,
        steps=5,
        checkpoint=ft.Checkpoints(str(tmp_path / "cut"), every=ft.every(steps=3)),
    )
    assert first.state.counters().step == 5
    again = go("cut", resume="auto")
    assert bits(again.state) == bits(whole.state)


def test_a_fit_that_goes_on_with_a_result_begins_with_what_it_is_given() -> None:
    first = run([*GOOD[:3], GOOD[3]], [guard("stop", every=ft.every(steps=1))])
    bad = run([*GOOD[:3], NAN], [guard("stop", every=ft.every(steps=1))])
    assert bad.state.extra["spike_guard"]["bad"]
    kept = run(GOOD[:3], [guard("rollback", every=ft.every(steps=2))])
    changed = kept.state.replace(params={k: p * 2 for k, p in kept.state.params.items()})
    marked = {**changed.extra["spike_guard"], "bad": torch.ones((), dtype=torch.bool)}
    on = run([GOOD[4]], [guard("rollback")], state=changed.replace(extra={**changed.extra, "spike_guard": marked}))
    assert on.state.counters().step == 4
    assert first.reason == "epochs"


# --------------------------------------------------------------------------------------------------------- stop, raise


def test_stop_says_why() -> None:
    result = run([*GOOD[:4], NAN, *GOOD[5:8]], [guard("stop", every=ft.every(steps=2))])
    assert result.reason == "spike_guard: loss was nan at step 5"
    assert result.state.counters().step == 6
    at_the_epoch = run([*GOOD[:4], NAN], [guard("stop", name="mine")], epochs=5)
    assert at_the_epoch.reason == "mine: loss was nan at step 5"
    assert at_the_epoch.state.counters().epoch == 1


def test_the_first_bad_one_is_named_with_what_was_usual() -> None:
    hook, event = guard("stop", window=8, warmup=3), ft.Event("step", 1, 0, 8)
    state = ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1))
    watch = hook.hooks[0].hook
    memory = watch.init(state)
    for step, value in enumerate((1.0, 2.0, 3.0, 50.0, 60.0), start=1):
        metrics = {"loss": ft.metrics.Mean(torch.tensor(2 * value), torch.tensor(2.0))}
        state = state.replace(step=torch.tensor(step))
        state, memory = watch.update(state, memory, ft.Event("step", step, 0, 8, metrics=metrics))
    look = hook.hooks[1].hook
    out = look(state.replace(extra={"spike_guard": memory}), event)
    assert out.stop == "spike_guard: loss was 50 at step 4, where 2 +- 1 was usual"
    assert memory["watch"].values[:3].tolist() == [1.0, 2.0, 3.0]
    assert memory["watch"].seen == 3


def test_raise_says_where() -> None:
    with pytest.raises(LossError) as caught:
        run([*GOOD[:4], NAN, *GOOD[5:8]], [guard("raise", every=ft.every(steps=3))])
    for part in (
        "ft.hooks.spike_guard('raise', monitor='loss'): loss was nan at step 5.",
        "where:    step 5, found at step 6",
        "clip_by_global_norm",
    ):
        assert part in str(caught.value)
    with pytest.raises(LossError, match="found at step 5"):
        run([*GOOD[:4], NAN, GOOD[5]], [guard("raise")], epochs=None, steps=5)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_often_in_a_row(policy: str) -> None:
    options = {} if policy == "skip" else {"every": ft.every(steps=1)}
    data = [*GOOD[:2], *[NAN] * 3, GOOD[5], *[NAN] * 3, GOOD[6]]
    assert run(data, [guard(policy, limit=3, **options)]).state.counters().step == 4
    with pytest.raises(LossError) as caught:
        run(data, [guard(policy, limit=2, **options)])
    for part in (
        "went back 2 times in a row, and loss was nan at step 3. Nothing is gained by going on.",
        "at most 2 times in a row (limit=2)",
        "a level that has changed",
    ):
        assert part in str(caught.value)


def test_no_copy_to_go_back_to() -> None:
    with pytest.raises(LossError) as caught:
        run([*GOOD[:2], NAN, GOOD[3]], [ft.on("step", guard("rollback", every=ft.every(steps=4)))])
    for part in (
        "loss was nan at step 3, and there is no good state yet to go back to",
        'a copy made at the "start" event',
        "ft.on or ft.when around the hook",
    ):
        assert part in str(caught.value)


# ------------------------------------------------------------------------------------------------ costs, several, names


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES)
def test_between_two_looks_nothing_is_read(policy: str) -> None:
    hook = guard(policy, **POLICIES[policy])
    state = ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1))
    watch = hook.hooks[0].hook
    memory = watch.init(state)
    with Reads() as reads:
        for value in (1.0, math.nan, 2.0):
            metrics = {"loss": ft.metrics.Mean(torch.tensor(value), torch.tensor(1.0))}
            state, memory = watch.update(state, memory, ft.Event("step", 1, 0, 8, metrics=metrics))
    assert reads.count == 0
    assert memory["bad"]


def test_two_guards_of_two_metrics() -> None:
    data, clean = planted([4])
    hooks = [
        guard("stop", monitor="accuracy", factor=1e6, name="second"),
        guard("skip"),
    ]
    one, two = run(data, hooks), run(clean, hooks)
    assert bits(one.state.params) == bits(two.state.params)
    assert one.reason == two.reason == "epochs"


def test_early_stopping_after_a_guard_does_not_see_what_was_skipped() -> None:
    data, clean = planted([2, 5])
    hooks = [guard("skip"), ft.hooks.early_stop("loss", patience=50)]
    one, two = run(data, hooks, epochs=2), run(clean, hooks, epochs=2)
    assert one.reason == "epochs"
    assert bits(one.state.extra["early_stop"]) == bits(two.state.extra["early_stop"])


def test_a_metric_that_the_step_does_not_give() -> None:
    with pytest.raises(HookError) as caught:
        run(GOOD[:2], [guard("skip", monitor="los")])
    for part in (
        "ft.hooks.spike_guard('skip', monitor='los'): the step gives no such metric",
        "where:    step 1",
        "'loss'",
        "monitor='loss'",
    ):
        assert part in str(caught.value)


ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type, tuple[str, ...]]] = {
    "policy": (
        ("ignore",),
        {},
        LimitError,
        ("policy='ignore' is unknown", "'skip' or 'rollback' or 'stop' or 'raise'"),
    ),
    "every": (("rollback",), {"every": 100}, LimitError, ("every= is no cadence", "ft.every(steps=50)")),
    "skip every": (
        ("skip",),
        {"every": ft.every(steps=5)},
        LimitError,
        ('"skip" looks after every step', "every=every(steps=5)", 'spike_guard("rollback"', "ft.with_skip(step)"),
    ),
    "limit": (("skip",), {"limit": 0}, LimitError, ("limit=0 makes no sense", "an integer >= 1", "limit=1")),
    "half a limit": (("skip",), {"limit": 1.5}, LimitError, ("limit=1.5 makes no sense",)),
    "window": (("stop",), {"window": 1}, LimitError, ("window=1 makes no sense", "window=128")),
    "warmup": (("stop",), {"warmup": 0}, LimitError, ("warmup=0 makes no sense",)),
    "factor": (("stop",), {"factor": -2.0}, LimitError, ("factor=-2.0 makes no sense",)),
    "atol": (("stop",), {"atol": math.nan}, LimitError, ("atol=nan makes no sense",)),
    "nonfinite": (("stop",), {"nonfinite": "no"}, LimitError, ("nonfinite= is True or False",)),
    "monitor": (("stop",), {"monitor": None}, ArgumentError, ("monitor= is a name", 'monitor="loss"')),
    "name": (("stop",), {"name": ""}, ArgumentError, ("name= is a name",)),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_make_no_sense(name: str) -> None:
    positional, options, kind, expected = ARGUMENTS[name]
    with pytest.raises(kind) as caught:
        guard(*positional, **options)
    for part in ("ft.hooks.spike_guard", *expected):
        assert part in str(caught.value)
