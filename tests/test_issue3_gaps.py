"""What a fresh reading of the optimization algebra found untested: values under composition, and what the other files pass over."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ftrain as ft
from ftrain.errors import DeviceError
from ftrain.precision import as_policy, check_supported

from .corpus import MODELS
from .test_parity import deterministic

# -- wrappers that change no number, by pairs, against the step without them ------------------------------------------------------

# With float64 and a scale that is a power of two, each of these leaves the parameters what they are, up to rounding.
LOSSES: dict[str, Callable[[Any], Any]] = {
    "remat": lambda loss: ft.with_remat(loss, "trunk"),
    "precision": lambda loss: ft.with_precision(loss, "64-true"),
}
GRADIENTS: dict[str, Callable[[Any], Any]] = {
    "accumulation": lambda grad: ft.with_accumulation(grad, 4),
    "SAM of radius zero": lambda grad: ft.with_sam(grad, rho=0.0),
    "statistics": lambda grad: ft.with_grad_stats(grad, statistics=("norm", "max", "zeros")),
    "loss scale": lambda grad: ft.with_loss_scale(grad, init_scale=2.0**12),
}
UPDATES: dict[str, Callable[[Any], Any]] = {
    "clip": lambda tx: ft.optim.chain(ft.optim.clip_by_global_norm(1e6), tx),
    "freeze nothing": lambda tx: ft.optim.chain(tx, ft.optim.freeze(lambda path, p: False)),
    "master weights": ft.optim.master_weights,
    "stochastic rounding": ft.optim.stochastic_rounding,
    "skip": ft.optim.skip_nonfinite,
}
STEPS: dict[str, Callable[[Any], Any]] = {
    "EMA": lambda step: ft.with_ema(step, 0.9),
    "SWA": lambda step: ft.with_swa(step, start=1),
}
NEUTRAL = [*LOSSES, *GRADIENTS, *UPDATES, *STEPS]


def wrapped(inner: Any, wrappers: dict[str, Callable[[Any], Any]], on: set[str]) -> Any:
    for name, wrap in wrappers.items():
        inner = wrap(inner) if name in on else inner
    return inner


def composed(on: set[str]) -> tuple[Any, ft.TrainState]:
    """A step and a state with two optimizers and the wrappers that are on, in the documented order."""
    case = MODELS["two_heads"]
    model = deterministic(case.model(torch.float64))
    groups = {"trunk": ft.optim.adamw(1e-2), "heads": ft.optim.sgd(0.05, momentum=0.9)}
    tx = wrapped(ft.optim.partition({"trunk.*": "trunk", "*": "heads"}, groups), UPDATES, on)
    loss = wrapped(ft.bind(model, case.loss_fn), LOSSES, on)
    grad = wrapped(ft.value_and_grad(loss), GRADIENTS, on)
    step = wrapped(ft.make_step(grad, tx), STEPS, on)
    return step, step.init(ft.init(model, tx))


def trained(on: set[str]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The parameters after three steps, and the metrics of the last."""
    step, state = composed(on)
    for batch in MODELS["two_heads"].batches(3, dtype=torch.float64):
        state, metrics = step(state, batch)
    return state.params, {name: float(metric.compute()) for name, metric in metrics.items()}


@pytest.mark.parametrize("pair", [*itertools.combinations(NEUTRAL, 2), tuple(NEUTRAL)], ids="+".join)
def test_wrappers_that_change_nothing_change_nothing_together(pair: tuple[str, ...]) -> None:
    start = composed(set())[1].params
    plain, told = trained(set())
    both, metrics = trained(set(pair))
    for name, p in plain.items():
        moved = (p - start[name]).abs().max()
        assert moved > 1e-3
        assert (both[name] - p).abs().max() < 1e-9 * moved, name
    for name, value in told.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


def test_the_comparison_sees_a_wrapper_that_changes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UPDATES, "clip", lambda tx: ft.optim.chain(ft.optim.clip_by_global_norm(1e-3), tx))
    with pytest.raises(AssertionError):
        test_wrappers_that_change_nothing_change_nothing_together(("clip", "skip"))


def test_statistics_inside_of_a_loss_scale_are_those_of_the_loss() -> None:
    one, two = trained({"statistics"})[1], trained({"statistics", "loss scale"})[1]
    told = [name for name in one if name.startswith("grad_")]
    assert sum(one[name] > 1e-4 for name in told) >= 12
    assert [two[name] for name in told] == pytest.approx([one[name] for name in told], rel=1e-5)


# -- hyper-parameters as plain functions ------------------------------------------------------------------------------------------


def test_a_plain_function_of_the_step_is_injected_as_a_schedule_is() -> None:
    def harmonic(step: torch.Tensor) -> torch.Tensor:
        return 0.1 / (step.to(torch.float64) + 1.0)

    params = {"w": torch.ones(3, dtype=torch.float64)}
    plain, injected = ft.optim.adamw(harmonic), ft.optim.inject(ft.optim.adamw)(harmonic, mask=lambda path, p: True)
    one, two = plain.init(params), injected.init(params)
    for count in range(3):
        grads = {"w": torch.full((3,), 1.0 + count, dtype=torch.float64)}
        (a, one), (b, two) = plain.update(grads, one, params), injected.update(grads, two, params)
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
        assert float(two.hyper["lr"]) == pytest.approx(0.1 / (count + 1))
    assert set(two.hyper) == {"lr"}, "a mask is no schedule, although it can be called"
    assert set(two.scheduled) == {"lr"}


FLOORS: dict[str, Callable[[Any], ft.Transform]] = {
    "adaptive_grad_clip": lambda eps: ft.optim.adaptive_grad_clip(1e-2, eps=eps),
    "adafactor e1": lambda eps: ft.optim.adafactor(0.1, eps=(eps, 1e-3)),
    "adafactor e2": lambda eps: ft.optim.adafactor(0.1, eps=(None, eps)),
    "adam": lambda eps: ft.optim.adam(0.1, eps=eps),
    "adamw": lambda eps: ft.optim.adamw(0.1, eps=eps),
}


@pytest.mark.parametrize("name", FLOORS)
def test_an_eps_may_be_a_tensor_or_a_schedule_too(name: str) -> None:
    make, value = FLOORS[name], 0.3
    shapes = {"w": (3, 4), "b": (5,)}
    params = {key: torch.linspace(0.01, 0.05, 12, dtype=torch.float64)[: 12 if key == "w" else 5] for key in shapes}
    params = {key: params[key].reshape(shape) for key, shape in shapes.items()}
    grads = {key: 0.1 * torch.ones_like(p) + p for key, p in params.items()}

    def first(eps: Any) -> Any:
        tx = make(eps)
        return tx.update(grads, tx.init(params), params)[0]

    plain, other = first(value), first(1e-8)
    assert any((plain[key] - other[key]).abs().max() > 1e-6 for key in plain), "the eps does nothing"
    for given in (
        torch.tensor(value, dtype=torch.float64),
        ft.schedules.constant(value),
        lambda step: step * 0 + value,
    ):
        for key, update in first(given).items():
            torch.testing.assert_close(update, plain[key], rtol=1e-6, atol=1e-12)


# -- precision ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "fp8-mixed"])
def test_a_gpu_that_only_emulates_bfloat16_does_not_have_it(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    text = r'this GPU has no bfloat16\.\n  got: +bf16-(mixed|true) on Tesla T4\n  fix: +precision="16-mixed"'
    with pytest.raises(DeviceError, match=text):
        check_supported(as_policy(precision), torch.device("cuda"), "ft.init")
    check_supported(as_policy("16-mixed"), torch.device("cuda"), "ft.init")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_supported(as_policy(precision), torch.device("cuda"), "ft.init")


# -- documentation ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ft.optim.optimizers()))
def test_an_optimizer_states_its_rule_as_an_equation_and_its_paper(name: str) -> None:
    text = inspect.getdoc(ft.optim.optimizers()[name]) or ""
    rule = text.partition("Update")[2].partition("Args:")[0]
    assert "`p -= " in rule or "`P -= " in rule or "`p = " in rule or name == "adamw", "no equation for the parameter"
    assert "Source: " in text
    for argument in inspect.signature(ft.optim.optimizers()[name]).parameters:
        assert f"    {argument}: " in text, f"{argument} is not described"
