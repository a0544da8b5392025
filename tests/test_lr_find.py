"""`ft.lr_find`: its losses are those of a loop by hand, nothing of the caller's is touched, and its suggestion can be trained with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain import tree
from ftrain.tune.learning_rates import READ

QUIET = {"progress": False, "compile": False}


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def problem(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    return {"x": x, "y": x @ torch.tensor([[1.0], [-2.0], [0.5]])}


def batches(count=40, rows=8):
    data = problem(count * rows)
    return [{name: leaf[i * rows : (i + 1) * rows] for name, leaf in data.items()} for i in range(count)]


def made(factory=ft.optim.sgd, dropout=0.0, **hyper):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1))
    tx = ft.optim.inject(factory)(**(hyper or {"lr": 0.1}))
    return ft.init(model, tx, seed=1), ft.train_step(model, squared, tx)


def by_hand(state, step, data, rates):
    losses = []
    for rate, batch in zip(rates, data, strict=True):
        lr = torch.tensor(rate, dtype=torch.float64)
        state = state.replace(opt=state.opt._replace(hyper={**state.opt.hyper, "lr": lr}))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].compute()))
    return losses


@pytest.mark.parametrize("mode", ["exponential", "linear"])
@pytest.mark.parametrize("factory", [ft.optim.sgd, ft.optim.adamw], ids=["sgd", "adamw"])
def test_the_losses_are_those_of_a_loop_by_hand(mode, factory):
    state, step = made(factory, dropout=0.5)
    data = batches(23)
    curve = ft.lr_find(state, step, data, steps=23, mode=mode, min_lr=1e-5, max_lr=0.5, stop_factor=None, **QUIET)
    expected = np.geomspace(1e-5, 0.5, 23) if mode == "exponential" else np.linspace(1e-5, 0.5, 23)
    np.testing.assert_allclose(curve.rates, expected, rtol=1e-12)
    assert curve.losses.tolist() == by_hand(state, step, data, curve.rates.tolist())
    assert len(set(curve.losses.tolist())) == 23


def test_nothing_of_the_callers_is_touched(rng_guard):
    state, step = made(ft.optim.adamw, dropout=0.5)
    before = [leaf.clone() for leaf in tree.leaves(state)]
    kept = state.counters()
    with rng_guard():
        first = ft.lr_find(state, step, problem(), batch_size=8, **QUIET)
        second = ft.lr_find(state, step, problem(), batch_size=8, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(state), strict=True))
    assert state.counters() == kept
    assert first.losses.tolist() == second.losses.tolist()


def test_a_later_run_is_as_without_it():
    state, step = made(ft.optim.adamw, dropout=0.5)
    plain = ft.fit(state, step, batches(10), **QUIET)
    state, step = made(ft.optim.adamw, dropout=0.5)
    ft.lr_find(state, step, batches(10), steps=30, **QUIET)
    after = ft.fit(state, step, batches(10), **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(plain.state), tree.leaves(after.state), strict=True))


def test_the_suggestion_on_a_quadratic_is_stable():
    # loss = c w^2 / 2 is stable under SGD for rates below 2 / c
    for curvature in (0.5, 10.0, 200.0):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 1.0)
        tx = ft.optim.inject(ft.optim.sgd)(lr=0.1)
        step = ft.train_step(model, lambda model, x, c=curvature: 0.5 * c * model(x).square().mean(), tx)
        curve = ft.lr_find(ft.init(model, tx), step, [torch.ones(1, 1)], max_lr=10.0, **QUIET)
        assert 1e-3 / curvature < curve.suggestion() < 2 / curvature, curvature


def test_noise_at_the_beginning_is_not_taken_for_a_descent():
    # The average of few noisy losses moves more than that of many: the steepest of all places was often among the first few.
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0.0, 1.0, 100)
        rates = np.geomspace(1e-8, 1.0, 100)
        losses = 3.0 / (1.0 + rates / 3e-2) + noise
        average = weight = 0.0
        smoothed = []
        for loss in losses:
            average, weight = 0.98 * average + 0.02 * loss, 0.98 * weight + 0.02
            smoothed.append(average / weight)
        curve = ft.tune.LrCurve(rates, losses, np.array(smoothed), 0.98, "exponential", False)
        assert 1e-4 < curve.suggestion() <= 1.0, seed


def test_several_groups_are_all_set():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    slow, fast = (ft.optim.inject(ft.optim.sgd)(lr=rate) for rate in (0.01, 0.1))
    groups = ft.optim.partition({"0.*": "first", "*": "rest"}, {"first": slow, "rest": fast})
    one = ft.optim.inject(ft.optim.sgd)(lr=0.5)
    data = batches(15)
    given = {"steps": 15, "max_lr": 0.1, **QUIET}
    several = ft.lr_find(ft.init(model, groups), ft.train_step(model, squared, groups), data, **given)
    single = ft.lr_find(ft.init(model, one), ft.train_step(model, squared, one), data, **given)
    assert several.losses.tolist() == single.losses.tolist()


def test_another_hyper_parameter():
    state, step = made(ft.optim.sgd, lr=0.1, momentum=0.9)
    curve = ft.lr_find(
        state, step, batches(5), steps=5, hyper="momentum", min_lr=0.1, max_lr=0.9, mode="linear", **QUIET
    )
    lr_curve = ft.lr_find(state, step, batches(5), steps=5, min_lr=0.1, max_lr=0.9, mode="linear", **QUIET)
    assert curve.losses.tolist()[0] == lr_curve.losses.tolist()[0]
    assert curve.losses.tolist() != lr_curve.losses.tolist()


def test_it_ends_where_the_loss_explodes():
    state, step = made()
    curve = ft.lr_find(state, step, problem(), batch_size=8, steps=100, min_lr=1e-4, max_lr=1e6, smooth=0.5, **QUIET)
    assert curve.diverged
    assert len(curve) < 100
    assert (curve.smoothed[:-1] <= 4 * np.minimum.accumulate(curve.smoothed)[:-1]).all()
    assert not math.isfinite(curve.losses[-1]) or curve.smoothed[-1] > 4 * curve.smoothed[:-1].min()
    whole = ft.lr_find(
        state, step, problem(), batch_size=8, steps=100, min_lr=1e-4, max_lr=1e6, smooth=0.5, stop_factor=None, **QUIET
    )
    assert len(whole) == 100
    assert not whole.diverged
    assert whole.losses.tolist()[: len(curve)] == curve.losses.tolist()


@pytest.mark.parametrize("interval", [1, 7, 1000])
def test_where_it_ends_does_not_depend_on_how_often_losses_are_read(interval, monkeypatch):
    state, step = made()
    given = {"batch_size": 8, "steps": 100, "min_lr": 1e-4, "max_lr": 1e4, "smooth": 0.5, **QUIET}
    usual = ft.lr_find(state, step, problem(), **given)
    monkeypatch.setattr("ftrain.tune.learning_rates.READ", interval)
    other = ft.lr_find(state, step, problem(), **given)
    assert usual.diverged
    assert other.losses.tolist() == usual.losses.tolist()
    assert READ == 10


def test_a_loss_that_becomes_nan_ends_it_and_is_left_out_of_the_suggestion():
    state, step = made()
    data = batches(40)
    data[25] = {"x": data[25]["x"] * math.nan, "y": data[25]["y"]}
    curve = ft.lr_find(state, step, data, steps=40, min_lr=1e-4, max_lr=1e-1, **QUIET)
    assert curve.diverged
    assert len(curve) == 26
    assert math.isnan(curve.losses[-1])
    assert math.isnan(curve.smoothed[-1])
    assert math.isfinite(curve.suggestion())
    assert curve.plot().axes[0].get_xscale() == "log"


def test_negative_losses_do_not_end_it():
    model, tx = nn.Linear(1, 1), ft.optim.inject(ft.optim.sgd)(lr=0.1)
    step = ft.train_step(model, lambda model, x: model(x).square().mean() - 5.0, tx)
    curve = ft.lr_find(ft.init(model, tx), step, [torch.ones(2, 1)] * 10, steps=30, max_lr=0.1, **QUIET)
    assert len(curve) == 30
    assert not curve.diverged


def test_the_average_is_as_published():
    state, step = made()
    curve = ft.lr_find(state, step, batches(20), steps=20, max_lr=1e-2, smooth=0.9, **QUIET)
    average, expected = 0.0, []
    for i, loss in enumerate(curve.losses, start=1):
        average = 0.9 * average + 0.1 * loss
        expected.append(average / (1 - 0.9**i))
    np.testing.assert_allclose(curve.smoothed, expected, rtol=1e-12)
    raw = ft.lr_find(state, step, batches(20), steps=20, max_lr=1e-2, smooth=0.0, **QUIET)
    assert raw.smoothed.tolist() == raw.losses.tolist()


def test_a_compiled_step_is_compiled_once_and_serves_fit():
    state, step = made(ft.optim.adamw)
    fast = ft.compile(step, backend="eager")
    data = batches(12)
    curve = ft.lr_find(state, fast, data, steps=12, max_lr=0.1, progress=False)
    assert (fast.compiles, fast.rung) == (1, "step")
    np.testing.assert_allclose(curve.losses, by_hand(state, step, data, curve.rates.tolist()), rtol=1e-5)
    ft.fit(state, fast, data, progress=False)
    assert fast.compiles == 1


def test_short_data_is_begun_anew_and_an_iterator_ends_it():
    state, step = made()
    given = {"steps": 25, "max_lr": 1e-2, **QUIET}
    again = ft.lr_find(state, step, batches(10), **given)
    assert again.losses.tolist() == by_hand(state, step, (batches(10) * 3)[:25], again.rates.tolist())
    short = ft.lr_find(state, step, iter(batches(13)), **given)
    assert short.losses.tolist() == again.losses.tolist()[:10] + short.losses.tolist()[10:]
    assert len(short) == 13
    assert not short.diverged


def test_reads_of_the_device_are_few(monkeypatch):
    state, step = made()
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or original(self))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ft.lr_find(state, step, batches(50), steps=50, max_lr=1e-2, **QUIET)
    scalars = sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")
    # The counters, and losses at steps 1, 10, 20, 30, 40 and 50.
    assert len([shape for shape in reads if shape]) == 7
    assert scalars == 0


def test_what_is_shown(capsys):
    state, step = made()
    curve = ft.lr_find(state, step, batches(30), steps=30, min_lr=1e-4, max_lr=1e-1, compile=False)
    assert "lr" in capsys.readouterr().out
    assert repr(curve).startswith("LrCurve(30 steps, exponential from 0.0001 to 0.1; suggestion ")
    tiny = ft.lr_find(state, step, batches(5), steps=5, **QUIET)
    assert repr(tiny).endswith("no suggestion)")
    with pytest.raises(ValueError, match="read-only"):
        curve.losses[0] = 1.0


def test_the_plot_is_saved(tmp_path):
    state, step = made()
    curve = ft.lr_find(state, step, batches(30), steps=30, min_lr=1e-4, max_lr=1e-1, **QUIET)
    figure = curve.plot(tmp_path / "new" / "curve.png")
    assert (tmp_path / "new" / "curve.png").stat().st_size > 1000
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["loss", "smoothed", f"suggestion {curve.suggestion():.3g}"]


def test_too_little_to_suggest_anything():
    state, step = made()
    with pytest.raises(ft.errors.ArgumentError, match="too few steps are left to see where the loss falls"):
        ft.lr_find(state, step, batches(5), steps=5, **QUIET).suggestion()
    rates = np.geomspace(1e-3, 1.0, 20)
    with pytest.raises(ft.errors.ArgumentError, match="the loss falls at none of these rates"):
        ft.tune.LrCurve(rates, rates + 1, rates + 1, 0.0, "exponential", False).suggestion()


def test_an_lr_that_is_a_constant_shows_the_fix():
    model, tx = nn.Linear(3, 1), ft.optim.sgd(0.1)
    with pytest.raises(ft.errors.HookError, match=r"ft\.lr_find finds no hyper-parameter 'lr'[\s\S]*ft.optim.inject"):
        ft.lr_find(ft.init(model, tx), ft.train_step(model, squared, tx), batches(2), **QUIET)
    tx = ft.optim.inject(ft.optim.sgd)(lr=ft.schedules.linear(0.1, 0.0, 10))
    with pytest.raises(ft.errors.HookError, match=r"ft\.lr_find and a schedule both set 'lr'"):
        ft.lr_find(ft.init(model, tx), ft.train_step(model, squared, tx), batches(2), **QUIET)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"min_lr": 1.0, "max_lr": 0.1}, ft.errors.LimitError, "0 < min_lr < max_lr"),
        ({"min_lr": -1.0}, ft.errors.LimitError, "0 < min_lr < max_lr"),
        ({"max_lr": math.inf}, ft.errors.ArgumentError, "max_lr=inf is no learning rate"),
        ({"min_lr": "1e-3"}, ft.errors.ArgumentError, "min_lr='1e-3' is no learning rate"),
        (
            {"steps": 1},
            ft.errors.LimitError,
            r"steps=1 makes no sense[\s\S]*integer >= 2[\s\S]*got: +1\n +fix: .*steps=100",
        ),
        (
            {"mode": "exp"},
            ft.errors.LimitError,
            r"no mode='exp'[\s\S]*expected: 'exponential', 'linear'[\s\S]*fix: +ft.lr_find\(..., mode='exponential'\)",
        ),
        ({"mode": 3}, ft.errors.LimitError, r"no mode=3[\s\S]*mode='exponential'"),
        ({"smooth": 1.0}, ft.errors.LimitError, "0 <= smooth < 1"),
        ({"stop_factor": 0.5}, ft.errors.LimitError, "would end the run at once"),
    ],
)
def test_arguments_that_make_no_sense(given, error, text):
    state, step = made()
    with pytest.raises(error, match=text):
        ft.lr_find(state, step, batches(2), **QUIET, **given)


def test_a_step_without_a_loss_and_a_first_loss_of_nan():
    state, step = made()
    with pytest.raises(ft.errors.MetricError, match="the step gives no loss"):
        ft.lr_find(state, lambda state, batch: (step(state, batch)[0], {}), batches(2), **QUIET)
    data = [{"x": batches(1)[0]["x"] * math.nan, "y": batches(1)[0]["y"]}]
    with pytest.raises(ft.errors.LossError, match="the loss is nan at the first step, before any update"):
        ft.lr_find(state, step, data, **QUIET)
