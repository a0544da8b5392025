"""`ft.with_skip`: the rule value by value, a step that is skipped leaves the state, and one that is not is the step inside."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain as ft
from ftrain.errors import ArgumentError, LimitError, MetricError, StateError
from ftrain.steps.spikes import Watch, enter, first_watch, judge, make_rule

from .corpus import MODELS, OPTIMIZERS
from .test_hand_written import Gan, gan_batches, gan_step, gan_tx
from .test_laws import bits

CPU = torch.device("cpu")


def rule(**options: Any) -> Any:
    return make_rule(
        "a test", **{"window": 8, "factor": 6.0, "warmup": None, "atol": 0.0, "nonfinite": True, **options}
    )


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ the rule


@given(
    st.lists(st.floats(-100, 100) | st.sampled_from([math.nan, math.inf, -math.inf, 1e6]), min_size=1, max_size=40),
    st.tuples(st.integers(2, 6), st.integers(2, 8)),
    st.sampled_from([0.0, 1.5, 6.0]),
    st.sampled_from([0.0, 10.0]),
    st.booleans(),
)
def test_the_rule_is_its_equation(
    values: list[float], counts: tuple[int, int], factor: float, atol: float, nonfinite: bool
) -> None:
    window, warmup = counts
    own = rule(window=window, warmup=warmup, factor=factor, atol=atol, nonfinite=nonfinite)
    watch, kept, seen = first_watch(own, CPU), [], 0
    for value in values:
        found = judge(own, watch, scalar(value))
        mean = statistics.fmean(kept) if kept else 0.0
        deviation = statistics.stdev(kept) if len(kept) > 1 else 0.0
        edge = mean + max(factor * deviation, atol)
        if not math.isclose(value, edge, rel_tol=1e-9, abs_tol=1e-9):
            assert found.bad.item() == ((seen >= warmup and value > edge) or (nonfinite and not math.isfinite(value)))
        assert found.mean.item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert found.deviation.item() == pytest.approx(deviation, rel=1e-9, abs=1e-9)
        before, watch = watch, enter(watch, scalar(value), ~found.bad)
        if not found.bad and math.isfinite(value):
            kept, seen = [*kept, value][-window:], seen + 1
        else:
            assert bits(watch) == bits(before)
        assert watch.seen.item() == seen
        assert sorted(watch.values.tolist()) == sorted(kept + [0.0] * (window - len(kept)))


def test_no_deviation_and_a_little_more_is_a_spike_unless_atol_says_no() -> None:
    watch = Watch(torch.ones(4, dtype=torch.float64), torch.tensor(4))
    assert judge(rule(window=4), watch, scalar(1.0 + 1e-9)).bad
    assert not judge(rule(window=4), watch, scalar(1.0)).bad
    assert not judge(rule(window=4, atol=0.5), watch, scalar(1.5)).bad
    assert judge(rule(window=4, atol=0.5), watch, scalar(1.5001)).bad
    assert not judge(rule(window=4, factor=math.inf), watch, scalar(1e30)).bad


# -------------------------------------------------------------------------------------------------- what is not skipped


def made(
    model: str = "mlp", optimizer: str = "adamw_clip_warmup", wrap: Any = None, accumulate: int = 2, **options: Any
) -> Any:
    """The case, the step inside, the step that skips, and a state for the latter."""
    case, tx = MODELS[model], OPTIMIZERS[optimizer]()
    module = case.model()
    plain = ft.train_step(module, case.loss_fn, tx, accumulate=accumulate)
    plain = plain if wrap is None else wrap(plain)
    step = ft.with_skip(plain, **options)
    return case, plain, step, step.init(ft.init(module, tx, seed=3))


def parts(state: ft.TrainState) -> list[bytes]:
    extra = {name: value for name, value in state.extra.items() if name != "skip"}
    return bits((state.params, state.frozen, state.buffers, state.opt, extra))


@pytest.mark.parametrize("model", ["mlp", "conv_bn", "frozen", "gpt"])
def test_where_nothing_is_skipped_it_is_the_step_inside(model: str) -> None:
    case, plain, step, two = made(model, wrap=lambda step: ft.with_ema(step, 0.9))
    one = plain.init(two.replace(extra={}))
    for batch in case.batches(4):
        one, m = plain(one, batch)
        two, n = step(two, batch)
        assert parts(one) == parts(two)
        assert one.counters() == two.counters()
        assert n.keys() - m.keys() == {"skipped"}
        assert bits(m) == bits({name: n[name] for name in m})
    assert (two.extra["skip"].skipped, two.extra["skip"].watch.seen) == (0, 4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "conv_bn", "frozen"])
def test_a_skipped_step_leaves_everything_but_the_counters(model: str, optimizer: str) -> None:
    case, _, step, state = made(model, optimizer, wrap=lambda step: ft.with_ema(step, 0.9))
    for batch in case.batches(2):
        state, _ = step(state, batch)
    bad = {**case.batch(), "x": case.batch()["x"] * math.nan}
    new, metrics = step(state, bad)
    assert parts(new) == parts(state)
    assert bits(new.extra["skip"].watch) == bits(state.extra["skip"].watch)
    assert (new.counters().step, new.counters().samples) == (3, 24)
    assert (new.extra["skip"].skipped, new.extra["skip"].row) == (1, 1)
    assert metrics["skipped"].compute() == 1
    moved, _ = step(new, case.batch())
    assert bits(moved.params) != bits(new.params)
    assert (moved.extra["skip"].skipped, moved.extra["skip"].row) == (1, 0)


def steps_of(step: Any, state: Any, batches: list[Any]) -> tuple[Any, list[Any]]:
    told = []
    for batch in batches:
        state, metrics = step(state, batch)
        told.append(metrics)
    return state, told


def quadratic(**options: Any) -> Any:
    """A step whose loss is what the batch says, beside a gradient of ones."""
    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.1, momentum=0.9)

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        own = sum(p.sum() for p in model.parameters())
        return own - own.detach() + batch.mean()

    step = ft.with_skip(ft.train_step(model, loss_fn, tx), **{"window": 8, "warmup": 4, **options})
    return step, step.init(ft.init(model, tx))


def losses(*values: float) -> list[Tensor]:
    return [torch.full((2, 1), value) for value in values]


def test_a_finite_spike_is_skipped_and_the_run_is_the_one_without_it() -> None:
    usual = (1.0, 1.1, 0.9, 1.0, 1.05)
    step, state = quadratic()
    with_it, told = steps_of(step, state, losses(*usual, 50.0, 1.0, 60.0, 0.95))
    without, _ = steps_of(step, state, losses(*usual, 1.0, 0.95))
    assert parts(with_it) == parts(without)
    assert bits(with_it.extra["skip"].watch) == bits(without.extra["skip"].watch)
    assert [m["skipped"].compute().item() for m in told] == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    early, _ = steps_of(step, state, losses(1.0, 1.1, 50.0))  # no warm-up yet
    assert early.extra["skip"].skipped == 0


def test_metrics_of_a_skipped_step_count_nothing() -> None:
    step, state = quadratic()
    _, told = steps_of(step, state, losses(1.0, 3.0, math.nan, math.inf, 5.0))
    merged = told[0]["loss"]
    for metrics in told[1:]:
        merged = merged.merge(metrics["loss"])
    assert merged.compute() == 3.0
    result = ft.fit(state, step, losses(1.0, 3.0, math.nan, 5.0), progress=False, compile=False)
    assert dict(result.history[-1].metrics)["loss"] == 3.0
    assert dict(result.history[-1].metrics)["skipped"] == 1.0


def test_metrics_of_every_kind_keep_their_form() -> None:
    kinds = {
        "mean": ft.metrics.Mean(torch.tensor(2), torch.tensor(2)),
        "sum": ft.metrics.Sum(torch.tensor(3)),
        "min": ft.metrics.Min(torch.tensor(1.0)),
        "max": ft.metrics.Max(torch.tensor(1.0, dtype=torch.bfloat16)),
        "last": ft.metrics.Last(torch.tensor(4.0), torch.tensor(1.0)),
        "number": ft.metrics.Sum(2.0),
        "all": ft.metrics.Collect((torch.ones(3),)),
    }

    def fn(state: Any, batch: Tensor) -> Any:
        return state, {"loss": batch.mean(), **kinds}

    state = ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1))
    step = ft.with_skip(ft.as_step(fn))
    state = step.init(state)
    for value, skipped in ((1.0, False), (math.nan, True)):
        _, found = step(state, torch.full((2, 1), value))
        for name, metric in kinds.items():
            assert type(found[name]) is type(metric)
            empty = name != "all" and skipped
            total = metric.merge(found[name])
            expected = metric if empty else metric.merge(metric)
            assert bool((torch.as_tensor(total.compute()) == torch.as_tensor(expected.compute())).all()), name
    assert found["sum"].total.dtype == torch.int64
    assert found["max"].value.dtype == torch.bfloat16


def test_an_update_that_is_not_finite_is_skipped_though_the_loss_is() -> None:
    model, tx = nn.Linear(1, 1), ft.optim.adam(0.1)

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        own = sum(p.sum() for p in model.parameters())
        return (own - own.detach()) * batch.mean() + 1.0  # the gradient is the batch

    step = ft.with_skip(ft.train_step(model, loss_fn, tx))
    state = step.init(ft.init(model, tx))
    state, _ = step(state, torch.ones(2, 1))
    # In float32 its square overflows: the update itself is 0, and Adam's second moment would be inf for ever.
    for gradient in (math.inf, math.nan, 1e30):
        new, metrics = step(state, torch.full((2, 1), gradient))
        assert metrics["skipped"].compute() == 1, gradient
        assert parts(new) == parts(state)
    free = ft.with_skip(ft.train_step(model, loss_fn, tx), nonfinite=False)
    new, metrics = free(state, torch.full((2, 1), math.nan))
    assert metrics["skipped"].compute() == 0
    assert new.params["weight"].isnan().all()


def test_infinity_that_is_at_home_is_no_sign() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(1, 1)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.mask = self.mask * 1.0  # changed, and infinite as before
            self.calls = self.calls + 1
            return self.a(x)

    model, tx = Masked(), ft.optim.sgd(0.1)
    step = ft.with_skip(ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx))
    state, metrics = step(step.init(ft.init(model, tx)), torch.ones(2, 1))
    assert (metrics["skipped"].compute(), state.buffers["calls"]) == (0, 1)


def test_after_limit_the_level_is_a_new_one() -> None:
    step, state = quadratic(limit=3)
    usual = losses(1.0, 1.1, 0.9, 1.0, 1.0)
    state, told = steps_of(step, state, usual + losses(9.0, 9.1, 9.0, 9.2, 9.1))
    assert [m["skipped"].compute().item() for m in told[5:]] == [1, 2, 3, 3, 3]
    assert sorted(state.extra["skip"].watch.values.tolist())[-2:] == pytest.approx([9.1, 9.2])
    assert state.extra["skip"].watch.seen == 2
    _, told = steps_of(step, step.init(state.replace(extra={})), usual + losses(*[math.nan] * 6))
    assert told[-1]["skipped"].compute() == 6  # what is not finite is no level


# ---------------------------------------------------------------------------------------------- compiled, donated, others


def test_laws_of_a_step_that_skips() -> None:
    case, _, step, state = made("mlp", "sgd", wrap=lambda step: ft.with_ema(step, 0.9), accumulate=1)
    ft.testing.check_step(step, state, case.batch(), backend="eager")


@pytest.mark.parametrize("donate", [False, True])
def test_compiled_it_is_one_graph_and_skips_alike(donate: bool) -> None:
    case, _, step, state = made(window=4, warmup=2, accumulate=2 if donate else 1)
    fast = ft.compile(step, backend="aot_eager", donate=donate)
    one, two = state, state.copy()
    bad = {**case.batch(), "x": case.batch()["x"] * math.inf}
    for batch in (*case.batches(2), bad, case.batch(seed=4), bad):
        before = bits((two.params, two.opt, two.buffers))
        one, m = step(one, batch)
        two, n = fast(two, batch)
        assert m["skipped"].compute() == n["skipped"].compute()
        if batch is bad:
            assert bits((two.params, two.opt, two.buffers)) == before
    assert (fast.rung, fast.compiles) == ("step", 1)
    assert two.extra["skip"].skipped == 2
    assert two.counters() == one.counters()
    torch.testing.assert_close(two.params, one.params, rtol=1e-5, atol=1e-6)


def test_on_the_second_rung_too() -> None:
    case, _, step, state = made(optimizer="adam", accumulate=1)
    fast = ft.compile(step, backend="eager", rung="loss", donate=False)
    state, _ = fast(state, case.batch())
    new, metrics = fast(state, {**case.batch(), "x": case.batch()["x"] * math.nan})
    assert (fast.rung, metrics["skipped"].compute()) == ("loss", 1)
    assert parts(new) == parts(state)


@pytest.mark.parametrize("kind", ["alternating", "merged", "one"])
def test_two_optimizers_are_both_left_as_they_were(kind: str) -> None:
    model, tx = Gan(), gan_tx()
    step = ft.with_skip(gan_step(kind, model, tx))
    state = step.init(ft.init(model, tx))
    batches = gan_batches(3, torch.float32)
    for batch in batches[:2]:
        state, _ = step(state, batch)
    for part in ("noise", "real"):
        new, metrics = step(state, {**batches[2], part: batches[2][part] * math.nan})
        assert metrics["skipped"].compute() == 1
        assert parts(new) == parts(state)
    again, _ = step(new, batches[2])
    assert bits(again.opt["dis"]) != bits(new.opt["dis"])
    assert bits(again.opt["gen"]) != bits(new.opt["gen"])


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device() -> None:
    case, _, step, state = made()
    state, _ = step(state, case.batch())
    with Reads() as reads:
        for batch in (case.batch(), {**case.batch(), "x": case.batch()["x"] * math.nan}):
            state, metrics = step(state, batch)
    assert reads.count == 0
    assert metrics["skipped"].compute() == 1


def test_in_a_run_it_goes_on_from_a_checkpoint() -> None:
    from .test_resume import Memory, assert_same

    case = MODELS["mlp"]
    data = [*case.batches(5), {**case.batch(), "x": case.batch()["x"] * math.nan}, case.batch(seed=9)]

    def run(saver: Any = None, **more: Any) -> Any:
        _, _, step, state = made(window=4, warmup=2)
        state = state.replace(extra={})
        return ft.fit(state, step, data, epochs=2, progress=False, compile=False, checkpoint=saver, **more)

    whole = run()
    assert whole.state.extra["skip"].skipped >= 2
    saver = Memory(ft.every(steps=1))
    assert_same(run(saver), whole)
    for shot in saver.shots[3:9]:
        assert_same(run(Memory(ft.every(epochs=9), shot), resume="auto"), whole)


# ---------------------------------------------------------------------------------------------------------- wrong uses


ARGUMENTS: dict[str, tuple[dict[str, Any], type, tuple[str, ...]]] = {
    "window": ({"window": 1}, LimitError, ("window=1 makes no sense", "an integer >= 2", "window=128")),
    "half a window": ({"window": 1.5}, LimitError, ("window=1.5",)),
    "factor": ({"factor": -1}, LimitError, ("factor=-1 makes no sense", "a number >= 0", "factor=6.0")),
    "factor nan": ({"factor": math.nan}, LimitError, ("factor=nan",)),
    "factor text": ({"factor": "6"}, LimitError, ("factor='6'",)),
    "warmup": ({"warmup": 1}, LimitError, ("warmup=1", ">= 2", "warmup=64")),
    "atol": ({"atol": -0.1}, LimitError, ("atol=-0.1", "atol=0.0")),
    "nonfinite": ({"nonfinite": 1}, LimitError, ("nonfinite= is True or False",)),
    "limit": ({"limit": 0}, LimitError, ("limit=0 makes no sense", "an integer >= 1", "limit=10")),
    "limit true": ({"limit": True}, LimitError, ("limit=True",)),
    "name": ({"name": ""}, ArgumentError, ("name='' is no name",)),
    "monitor": ({"monitor": None}, ArgumentError, ("monitor=None is no name", 'monitor="loss"')),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_make_no_sense(name: str) -> None:
    options, kind, expected = ARGUMENTS[name]
    case, tx = MODELS["mlp"], ft.optim.sgd(0.1)
    with pytest.raises(kind) as caught:
        ft.with_skip(ft.train_step(case.model(), case.loss_fn, tx), **options)
    for part in ("ft.with_skip", *expected):
        assert part in str(caught.value)


def test_what_is_no_step() -> None:
    case, tx = MODELS["mlp"], ft.optim.sgd(0.1)
    plain = ft.train_step(case.model(), case.loss_fn, tx)
    with pytest.raises(ArgumentError, match=r"ft\.with_skip wants a function of the step level"):
        ft.with_skip(tx)  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"wants a step that is not compiled yet(?s:.*)ft\.compile\(ft\.with_skip"):
        ft.with_skip(ft.compile(plain, backend="eager"))
    with pytest.raises(LimitError, match=r"keeps something under the name 'skip'(?s:.*)name=\"skip_2\""):
        ft.with_skip(ft.with_skip(plain))
    with pytest.raises(LimitError, match=r"keeps something under the name 'ema'"):
        ft.with_skip(ft.with_ema(plain), name="ema")


def test_a_state_without_its_statistic_or_with_another_one() -> None:
    case, _, step, state = made()
    with pytest.raises(
        StateError, match=r"no statistic 'skip' of 128 values(?s:.*)state\.extra with nothing(?s:.*)init"
    ):
        step(state.replace(extra={}), case.batch())
    _, _, small, other = made(window=4)
    with pytest.raises(StateError, match=r"of 4 values(?s:.*)window=4(?s:.*)one of 128 values"):
        small(state, case.batch())
    small(other, case.batch())


def test_a_metric_that_the_step_does_not_give() -> None:
    case, _, step, state = made(monitor="los")
    expected = r"gives no metric 'los'(?s:.*)'loss'(?s:.*)monitor="
    with pytest.raises(MetricError, match=expected):
        step(state, case.batch())
    with pytest.raises(MetricError, match=expected):
        ft.compile(step, backend="eager", rung="step")(state.copy(), case.batch())


def test_a_metric_that_is_no_number_and_a_count_that_is_there() -> None:
    state = ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1))

    def collected(state: Any, batch: Any) -> Any:
        return state, {"loss": ft.metrics.Collect((batch,))}

    def skipped(state: Any, batch: Any) -> Any:
        return state, {"loss": batch.mean(), "skipped": batch.sum()}

    one = ft.with_skip(ft.as_step(collected))
    with pytest.raises(MetricError, match=r"'loss' is not a 0-d tensor(?s:.*)float32\[2, 1\]"):
        one(one.init(state), torch.ones(2, 1))
    two = ft.with_skip(ft.as_step(skipped))
    with pytest.raises(MetricError, match=r"has a metric 'skipped' already(?s:.*)name=\"spikes\""):
        two(two.init(state), torch.ones(2, 1))
    named = ft.with_skip(ft.as_step(skipped), name="spikes")
    _, metrics = named(named.init(state), torch.ones(2, 1))
    assert {"skipped", "skipped/spikes"} <= metrics.keys()


def test_a_run_may_begin_with_a_batch_that_is_skipped() -> None:
    step, state = quadratic()
    done = ft.fit(state, step, losses(math.nan, 1.0), progress=False, compile=False)
    assert int(done.state.extra["skip"].skipped) == 1
    assert all(bool(leaf.isfinite().all()) for leaf in done.state.params.values())
