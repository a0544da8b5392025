"""What careless and hostile use of the optimization algebra gets: the right numbers, or an error that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftrain as ft
from ftrain.errors import ArgumentError, StructureError


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


BATCH = {"x": torch.linspace(-2, 2, 64).view(16, 4).sin(), "y": torch.arange(16) % 3}
SGD = ft.optim.sgd(0.1)  # whose steps show a wrong factor, which those of Adam hide


def gradient(model: nn.Module | None = None, loss_fn: Any = cross_entropy) -> Any:
    return ft.value_and_grad(ft.bind(mlp() if model is None else model, loss_fn))


def moved(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# -- wrappers around wrappers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_loss_scale_around_accumulation_does_not_change_the_gradient(k: int, compiled: bool) -> None:
    model = mlp()
    state = ft.init(model, SGD)
    step: Any = ft.make_step(ft.with_loss_scale(ft.with_accumulation(gradient(model), k)), SGD)
    state = step.init(state)
    plain, _ = ft.make_step(gradient(model), SGD)(state, BATCH)
    run = ft.compile(step, donate=False, rung="step", backend="eager") if compiled else step
    scaled, _ = run(state, BATCH)
    assert moved(scaled.params, plain.params) < 1e-5 * moved(plain.params, state.params)


# -- states that do not suit --------------------------------------------------------------------------------------------------


def test_a_state_that_did_not_suit_does_not_spoil_the_step_for_the_next_one() -> None:
    model, tx = mlp(), ft.optim.adamw(1e-3)
    step = ft.train_step(model, cross_entropy, tx)
    with pytest.raises(StructureError, match="does not belong to the model Sequential"):
        step(ft.init(nn.Linear(4, 3), tx), BATCH)
    assert step(ft.init(model, tx), BATCH)[0].counters().step == 1


def test_one_step_serves_states_that_train_other_parameters() -> None:
    model, tx = mlp(), ft.optim.adamw(1e-3)
    step = ft.train_step(model, cross_entropy, tx)
    some, everything = ft.init(model, tx, trainable="2.*"), ft.init(model, tx)
    for state in (everything, some, everything):
        new, _ = step(state, BATCH)
        assert moved(new.params, state.params) > 0
    with pytest.raises(StructureError, match=r"made with another optimizer(.|\n)*state\.opt"):
        step(some.replace(opt=ft.optim.sgd(0.1, momentum=0.9).init(some.params)), BATCH)


# -- arguments that are another kind of thing ---------------------------------------------------------------------------------

ARGUMENTS = {
    "a learning rate that is a text": lambda: ft.optim.sgd("0.1"),  # type: ignore[arg-type]
    "a decay of averages that is nothing": lambda: ft.with_ema(ft.train_step(mlp(), cross_entropy, SGD), None),  # type: ignore[arg-type]
    "an optimizer that was not called": lambda: ft.optim.chain(ft.optim.clip(1.0), ft.optim.adam),  # type: ignore[arg-type]
    "a schedule in place of a number": lambda: ft.schedules.linear(ft.schedules.constant(0.1), 0.0, 10),  # type: ignore[arg-type]
    "a text in place of schedules": lambda: ft.schedules.join("ab", [1]),
    "a number in place of a schedule": lambda: ft.optim.scale_by_schedule(0.1),  # type: ignore[arg-type]
    "a metric without a name": lambda: ft.hooks.plateau(None),  # type: ignore[arg-type]
    "a cadence and a number": lambda: ft.every(steps=5) | 5,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_error_of_an_argument_is_one_of_ftrains(name: str) -> None:
    with pytest.raises(ArgumentError, match="expected:|got:"):
        ARGUMENTS[name]()
