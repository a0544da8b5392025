"""Parameters in half precision: how updates are added, master weights, stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ftrain as ft
from ftrain import tree
from ftrain.errors import LimitError, ModelError

from .corpus import MODELS, OPTIMIZERS

Params = dict[str, Tensor]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


def leaves(seed: int, dtype: torch.dtype, size: float = 1.0) -> Params:
    """Two leaves of this dtype and one of float32."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        k: size * torch.randn(s, generator=generator) for k, s in {"w": (6, 5), "s": (), "norm.weight": (7,)}.items()
    }
    return {k: v if k.startswith("norm") else v.to(dtype) for k, v in found.items()}


def wide(values: Params) -> Params:
    return {name: v.float() for name, v in values.items()}


def same(a: Any, b: Any) -> None:
    found = list(zip(tree.leaves(a), tree.leaves(b), strict=True))
    assert found
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in found)


def graph(fn: Callable[..., Any], backend: str = "eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, fullgraph=True)


@HALF
def test_updates_are_added_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    params = {k: torch.randn(shape).to(dtype) for k, shape in {"a": (1000,), "b": (50, 3), "s": ()}.items()}
    updates = {k: torch.randn(p.shape) * 1e-2 for k, p in params.items()}
    expected = {k: (p.float() + updates[k]).to(dtype) for k, p in params.items()}
    twice = {k: p + updates[k].to(dtype) for k, p in params.items()}
    assert not torch.equal(expected["a"], twice["a"])  # there is something to see
    apply = ft.optim.apply_updates
    same(apply(params, updates), expected)
    for backend in ("eager", "aot_eager"):
        same(graph(apply, backend)(params, updates), expected)
    stacked = (tree.map(lambda x: torch.stack([x, x]), one) for one in (params, updates))
    same({k: p[1] for k, p in torch.func.vmap(apply)(*stacked).items()}, expected)
    double = {k: u.double() for k, u in updates.items()}
    same(apply(params, double), {k: (p.double() + double[k]).to(dtype) for k, p in params.items()})


# -------------------------------------------------------------------------------------------------------------- masters


@HALF
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masters_are_what_the_optimizer_makes_of_float32(optimizer: str, dtype: torch.dtype) -> None:
    inner, tx = OPTIMIZERS[optimizer](), ft.optim.master_weights(OPTIMIZERS[optimizer]())
    params = leaves(0, dtype)
    plain = wide(params)
    state, expected = tx.init(params), inner.init(plain)
    assert list(state.master) == ["w", "s"]  # float32 parameters are not kept twice
    for step in range(20):
        grads = leaves(step + 1, dtype)
        updates, state = tx.update(grads, state, params)
        params = ft.optim.apply_updates(params, updates)
        changes, expected = inner.update(wide(grads), expected, plain)
        plain = ft.optim.apply_updates(plain, changes)
        same(params, {name: p.to(params[name].dtype) for name, p in plain.items()})
        same(state.master, {name: plain[name] for name in ("w", "s")})
    same(state.inner, expected)
    assert (plain["w"] - leaves(0, dtype)["w"].float()).abs().max() > 1e-2


@HALF
def test_masters_follow_parameters_that_were_changed_from_outside(dtype: torch.dtype) -> None:
    tx = ft.optim.master_weights(ft.optim.sgd(1e-3))
    params, grads = leaves(0, dtype), leaves(1, dtype)
    updates, state = tx.update(grads, tx.init(params), params)
    params = ft.optim.apply_updates(params, updates)
    changed = params["w"].clone()
    changed[0] = 7.0  # another row than the rest, which keeps its masters
    _, after = tx.update(tree.map(torch.zeros_like, grads), state, {**params, "w": changed})
    assert torch.equal(after.master["w"][0], torch.full((5,), 7.0))
    assert torch.equal(after.master["w"][1:], state.master["w"][1:])
    assert not torch.equal(state.master["w"][1:], params["w"][1:].float())


def test_masters_around_a_chain_and_inside_a_skip() -> None:
    chain = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2, mask=ft.optim.no_bias_or_norm))
    tx = ft.optim.skip_nonfinite(ft.optim.master_weights(chain))
    params = leaves(0, torch.bfloat16)
    state = tx.init(params)
    compiled, eager = graph(tx.update), tx.update
    for step in range(4):
        grads = leaves(step, torch.bfloat16)
        if step == 2:
            grads["w"] = grads["w"] * torch.inf
        updates, after = eager(grads, state, params)
        for one, two in zip(tree.leaves((updates, after)), tree.leaves(compiled(grads, state, params)), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)
        if step == 2:
            same((after.inner, params), (state.inner, ft.optim.apply_updates(params, updates)))
        params, state = ft.optim.apply_updates(params, updates), after
        same({name: m.bfloat16() for name, m in state.inner.master.items()}, {n: params[n] for n in ("w", "s")})
    assert int(state.skipped) == 1
    assert set(ft.optim.metrics(state)) == {"skipped", "grad_norm", "lr"}


# --------------------------------------------------------------------------------------------------- stochastic rounding


def rounded(values: Tensor, times: int, seed: int = 0) -> Tensor:
    """The float32 values, rounded to bfloat16 in `times` independent ways, as float64 (times, n)."""
    params = {"w": torch.zeros(times, *values.shape, dtype=torch.bfloat16)}
    grads = {"w": torch.zeros_like(params["w"])}
    add = ft.Transform(lambda params: (), lambda g, s, p: ({"w": values.expand(times, *values.shape)}, s))
    tx = ft.optim.stochastic_rounding(add, seed=seed)
    updates, _ = tx.update(grads, tx.init(params), params)
    return ft.optim.apply_updates(params, updates)["w"].double()


def test_the_mean_of_many_roundings_is_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(50, generator=generator) * 10.0**k for k in (-20, -3, 0, 3)])
    times = 4000
    got = rounded(values, times)
    below, above = got.min(0).values, got.max(0).values
    step = above - below
    assert (step > 0).double().mean() > 0.95  # nearly all are between two numbers
    assert torch.equal(
        step, torch.where(step > 0, torch.nextafter(below.bfloat16(), above.bfloat16()).double() - below, 0.0)
    )
    fraction = ((values.double() - below) / step.clamp(min=1e-300)).clamp(0, 1)
    error = step * (fraction * (1 - fraction) / times).sqrt()  # of the mean of independent roundings
    deviation = (got.mean(0) - values.double()).abs() / error.clamp(min=1e-300)
    assert deviation[step > 0].max() < 4.5
    assert (deviation[step > 0] > 2).double().mean() < 0.1
    nearest = values.bfloat16().double()
    assert ((nearest - values.double()).abs() / error.clamp(min=1e-300))[
        step > 0
    ].max() > 20  # what rounding to nearest does


@given(st.lists(st.floats(width=16, allow_nan=False), min_size=1, max_size=20), st.integers(0, 5))
def test_what_bfloat16_can_hold_is_not_changed(values: list[float], seed: int) -> None:
    exact = torch.tensor(values).bfloat16()
    got = rounded(exact[exact.isfinite()].float(), 8, seed)
    assert torch.equal(got, exact[exact.isfinite()].double().expand_as(got))


def test_what_is_not_finite_stays_so() -> None:
    got = rounded(torch.tensor([torch.inf, -torch.inf, torch.nan]), 100)
    assert (got[:, 0] == torch.inf).all()
    assert (got[:, 1] == -torch.inf).all()
    assert got[:, 2].isnan().all()


def test_updates_that_rounding_to_nearest_would_lose_make_progress() -> None:
    params = {"w": torch.ones(2000, dtype=torch.bfloat16)}
    grads = {"w": torch.ones(2000, dtype=torch.bfloat16)}

    def after(tx: ft.Transform) -> Tensor:
        state, found = tx.init(params), params
        for _ in range(50):
            updates, state = tx.update(grads, state, found)
            found = ft.optim.apply_updates(found, updates)
        return found["w"].double()

    rate = 1e-3
    assert torch.equal(after(ft.optim.sgd(rate)), torch.ones(2000, dtype=torch.float64))  # nothing at all
    expected = 1.0 - 50 * rate
    assert after(ft.optim.stochastic_rounding(ft.optim.sgd(rate))).mean().item() == pytest.approx(expected, abs=2e-3)
    masters = after(ft.optim.master_weights(ft.optim.sgd(rate)))
    assert torch.equal(masters, torch.full_like(masters, expected).bfloat16().double())


def test_roundings_are_a_function_of_seed_count_and_leaf() -> None:
    params = {"a": torch.ones(500, dtype=torch.bfloat16), "b": torch.ones(500, dtype=torch.bfloat16)}

    def two_steps(seed: int, update: Any = None) -> tuple[list[Params], Any]:
        tx = ft.optim.stochastic_rounding(ft.optim.sgd(1.0 / 512), seed=seed)
        state, found = tx.init(params), []
        for _ in range(2):
            updates, state = (graph(tx.update) if update else tx.update)(params, state, params)
            found.append(updates)
        return found, state

    first, state = two_steps(0)
    same(first, two_steps(0)[0])
    same((first, state), two_steps(0, update="graph"))
    assert int(state.count) == 2
    seen = [u[name] for u in (*first, *two_steps(1)[0]) for name in ("a", "b")]
    for i, one in enumerate(seen):
        assert 0.3 < (one != 0).double().mean() < 0.7
        for two in seen[:i]:
            assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 0.2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_leaves_of_float32_are_left_to_the_optimizer(optimizer: str) -> None:
    inner, tx = OPTIMIZERS[optimizer](), ft.optim.stochastic_rounding(OPTIMIZERS[optimizer]())
    params, grads = leaves(0, torch.bfloat16), leaves(1, torch.bfloat16)
    updates, state = tx.update(grads, tx.init(params), params)
    expected, after = inner.update(wide(grads), inner.init(wide(params)), wide(params))
    assert torch.equal(updates["norm.weight"], expected["norm.weight"])
    same(state.inner, after)  # moments are float32
    new = ft.optim.apply_updates(params, updates)["w"]
    exact = params["w"].float() + expected["w"]
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)
    assert ((new.float() - exact).abs() < spacing).all()  # one of the two neighbours


def test_what_cannot_be_rounded_at_random() -> None:
    with pytest.raises(
        ModelError, match=r"for bfloat16\.[\s\S]*where: +w[\s\S]*float16\[2\][\s\S]*master_weights\(tx\)"
    ):
        ft.optim.stochastic_rounding(ft.optim.sgd(0.1)).init({"w": torch.ones(2, dtype=torch.float16)})
    with pytest.raises(LimitError, match=r"0\.5 is no seed"):
        ft.optim.stochastic_rounding(ft.optim.sgd(0.1), seed=0.5)


# ------------------------------------------------------------------------------------------------------- in a whole step


@pytest.mark.parametrize("wrapper", ["master_weights", "stochastic_rounding"])
def test_a_model_in_bfloat16_trains_further_than_without(wrapper: str) -> None:
    case = MODELS["two_heads"]
    batches = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()} for b in case.batches(1) * 150]

    def last(tx: ft.Transform, dtype: torch.dtype = torch.bfloat16) -> float:
        model = case.model(dtype)
        state, step = ft.init(model, tx), ft.train_step(model, case.loss_fn, tx)
        for batch in batches:
            own = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
            state, metrics = step(state, own)
            assert all(p.dtype == dtype for p in state.params.values())
        return float(metrics["loss"].compute())

    rate = 1e-4  # so small that bfloat16 parameters lose most of the updates
    reference = last(ft.optim.adamw(rate), torch.float32)
    stuck = last(ft.optim.adamw(rate))
    got = last(getattr(ft.optim, wrapper)(ft.optim.adamw(rate)))
    assert abs(got - reference) < 0.25 * abs(stuck - reference)
