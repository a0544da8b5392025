"""Clipping against torch.nn.utils and optax, and in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain as ft
from ftrain import tree
from ftrain.errors import LimitError, ModelError
from ftrain.optim.lists import norms

Params = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": (), "d": (2, 3, 2, 2), "e": (4, 1)}


def leaves(seed: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for k, shape in SHAPES.items()
    }


def clipped(tx: ft.Transform, grads: Params, params: Params | None = None) -> tuple[Params, Any]:
    return tx.update(grads, tx.init(grads), grads if params is None else params)


def by_torch(grads: Params, clip: Callable[[list[Tensor]], Any]) -> tuple[Params, Any]:
    params = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in grads.items()}
    for name, p in params.items():
        p.grad = grads[name].clone()
    out = clip(list(params.values()))
    return {name: p.grad for name, p in params.items() if p.grad is not None}, out


def close(got: Params, expected: Params, dtype: torch.dtype) -> None:
    rtol = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert got.keys() == expected.keys()
    for name, one in expected.items():
        assert got[name].dtype == dtype
        torch.testing.assert_close(got[name], one, rtol=rtol, atol=0.0)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])


@DTYPES
@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_the_global_norm_is_clipped_as_in_torch(dtype: torch.dtype, limit: float) -> None:
    grads = leaves(0, dtype)
    got, state = clipped(ft.optim.clip_by_global_norm(limit), grads)
    expected, norm = by_torch(grads, lambda params: torch.nn.utils.clip_grad_norm_(params, limit))
    close(got, expected, dtype)
    torch.testing.assert_close(
        state.norm.double(), norm.double(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    if limit > 100:
        assert all(torch.equal(got[name], g) for name, g in grads.items())  # bit for bit


@DTYPES
def test_each_norm_is_clipped_as_in_torch(dtype: torch.dtype) -> None:
    grads = leaves(0, dtype)
    got, state = clipped(ft.optim.clip_by_norm(1.5), grads)
    expected, _ = by_torch(grads, lambda params: [torch.nn.utils.clip_grad_norm_([p], 1.5) for p in params])
    close(got, expected, dtype)
    kept = [name for name, g in grads.items() if torch.equal(got[name], g)]
    assert kept
    assert len(kept) < len(grads)
    torch.testing.assert_close(state.norm, ft.optim.global_norm(grads))


@DTYPES
def test_values_are_clipped_as_in_torch(dtype: torch.dtype) -> None:
    grads = leaves(0, dtype)
    got, _ = clipped(ft.optim.clip(0.5), grads)
    close(got, by_torch(grads, lambda params: torch.nn.utils.clip_grad_value_(params, 0.5))[0], dtype)
    assert any(not torch.equal(got[name], g) for name, g in grads.items())


def _optax(make: Callable[[Any], Any], grads: Params, params: Params) -> Params:
    import jax
    import jax.numpy as jnp
    import optax

    with jax.enable_x64(True):
        tx = make(optax)
        theirs = {name: jnp.asarray(p.numpy()) for name, p in params.items()}
        updates, _ = tx.update({name: jnp.asarray(g.numpy()) for name, g in grads.items()}, tx.init(theirs), theirs)
        return {name: torch.from_numpy(np.array(u)) for name, u in updates.items()}


def test_adaptive_clipping_is_that_of_optax() -> None:
    params, grads = leaves(1, size=0.1), leaves(0)
    params["b"] = torch.zeros_like(params["b"])  # limited by eps
    got, _ = clipped(ft.optim.adaptive_grad_clip(0.3, eps=1e-2), grads, params)

    def turned(values: Params) -> Params:  # optax has the outputs in the last dimension, torch in the first
        return {name: v if v.ndim < 2 else v.movedim(0, -1).contiguous() for name, v in values.items()}

    expected = _optax(lambda o: o.adaptive_grad_clip(0.3, eps=1e-2), turned(grads), turned(params))
    close(turned(got), expected, torch.float64)
    assert sum(not torch.equal(got[name], g) for name, g in grads.items()) == len(grads)
    matrices = {name: grads[name] for name in ("a", "e")}, {name: params[name] for name in ("a", "e")}
    for dim in (0, (0, 1), -1):
        got, _ = clipped(ft.optim.adaptive_grad_clip(0.3, dim=dim), *matrices)
        close(got, _optax(lambda o, dim=dim: o.adaptive_grad_clip(0.3, axis=dim), *matrices), torch.float64)
    wide = clipped(ft.optim.adaptive_grad_clip(1e6), grads, leaves(1))[0]
    assert all(torch.equal(wide[name], g) for name, g in grads.items())


def test_clipping_by_value_is_that_of_optax() -> None:
    grads = leaves(0)
    close(clipped(ft.optim.clip(0.5), grads)[0], _optax(lambda o: o.clip(0.5), grads, grads), torch.float64)


# ------------------------------------------------------------------------------------------------ precision of the norms


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_norms_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    grads = {"a": torch.full((1000,), 300.0, dtype=dtype), "b": torch.full((3,), 3e-5, dtype=dtype)}
    exact = torch.cat([g.double() for g in grads.values()]).norm()
    norm = ft.optim.global_norm(grads)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(
        norm.double(), exact, rtol=1e-6, atol=0
    )  # 300**2 is beyond float16, 1000 * it bfloat16's bits
    for tx in (ft.optim.clip_by_global_norm(10.0), ft.optim.clip_by_norm(10.0)):
        got, state = clipped(tx, grads)
        assert got["a"].dtype == dtype
        assert state.norm.dtype == torch.float32
        torch.testing.assert_close(got["a"].double().norm(), torch.tensor(10.0).double(), rtol=4e-3, atol=0)
    assert clipped(ft.optim.adaptive_grad_clip(0.1), grads)[0]["a"].dtype == dtype


def test_mixed_dtypes() -> None:
    grads = {
        "h": torch.full((4,), 3.0, dtype=torch.bfloat16),
        "f": torch.full((9,), 2.0),
        "d": torch.full((4,), 1.5, dtype=torch.float64),
        "s": torch.tensor(2.0, dtype=torch.float16),
    }
    exact = torch.cat([g.double().flatten() for g in grads.values()]).norm()
    assert ft.optim.global_norm(grads).dtype == torch.float64
    torch.testing.assert_close(ft.optim.global_norm(grads), exact)
    tx = ft.optim.clip_by_global_norm(1.0)
    got, state = clipped(tx, grads)
    assert {name: g.dtype for name, g in got.items()} == {name: g.dtype for name, g in grads.items()}
    torch.testing.assert_close(ft.optim.global_norm(got), torch.ones((), dtype=torch.float64), rtol=4e-3, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(tx.update, backend="eager", fullgraph=True)(grads, tx.init(grads), grads)
    for one, two in zip(tree.leaves((got, state)), tree.leaves(compiled), strict=True):
        torch.testing.assert_close(one, two)
    del grads["d"]
    assert ft.optim.global_norm(grads).dtype == torch.float32
    assert tx.init(grads).norm.dtype == torch.float32


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 50))
def test_no_norm_is_above_its_limit(limit: float, size: float, seed: int) -> None:
    grads = leaves(seed, size=size)
    whole, _ = clipped(ft.optim.clip_by_global_norm(limit), grads)
    assert ft.optim.global_norm(whole) <= limit * (1 + 1e-12)
    each, _ = clipped(ft.optim.clip_by_norm(limit), grads)
    assert all(norm <= limit * (1 + 1e-12) for norm in norms(list(each.values())))
    values, _ = clipped(ft.optim.clip(limit), grads)
    assert all(v.abs().max() <= limit for v in values.values())
    for got in (whole, each):  # directions stay
        for name, g in got.items():
            ratio = g / grads[name]
            torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))


class _Norms(TorchDispatchMode):
    """Counts the operations that compute a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "norm" in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [ft.optim.clip_by_global_norm, ft.optim.clip_by_norm])
def test_the_norm_is_reported_at_no_extra_cost(make: Any) -> None:
    grads, tx = leaves(0), make(0.5)
    state = tx.init(grads)
    with _Norms() as counted:
        _, state = tx.update(grads, state, grads)
    assert counted.seen == ["aten._foreach_norm.Scalar", "aten.linalg_vector_norm.default"]
    torch.testing.assert_close(ft.optim.metrics(state), {"grad_norm": ft.optim.global_norm(grads)})


LIMITED: dict[str, Callable[..., ft.Transform]] = {
    "max_norm": ft.optim.clip_by_global_norm,
    "max_norm each": ft.optim.clip_by_norm,
    "max_delta": ft.optim.clip,
    "clipping": ft.optim.adaptive_grad_clip,
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_limit_may_be_a_tensor_or_a_schedule(name: str) -> None:
    make, grads = LIMITED[name], leaves(0)
    expected, _ = clipped(make(0.1), grads)
    halving = ft.schedules.ScheduleFn(lambda t: 0.2 / (t + 1.0), "halving")
    for tx in (make(torch.tensor(0.1)), ft.optim.inject(make)(0.1)):
        for key, one in clipped(tx, grads)[0].items():
            torch.testing.assert_close(one, expected[key], rtol=1e-7, atol=0)
    tx = make(halving)
    _, state = tx.update(grads, tx.init(grads), grads)
    for key, one in tx.update(grads, state, grads)[0].items():  # the second: 0.2 / 2
        torch.testing.assert_close(one, expected[key])
    with pytest.raises(LimitError, match=rf"{name.partition(' ')[0]}=-0\.1 is negative[\s\S]*fix: +\w+=0\.1"):
        make(-0.1)


def test_adaptive_clipping_refuses_what_makes_no_sense() -> None:
    with pytest.raises(LimitError, match=r"eps=-0\.1 is negative"):
        ft.optim.adaptive_grad_clip(0.1, eps=-0.1)
    with pytest.raises(ModelError, match=r"has no dimension 1\.[\s\S]*where: +params\['b'\][\s\S]*ft\.optim\.masked"):
        ft.optim.adaptive_grad_clip(0.1, dim=(0, 1)).init({"b": torch.ones(2)})


def test_no_leaves() -> None:
    assert ft.optim.global_norm({}) == 0.0
    for make in LIMITED.values():
        got, state = clipped(make(1.0), {})
        assert got == {}
        assert int(state.count) == 1


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    grads = {**leaves(0), "b": torch.full((5,), torch.nan, dtype=torch.float64)}
    for make in (ft.optim.clip_by_global_norm, ft.optim.clip_by_norm):
        assert clipped(make(1.0), grads)[1].norm.isnan()
