"""What careless and hostile use of the optimization algebra gets: the right numbers, or an error that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftrain as ft
from ftrain.errors import ArgumentError, FtrainError, LimitError, StateError, StructureError


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
    with pytest.raises(ArgumentError, match=r"expected:|got:"):
        ARGUMENTS[name]()


# -- functions of another level -----------------------------------------------------------------------------------------------

LOSS = ft.bind(mlp(), cross_entropy)
THINGS: dict[str, Any] = {
    "a loss": LOSS,
    "a gradient": ft.value_and_grad(LOSS),
    "a step": ft.train_step(mlp(), cross_entropy, SGD),
    "an optimizer": SGD,
    "a module": mlp(),
    "nothing": None,
}
WANTS: dict[str, tuple[str, Any]] = {
    "ft.with_precision": ("a loss", lambda fn: ft.with_precision(fn, "bf16-mixed")),
    "ft.value_and_grad": ("a loss", ft.value_and_grad),
    "ft.with_accumulation": ("a gradient", lambda fn: ft.with_accumulation(fn, 2)),
    "ft.with_sam": ("a gradient", ft.with_sam),
    "ft.with_grad_stats": ("a gradient", ft.with_grad_stats),
    "ft.with_loss_scale": ("a gradient", ft.with_loss_scale),
    "ft.make_step": ("a gradient", lambda fn: ft.make_step(fn, SGD)),
    "ft.make_update": ("a gradient", lambda fn: ft.make_update(fn, SGD)),
    "ft.with_ema": ("a step", ft.with_ema),
    "ft.with_swa": ("a step", lambda fn: ft.with_swa(fn, start=1)),
    "ft.compile": ("a step", ft.compile),
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("what", WANTS)
def test_a_function_of_another_level_is_refused_when_the_wrapper_is_made(what: str, thing: str) -> None:
    wanted, make = WANTS[what]
    if thing == wanted:
        make(THINGS[thing])
        return
    with pytest.raises(
        FtrainError, match=rf"{what} wants a (function of the \w+ level|step)(.|\n)*expected:(.|\n)*got:"
    ):
        make(THINGS[thing])


def test_as_step_refuses_what_counts_steps_by_itself() -> None:
    model = mlp()
    step, state = ft.train_step(model, cross_entropy, SGD), ft.init(model, SGD)
    for known in (step, ft.compile(step, rung="eager"), ft.with_ema(step)):
        with pytest.raises(ArgumentError, match=r"is a step already(.|\n)*counted twice(.|\n)*ft\.as_step\(update"):
            ft.as_step(known)
    with pytest.raises(StateError, match=r"counted its steps itself(.|\n)*Counters\(step=1"):
        ft.as_step(lambda state, batch: (step(state, batch)[0], {}))(state, BATCH)
    with pytest.raises(StateError, match=r"did not return \(state, metrics\)(.|\n)*got: +dict"):
        ft.as_step(lambda state, batch: {})(state, BATCH)
    update = ft.make_update(gradient(model), SGD)
    new, _ = ft.as_step(update, uses=(one for one in [update]))(state, BATCH)
    assert new.counters().step == 1


def test_an_average_of_a_function_that_is_no_step() -> None:
    model = mlp()
    step = ft.with_ema(ft.eval_step(model, lambda model, batch: {"loss": cross_entropy(model, batch)}))  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"did not return \(state, metrics\)(.|\n)*got: +dict"):
        step(step.init(ft.init(model, SGD)), BATCH)


def test_two_averages_in_one_step_have_names_of_their_own() -> None:
    step = ft.train_step(mlp(), cross_entropy, SGD)
    for inner in (ft.with_ema(step), ft.with_swa(step, start=1, name="ema")):
        with pytest.raises(LimitError, match=r"under the name 'ema' already(.|\n)*ft\.with_ema\(step, \.\.\., name="):
            ft.with_ema(inner)
    scaled = ft.make_step(ft.with_loss_scale(gradient(), name="kept"), SGD)
    with pytest.raises(LimitError, match="under the name 'kept' already"):
        ft.with_swa(scaled, start=1, name="kept")
    for name in (None, "", 3):
        with pytest.raises(ArgumentError, match="is no name"):
            ft.with_ema(step, name=name)  # type: ignore[arg-type]


def test_an_average_of_other_parameters() -> None:
    model = mlp()
    step = ft.with_ema(ft.train_step(model, cross_entropy, SGD))
    kept = step.init(ft.init(model, SGD)).extra
    with pytest.raises(StructureError, match=r"'ema' is of other parameters(.|\n)*extra=\{\}"):
        step(ft.init(model, SGD, trainable="2.*").replace(extra=kept), BATCH)


# A guard inside of what calls it several times: the step would look at its last word alone, and write inf into parameters.
@pytest.mark.parametrize("wrap", [lambda g: ft.with_accumulation(g, 4), ft.with_sam], ids=["accumulation", "SAM"])
def test_a_loss_scale_stands_outside(wrap: Any) -> None:
    with pytest.raises(
        LimitError, match=r"stands inside of ft\.with_loss_scale(.|\n)*fix: +grad = ft\.with_loss_scale\(ft\.with_"
    ):
        wrap(ft.with_loss_scale(gradient()))
    with pytest.raises(LimitError, match=r"scaled already(.|\n)*'one'"):
        ft.with_loss_scale(ft.with_grad_stats(ft.with_loss_scale(gradient(), name="one")), name="two")


@pytest.mark.parametrize(
    "wrong",
    [
        {"init_scale": float("inf")},
        {"init_scale": lambda step: step},
        {"growth_interval": "2"},
        {"growth_interval": 1.5},
    ],
    ids=lambda options: next(iter(options)) + str(callable(next(iter(options.values())))),
)
def test_a_loss_scale_of_numbers_that_are_none(wrong: Any) -> None:
    with pytest.raises(LimitError, match=r"makes no sense(.|\n)*expected:"):
        ft.with_loss_scale(gradient(), **wrong)
