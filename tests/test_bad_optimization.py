"""What careless and hostile use of the optimization algebra gets: the right numbers, or an error that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftrain as ft


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
