"""Optimizers that torch does not have, against optax in float64; and what Muon does besides torch's Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ftrain as ft

STEPS = 24
Params = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    import jax

    with jax.enable_x64(True):
        yield


def start() -> Params:
    """A matrix, a vector, a scalar, and a leaf of zeros, which LAMB must treat in another way."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"layer.weight": (3, 4), "layer.bias": (5,), "scale": ()}
    params = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return params | {"zeros": torch.zeros(2, 2, dtype=torch.float64)}


def gradients(params: Params, step: int) -> Params:
    """Gradients of some loss, another at each step; in every third that of the bias is 0."""
    found = {name: 1.4 * (p - 0.5) + 1.2 * torch.cos(3.0 * p + step) for name, p in params.items()}
    return found | ({"layer.bias": torch.zeros_like(params["layer.bias"])} if step % 3 == 0 else {})


def ours(tx: ft.Transform) -> tuple[Params, Any]:
    params = start()
    state = tx.init(params)
    for step in range(STEPS):
        updates, state = tx.update(gradients(params, step), state, params)
        params = ft.optim.apply_updates(params, updates)
    return params, state


def of_optax(tx: Any) -> tuple[Params, Any]:
    import jax.numpy as jnp
    import optax

    params = {name: jnp.asarray(p.numpy()) for name, p in start().items()}
    state = tx.init(params)
    for step in range(STEPS):
        at = {name: torch.from_numpy(np.array(p)) for name, p in params.items()}
        grads = {name: jnp.asarray(g.numpy()) for name, g in gradients(at, step).items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return {name: torch.from_numpy(np.array(p)) for name, p in params.items()}, state


def no_bias(params: Any) -> Any:
    return {name: not name.endswith("bias") for name in params}


def warmup(value: float) -> Callable[[Any], Any]:
    return lambda count: value * (count + 1) / 10.0


def schedule(value: float) -> ft.types.Schedule:
    return ft.schedules.ScheduleFn(warmup(value), "warmup")


# Ours, and optax's arguments; the schedule, written once for both, counts from 0 in both.
CASES: dict[str, tuple[Callable[[], ft.Transform], Callable[[Any], Any]]] = {
    "lion": (lambda: ft.optim.lion(1e-2), lambda optax: optax.lion(1e-2)),
    "lion, every number": (
        lambda: ft.optim.lion(3e-3, b1=0.8, b2=0.95, weight_decay=0.3),
        lambda optax: optax.lion(3e-3, b1=0.8, b2=0.95, weight_decay=0.3),
    ),
    "lion, mask": (
        lambda: ft.optim.lion(1e-2, weight_decay=0.3, mask=lambda path, p: not path.endswith("bias")),
        lambda optax: optax.lion(1e-2, weight_decay=0.3, mask=no_bias),
    ),
    "lion, no decay": (
        lambda: ft.optim.lion(1e-2, weight_decay=0.0),
        lambda optax: optax.lion(1e-2, weight_decay=0.0),
    ),
    "lion, schedule": (
        lambda: ft.optim.lion(schedule(1e-2), weight_decay=0.1),
        lambda optax: optax.lion(warmup(1e-2), weight_decay=0.1),
    ),
    "lamb": (lambda: ft.optim.lamb(1e-2), lambda optax: optax.lamb(1e-2)),
    "lamb, every number": (
        lambda: ft.optim.lamb(3e-2, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-2, weight_decay=0.3),
        lambda optax: optax.lamb(3e-2, b1=0.8, b2=0.95, eps=1e-3, eps_root=1e-2, weight_decay=0.3),
    ),
    "lamb, mask": (
        lambda: ft.optim.lamb(1e-2, weight_decay=0.3, mask=["*.weight", "scale", "zeros"]),
        lambda optax: optax.lamb(1e-2, weight_decay=0.3, mask=no_bias),
    ),
    "lamb, schedule": (
        lambda: ft.optim.lamb(schedule(1e-2), weight_decay=0.1),
        lambda optax: optax.lamb(warmup(1e-2), weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parity_with_optax(case: str) -> None:
    import optax

    make, reference = CASES[case]
    got, _ = ours(make())
    expected, _ = of_optax(reference(optax))
    for name, p in start().items():
        moved = (expected[name] - p).abs().max()
        assert moved > 1e-4, f"{name} did not move, so nothing was compared"
        assert (got[name] - expected[name]).abs().max() <= 1e-12 * moved + 1e-15, name


@pytest.mark.parametrize(("name", "field"), [("lion", "mu"), ("lamb", "mu"), ("lamb", "nu")])
def test_moments_are_those_of_optax(name: str, field: str) -> None:
    import optax

    _, state = ours(getattr(ft.optim, name)(1e-2))
    _, expected = of_optax(getattr(optax, name)(1e-2))
    for leaf, value in getattr(state, field).items():
        torch.testing.assert_close(
            value, torch.from_numpy(np.array(getattr(expected[0], field)[leaf])), rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("name", ["lion", "lamb"])
def test_the_comparison_fails_on_another_learning_rate(name: str) -> None:
    import optax

    got, _ = ours(getattr(ft.optim, name)(1e-2 * (1 + 1e-9)))
    expected, _ = of_optax(getattr(optax, name)(1e-2))
    assert (got["layer.weight"] - expected["layer.weight"]).abs().max() > 1e-11


def test_a_lamb_parameter_of_zeros_moves_by_adams_update() -> None:
    params = {"w": torch.zeros(3)}
    tx = ft.optim.lamb(0.1)
    updates, _ = tx.update({"w": torch.tensor([1.0, -2.0, 0.0])}, tx.init(params), params)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.1, 0.1, 0.0]), rtol=1e-5, atol=0.0)


# -- Muon and its groups ------------------------------------------------------------------------------------------------------


def run(tx: ft.Transform, params: Params, steps: int = 3) -> tuple[Params, Any]:
    state = tx.init(params)
    for step in range(steps):
        grads = {name: torch.cos(3.0 * p + step) for name, p in params.items()}
        updates, state = tx.update(grads, state, params)
        params = ft.optim.apply_updates(params, updates)
    return params, state


@pytest.fixture
def network() -> Params:
    shapes = {"embed.weight": (7, 4), "hidden.weight": (6, 4), "hidden.bias": (6,), "conv.weight": (2, 2, 3)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def by_torch(params: Params, matrices: list[str], lr: float, rest: float, steps: int = 3) -> Params:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    two = [
        torch.optim.Muon([leaves[name] for name in matrices], lr=lr, weight_decay=0.1),
        torch.optim.AdamW([p for name, p in leaves.items() if name not in matrices], lr=rest, weight_decay=0.1),
    ]
    for step in range(steps):
        for p in leaves.values():
            p.grad = torch.cos(3.0 * p.detach() + step)
        for one in two:
            one.step()
    return {name: p.detach() for name, p in leaves.items()}


@pytest.mark.parametrize("mask", ["hidden.weight", ["hidden.w*"], lambda path, p: path == "hidden.weight", "tree"])
def test_muon_takes_the_matrices_that_its_mask_names(network: Params, mask: Any) -> None:
    if mask == "tree":
        mask = {name: name == "hidden.weight" for name in network}
    tx = ft.optim.muon(0.02, mask=mask, rest=ft.optim.adamw(1e-3, weight_decay=0.1))
    got, state = run(tx, network)
    expected = by_torch(network, ["hidden.weight"], 0.02, 1e-3)
    for name, p in expected.items():
        assert (p - network[name]).abs().max() > 1e-3
        torch.testing.assert_close(got[name], p, rtol=0.0, atol=1e-6)
    assert list(state["muon"].momentum) == ["hidden.weight"]
    assert {k: round(float(v), 6) for k, v in ft.optim.metrics(state).items()} == {"lr/muon": 0.02, "lr/adamw": 1e-3}


def test_muon_takes_all_matrices_by_default_and_adamw_leaves_out_biases_from_decay(network: Params) -> None:
    got, _ = run(ft.optim.muon(0.02), network)
    expected = by_torch(network, ["embed.weight", "hidden.weight"], 0.02, 0.02)
    for name in ("embed.weight", "hidden.weight", "conv.weight"):
        torch.testing.assert_close(got[name], expected[name], rtol=0.0, atol=1e-6)
    undecayed = run(ft.optim.adamw(0.02, weight_decay=0.0), {"hidden.bias": network["hidden.bias"]})[0]
    torch.testing.assert_close(got["hidden.bias"], undecayed["hidden.bias"], rtol=0.0, atol=1e-6)


def test_muon_without_other_parameters() -> None:
    params = {"w": torch.randn(3, 3)}
    got, state = run(ft.optim.muon(0.02), params)
    expected = by_torch(params | {"b": torch.ones(1)}, ["w"], 0.02, 1.0)
    torch.testing.assert_close(got["w"], expected["w"], rtol=0.0, atol=1e-6)
    assert state["adamw"] == ()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ft.optim.muon(ns_coefficients=(1.0, 2.0)), r"three coefficients.\n +expected: \(a, b, c\)"),
        (lambda: ft.optim.muon(ns_steps=100), r"ns_steps=100 makes no sense.\n +expected: an integer from 0 to 99"),
        (lambda: ft.optim.muon(adjust_lr_fn="fancy"), "adjust_lr_fn='fancy'(.|\n)*match_rms_adamw"),
        (lambda: ft.optim.muon(momentum=1.0), "momentum=1.0 is not below 1"),
        (lambda: ft.optim.muon(weight_decay=-1.0), "weight_decay=-1.0 is negative"),
        (lambda: ft.optim.adafactor(beta2_decay=0.5), "beta2_decay=0.5 is an exponent above 0"),
        (lambda: ft.optim.adafactor(d=0.5), "d=0.5 is below 1"),
        (lambda: ft.optim.adafactor(eps=1e-3), r"eps is a pair.\n +expected: \(e1, e2\)"),
        (lambda: ft.optim.adafactor(eps=(-1.0, 1e-3)), "e1=-1.0 is negative"),
        (lambda: ft.optim.lion(-1.0), "lr=-1.0 is negative"),
        (lambda: ft.optim.lamb(1e-3, b2=1.0), "b2=1.0 is not below 1"),
    ],
)
def test_bad_hyper_parameters(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ft.errors.LimitError, match=text):
        make()


@pytest.mark.parametrize(
    ("tx", "text"),
    [
        (ft.optim.muon(0.02, mask="*"), r"takes a parameter that is no matrix.\n +where: +params\['conv.weight'\]"),
        (ft.optim.muon(0.02, mask="hiden.*"), 'matches no parameter(.|\n)*"hidden.*"'),
        (ft.optim.lion(0.02, mask="hiden.*"), 'lion: mask=.hiden.*. matches no parameter(.|\n)*mask="hidden.*"'),
        (ft.optim.lamb(0.02, mask="hiden.*"), 'lamb: mask=.hiden.*. matches no parameter(.|\n)*mask="hidden.*"'),
    ],
)
def test_bad_masks(network: Params, tx: ft.Transform, text: str) -> None:
    with pytest.raises(ft.errors.ModelError, match=text):
        tx.init(network)


def test_muon_wants_a_transform_for_the_rest() -> None:
    with pytest.raises(TypeError, match=r"expected: Transform\(init, update\)"):
        ft.optim.muon(0.02, rest=ft.optim.adamw)
