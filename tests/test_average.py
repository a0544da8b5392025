"""Averages against torch.optim.swa_utils, inside compiled steps, and in evaluation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import ftrain as ft
from ftrain.errors import DataError, LimitError, ModelError, StateError

from .corpus import MODELS
from .test_laws import bits


def by_hand(case: Any, averager: Any, steps: int, start: int = 0, every: int = 1) -> tuple[nn.Module, Any]:
    model = case.model(torch.float64)
    average = averager(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number, batch in enumerate(case.batches(steps, dtype=torch.float64), start=1):
        optimizer.zero_grad()
        out = case.loss_fn(model, batch)
        (out[0] if isinstance(out, tuple) else out).backward()
        optimizer.step()
        if number >= start and (number - start) % every == 0:
            average.update_parameters(model)
    return model, average.module


def with_average(case: Any, wrap: Any, steps: int) -> tuple[Any, ft.TrainState]:
    model, tx = case.model(torch.float64), ft.optim.sgd(0.1)
    step = wrap(ft.train_step(model, case.loss_fn, tx))
    state = step.init(ft.init(model, tx))
    for batch in case.batches(steps, dtype=torch.float64):
        state, _ = step(state, batch)
    return step, state


def compare(state: ft.TrainState, name: str, module: nn.Module) -> None:
    moved = 0.0
    for key, p in module.named_parameters():
        torch.testing.assert_close(state.extra[name].params[key], p.detach(), rtol=1e-12, atol=1e-13)
        moved = max(moved, (state.params[key] - p).abs().max().item())
    assert moved > 1e-4, "the average is where the parameters are"
    for key, b in module.named_buffers():
        if b.is_floating_point():  # torch averages counts as well, and cuts the result to an integer
            torch.testing.assert_close(state.extra[name].buffers[key], b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("model", ["two_heads", "conv_bn"])
def test_ema_is_torchs(model: str) -> None:
    case = MODELS[model]

    def averager(m: nn.Module) -> Any:
        return swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)

    _, state = with_average(case, lambda step: ft.with_ema(step, 0.9), 12)
    compare(state, "ema", by_hand(case, averager, 12)[1])
    assert int(state.extra["ema"].count) == 12


@pytest.mark.parametrize(("start", "every"), [(0, 1), (5, 1), (4, 3)])
def test_swa_is_torchs(start: int, every: int) -> None:
    case = MODELS["conv_bn"]
    _, state = with_average(case, lambda step: ft.with_swa(step, start=start, every=every), 12)
    average = by_hand(case, swa_utils.AveragedModel, 12, start, every)[1]
    for key, p in average.named_parameters():
        torch.testing.assert_close(state.extra["swa"].params[key], p.detach(), rtol=1e-12, atol=1e-13)


def test_update_bn_is_torchs() -> None:
    case = MODELS["conv_bn"]
    data = case.batches(5, dtype=torch.float64)
    step, state = with_average(case, lambda step: ft.with_swa(step, start=3), 12)
    _, average = by_hand(case, swa_utils.AveragedModel, 12, 3)
    swa_utils.update_bn([batch["x"] for batch in data], average)
    new = ft.update_bn(case.model(torch.float64), state, data, lambda model, batch: model(batch["x"]), params="swa")
    assert bits(new.params) == bits(state.params)
    for key, b in average.named_buffers():
        torch.testing.assert_close(new.extra["swa"].buffers[key], b, rtol=1e-10, atol=1e-12)
    again = ft.update_bn(case.model(torch.float64), state, data, lambda model, batch: model(batch["x"]), params="swa")
    assert bits(again) == bits(new)
    own = ft.update_bn(case.model(torch.float64), state, data, lambda model, batch: model(batch["x"]))
    assert bits(own.buffers) != bits(state.buffers)
    step(new, data[0])  # its form is what it was


def test_warm_up_lets_the_beginning_go() -> None:
    case = MODELS["two_heads"]
    expected = None
    model, tx = case.model(torch.float64), ft.optim.sgd(0.1)
    step = ft.with_ema(ft.train_step(model, case.loss_fn, tx), 0.999, warmup=True)
    state = step.init(ft.init(model, tx))
    for count, batch in enumerate(case.batches(6, dtype=torch.float64)):
        state, _ = step(state, batch)
        p = state.params["one.weight"]
        d = min(0.999, (1 + count) / (10 + count))
        expected = p if expected is None else d * expected + (1 - d) * p
    torch.testing.assert_close(state.extra["ema"].params["one.weight"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "wrap", [lambda s: ft.with_ema(s, 0.9, every=2), lambda s: ft.with_swa(s, start=2)], ids=["ema", "swa"]
)
def test_the_step_inside_is_bitwise_the_step(wrap: Any) -> None:
    case = MODELS["mlp"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    plain = ft.train_step(model, case.loss_fn, tx)
    step = wrap(plain)
    one = ft.init(model, tx)
    two = step.init(one)
    for batch in case.batches(4):
        one, m = plain(one, batch)
        two, n = step(two, batch)
        assert bits((one.params, one.opt, one.buffers)) == bits((two.params, two.opt, two.buffers))
        assert {k: float(v.compute()) for k, v in m.items()} == {k: float(v.compute()) for k, v in n.items()}


@pytest.mark.parametrize("model", ["mlp", "conv_bn"])
def test_laws_of_an_averaged_step(model: str) -> None:
    case = MODELS[model]
    module, tx = case.model(), ft.optim.adam(1e-2)
    step = ft.with_swa(ft.with_ema(ft.train_step(module, case.loss_fn, tx), 0.9), start=1, every=2)
    state = step.init(ft.init(module, tx))
    ft.testing.check_step(step, state, case.batch(), backend="aot_eager")
    fast = ft.compile(step, backend="eager")
    for batch in case.batches(3):
        state, _ = fast(state, batch)
    assert (fast.rung, fast.compiles, int(state.extra["ema"].count), int(state.extra["swa"].count)) == ("step", 1, 3, 2)


def test_evaluation_takes_the_average_by_name() -> None:
    case = MODELS["conv_bn"]
    _step, state = with_average(case, lambda step: ft.with_ema(step, 0.9), 6)
    model = case.model(torch.float64)
    own, average = (
        ft.evaluate(
            state, ft.eval_step(model, _metrics, params=params), case.batches(2, dtype=torch.float64), compile=False
        )
        for params in (None, "ema")
    )
    module = ft.to_module(model, state, params="ema").eval()
    with torch.no_grad():
        logits = [module(batch["x"]) for batch in case.batches(2, dtype=torch.float64)]
    assert average["mean"] == pytest.approx(float(torch.cat(logits).mean()), rel=1e-12)
    assert own["mean"] != average["mean"]
    outputs = list(
        ft.predict(
            state,
            ft.predict_step(model, lambda m, b: m(b["x"]), params="ema"),
            case.batches(2, dtype=torch.float64),
            compile=False,
        )
    )
    torch.testing.assert_close(torch.cat(outputs), torch.cat(logits))


def _metrics(model: nn.Module, batch: Any) -> Any:
    return {"mean": model(batch["x"]).mean()}


def test_fit_carries_the_average_and_evaluates_it() -> None:
    case = MODELS["mlp"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    step = ft.with_ema(ft.train_step(model, case.loss_fn, tx), 0.9)
    evals = {
        name: ft.Evaluator(ft.eval_step(model, _metrics, params=params), case.batches(2))
        for name, params in (("raw", None), ("ema", "ema"))
    }
    result = ft.fit(ft.init(model, tx), step, case.batches(6), epochs=2, evals=evals, progress=False, backend="eager")
    assert result.history["raw/mean"][-1] != result.history["ema/mean"][-1]
    assert int(result.state.extra["ema"].count) == 12


def test_half_precision_is_averaged_in_float32() -> None:
    model, tx = nn.Linear(1, 1, bias=False), ft.optim.sgd(1e-3)
    step = ft.with_ema(ft.train_step(model, lambda m, b: m(b).mean(), tx, precision="bf16-true"), 0.999)
    state = step.init(ft.init(model, tx, precision="bf16-true"))
    assert state.extra["ema"].params["weight"].dtype == torch.float32
    new, _ = step(state, torch.ones(2, 1))
    found = ft.eval_step(model, lambda m, b: {"w": m.weight.sum()}, params="ema", precision="bf16-true")(
        new, torch.ones(2, 1)
    )
    assert found["w"].compute().dtype == torch.float32


def test_a_step_without_init_and_a_hand_written_one_can_be_averaged() -> None:
    model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
    inner = ft.train_step(model, lambda m, b: m(b).square().mean(), tx)

    def step(state: ft.TrainState, batch: Any) -> Any:
        return inner(state, batch)

    wrapped = ft.with_ema(step)
    result = ft.fit(ft.init(model, tx), wrapped, [torch.ones(4, 2)] * 3, compile=False, progress=False)
    assert int(result.state.extra["ema"].count) == 3


# -- bad input ----------------------------------------------------------------------------------------------------------------


def test_names_of_averages_that_are_not_there() -> None:
    case = MODELS["mlp"]
    _step, state = with_average(case, lambda step: ft.with_ema(step, 0.9, name="slow"), 1)
    model = case.model(torch.float64)
    text = r"the state has no averaged parameters 'ema'\.\n  expected: one of: slow"
    for call in (
        lambda: ft.eval_step(model, _metrics, params="ema")(state, case.batch(dtype=torch.float64)),
        lambda: ft.to_module(model, state, params="ema"),
        lambda: ft.update_bn(model, state, [], params="ema"),
    ):
        with pytest.raises((StateError, ModelError), match=text):
            call()


def test_a_state_without_the_average() -> None:
    model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
    step = ft.with_ema(ft.train_step(model, lambda m, b: m(b).mean(), tx))
    text = r"the state has no average 'ema'\.(.|\n)*state\.extra\['ema'\](.|\n)*step\.init\(state\)"
    for run in (step, ft.compile(step, backend="eager")):
        with pytest.raises(StateError, match=text):
            run(ft.init(model, tx), torch.ones(2, 2))


def test_a_compiled_step_cannot_be_wrapped() -> None:
    model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
    fast = ft.compile(ft.train_step(model, lambda m, b: m(b).mean(), tx), backend="eager")
    with pytest.raises(
        StateError, match=r"ft\.with_ema wants a step that is not compiled(.|\n)*ft\.compile\(ft\.with_ema"
    ):
        ft.with_ema(fast)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: ft.with_ema(s, 1.5),
        lambda s: ft.with_ema(s, -0.1),
        lambda s: ft.with_ema(s, every=0),
        lambda s: ft.with_swa(s, start=-1),
        lambda s: ft.with_swa(s, start=1, every=1.5),
    ],
)
def test_times_and_decays_that_make_no_sense(make: Any) -> None:
    with pytest.raises(LimitError, match=r"(makes no sense|is above 1|is negative)\.?"):
        make(lambda state, batch: (state, {}))


def test_update_bn_without_batch_norm_or_without_data() -> None:
    case = MODELS["two_heads"]
    state = ft.init(case.model(), ft.optim.sgd(0.1))
    with pytest.raises(ModelError, match="TwoHeads has no batch norm with running statistics"):
        ft.update_bn(case.model(), state, case.batches(1))
    model = nn.BatchNorm1d(2)
    state = ft.init(copy.deepcopy(model), ft.optim.sgd(0.1))
    with pytest.raises(DataError, match="the data has no batches"):
        ft.update_bn(model, state, [])
