"""Loss scaling: the sequence of scales is GradScaler's, skipped steps change nothing, and clipping sees true gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain.errors import LimitError, LossError, StateError
from ftrain.steps.loss_scale import LossScale

from .corpus import MODELS
from .test_laws import bits

SETTINGS = {"init_scale": 2.0**10, "growth_factor": 2.0, "backoff_factor": 0.25, "growth_interval": 3}


def planted(case: Any, count: int, bad: dict[int, float], dtype: torch.dtype = torch.float64) -> list[Any]:
    batches = case.batches(count, dtype=dtype)
    for at, value in bad.items():
        batches[at]["x"][0, 0] = value
    return batches


def scaled_step(case: Any, model: nn.Module, tx: ft.Transform, **kw: Any) -> Any:
    grad = ft.value_and_grad(ft.bind(model, case.loss_fn))
    return ft.make_step(ft.with_loss_scale(grad, **{**SETTINGS, **kw}), tx)


BAD = {4: float("inf"), 5: float("nan"), 11: float("-inf")}


def test_scales_and_parameters_are_those_of_torch_step_by_step() -> None:
    case = MODELS["two_heads"]
    reference = case.model(torch.float64)
    model = copy.deepcopy(reference)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(0.5), ft.optim.adamw(1e-2))
    step = scaled_step(case, model, tx)
    state = step.init(ft.init(model, tx))
    scaler = torch.amp.GradScaler("cpu", **SETTINGS)
    optimizer = torch.optim.AdamW(reference.parameters(), 1e-2)
    seen = []
    for number, batch in enumerate(planted(case, 20, BAD)):
        optimizer.zero_grad()
        scaler.scale(case.loss_fn(reference, batch)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        before = state
        state, metrics = step(state, batch)
        own: LossScale = state.extra["loss_scale"]
        assert float(own.scale) == scaler.get_scale(), number
        assert int(own.good) == scaler.state_dict()["_growth_tracker"], number
        assert float(metrics["loss_scale"].compute()) == float(before.extra["loss_scale"].scale)
        for name, p in reference.named_parameters():
            torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-10, atol=1e-12)
        if number in BAD:
            assert bits((before.params, before.opt, before.buffers)) == bits((state.params, state.opt, state.buffers))
        seen.append(float(own.scale))
    assert len(set(seen)) > 3, "the scale hardly moved"
    assert int(state.extra["loss_scale"].skipped) == len(BAD)
    assert int(state.step) == 20


@pytest.mark.parametrize("rung", ["step", "loss"])
def test_compiled_it_is_the_same(rung: Any) -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    step = scaled_step(case, model, tx)
    fast = ft.compile(step, backend="eager", rung=rung)
    one = step.init(ft.init(model, tx))
    two = one.copy()
    for batch in planted(case, 12, BAD, torch.float32):
        one, _ = step(one, batch)
        two, _ = fast(two, batch)
    assert bits(one.extra) == bits(two.extra)
    for name, p in one.params.items():
        torch.testing.assert_close(two.params[name], p)


def test_steps_that_are_skipped_are_as_if_their_batches_were_not_there() -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    step = scaled_step(case, model, tx, growth_interval=1000)
    dirty = planted(case, 12, BAD, torch.float32)
    clean = [batch for number, batch in enumerate(dirty) if number not in BAD]
    ends = [
        ft.fit(step.init(ft.init(model, tx)), step, data, progress=False, compile=False).state
        for data in (dirty, clean)
    ]
    # a scale is a power of two, so scaling itself rounds nothing
    assert bits((ends[0].params, ends[0].opt)) == bits((ends[1].params, ends[1].opt))


def test_loss_metrics_and_norm_are_those_without_a_scale() -> None:
    case = MODELS["mlp"]
    model, tx = case.model(), ft.optim.chain(ft.optim.clip_by_global_norm(0.1), ft.optim.sgd(0.1))
    plain = ft.train_step(model, case.loss_fn, tx)
    step = scaled_step(case, model, tx)
    state = ft.init(model, tx)
    one, metrics = plain(state, case.batch())
    two, own = step(step.init(state), case.batch())
    assert {name: float(own[name].compute()) for name in metrics} == {n: float(m.compute()) for n, m in metrics.items()}
    assert bits(one.params) == bits(two.params)


def test_gradients_below_the_range_of_float16_survive() -> None:
    """What it is for: a gradient of 1e-8 is zero in float16, and is not with a scale."""

    class Tiny(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g.half().float()  # the gradient on its way through a float16 layer

    model = nn.Linear(1, 1, bias=False)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (Tiny.apply(model(batch)) * 1e-8).sum()

    grad = ft.value_and_grad(ft.bind(model, loss_fn))
    state = ft.init(model, ft.optim.sgd(1.0))
    assert float(grad(state.params, {}, torch.ones(1, 1), ft.rng.key(0))[0]["weight"]) == 0.0
    wrapped = ft.with_loss_scale(grad)
    given = {"loss_scale": wrapped.init(state.params)}
    scaled, *_ = wrapped(state.params, given, torch.ones(1, 1), ft.rng.key(0))
    assert float(scaled["weight"]) == pytest.approx(1e-8, rel=1e-2)


def test_it_accumulates_and_a_bad_part_spoils_the_step_once() -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.sgd(0.1)
    grad = ft.with_accumulation(ft.value_and_grad(ft.bind(model, case.loss_fn)), 4)
    step = ft.make_step(ft.with_loss_scale(grad, **SETTINGS), tx)
    state = step.init(ft.init(model, tx))
    new, _ = step(state, planted(case, 1, {0: float("inf")}, torch.float32)[0])
    assert bits(new.params) == bits(state.params)
    assert float(new.extra["loss_scale"].scale) == SETTINGS["init_scale"] * SETTINGS["backoff_factor"]
    good, _ = step(new, case.batch())
    assert bits(good.params) != bits(new.params)


def test_a_scale_that_grew_to_infinity_stays_finite() -> None:
    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.0)
    grad = ft.value_and_grad(ft.bind(model, lambda m, b: m(b).mean() * 0.0))
    step = ft.make_step(ft.with_loss_scale(grad, init_scale=2.0**126, growth_interval=1), tx)
    state = step.init(ft.init(model, tx))
    for _ in range(4):
        state, _ = step(state, torch.ones(2, 1))
    assert float(state.extra["loss_scale"].scale) == 2.0**127


def test_fit_puts_the_scale_into_the_state_and_records_it() -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    step = scaled_step(case, model, tx)
    state = ft.init(model, tx)
    result = ft.fit(state, step, planted(case, 8, {3: float("inf")}, torch.float32), compile=False, progress=False)
    assert state.extra == {}
    assert isinstance(result.state.extra["loss_scale"], LossScale)
    assert result.history["skipped"][-1] == 1.0


# -- bad input ----------------------------------------------------------------------------------------------------------------


def test_a_state_without_a_scale() -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    step = scaled_step(case, model, tx)
    text = r"lacks what a wrapper of the step keeps in it\.\n  where: +state\.extra\['loss_scale'\](.|\n)*step\.init\(state\)"
    for run in (step, ft.compile(step, backend="eager", donate=False)):
        with pytest.raises(StateError, match=text):
            run(ft.init(model, tx), case.batch())


def test_a_wrapper_that_hides_the_scale() -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    inner = scaled_step(case, model, tx).grad_fn

    def careless(*args: Any) -> Any:
        return inner(*args)

    with pytest.raises(StateError, match=r"the state has no loss scale(.|\n)*functools\.wraps"):
        ft.make_step(careless, tx)(ft.init(model, tx), case.batch())


def test_a_gradient_by_hand_that_does_not_scale() -> None:
    def by_hand(params: Any, buffers: Any, batch: Any, rng: Any) -> Any:
        one = torch.ones(())
        return params, ft.metrics.Mean(one, one), ({}, buffers)

    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.1)
    step = ft.make_step(ft.with_loss_scale(by_hand), tx)
    with pytest.raises(LossError, match=r"does not scale the loss(.|\n)*with_loss_scale\(ft\.value_and_grad\(loss\)\)"):
        step(step.init(ft.init(model, tx)), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("init_scale", 0.0),
        ("growth_factor", 0.5),
        ("backoff_factor", 1.5),
        ("backoff_factor", 0.0),
        ("growth_interval", 0),
    ],
)
def test_factors_that_make_no_sense(argument: str, value: float) -> None:
    with pytest.raises(LimitError, match=rf"with_loss_scale: {argument} makes no sense\.(.|\n)*got: +{value}"):
        ft.with_loss_scale(lambda *a: None, **{argument: value})  # type: ignore[arg-type,return-value]
