"""L-BFGS: parity with torch.optim.LBFGS in float64, the form of its state, and what it says when it is misused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import optim_db

import ftrain as ft
from ftrain import tree

Params = dict[str, Tensor]


def start(dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"weight": (4, 3), "bias": (4,), "scale": ()}
    params = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return params | {"phase": torch.randn(2, generator=generator, dtype=dtype).to(dtype.to_complex())}


X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss(params: Params) -> Tensor:
    """A small regression, curved enough that steps of fixed length do not arrive at once."""
    out = torch.tanh(X.to(params["bias"].dtype) @ params["weight"].T + params["bias"]) * (1.0 + params["scale"])
    ridge = sum(0.1 * p.abs().square().sum() for p in params.values())
    return (out - Y.to(out.dtype)).square().mean() + ridge + params["phase"].real.cos().sum()


def value_fn(params: Params) -> tuple[Tensor, Params]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    value = loss(leaves)
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def one_update(tx: ft.Transform, params: Params, state: Any, **more: Any) -> tuple[Params, Any]:
    updates, state = tx.update(value_fn(params)[1], state, params, **{"value_fn": value_fn, **more})
    return ft.optim.apply_updates(params, updates), state


def ours(tx: ft.Transform, updates: int) -> tuple[Params, Any]:
    params = start()
    state = tx.init(params)
    for _ in range(updates):
        params, state = one_update(tx, params, state)
    return params, state


def by_torch(updates: int, **kwargs: Any) -> tuple[Params, Any]:
    leaves = {name: p.clone().requires_grad_() for name, p in start().items()}
    order = sorted(leaves)  # in which a state's leaves lie
    optimizer = torch.optim.LBFGS([leaves[name] for name in order], **kwargs)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(leaves)
        value.backward()
        return value

    for _ in range(updates):
        optimizer.step(closure)
    return {name: p.detach() for name, p in leaves.items()}, optimizer.state[leaves[order[0]]]


TABLE = next(info for info in optim_db if info.optim_cls is torch.optim.LBFGS).optim_inputs_func(device="cpu")
CASES: dict[str, dict[str, Any]] = {
    **{f"table: {one.desc}": one.kwargs for one in TABLE},
    "defaults": {},
    "one iteration": {"lr": 0.1, "max_iter": 1},
    "strong wolfe": {"line_search_fn": "strong_wolfe"},
    "strong wolfe, short": {"line_search_fn": "strong_wolfe", "max_iter": 3, "lr": 0.5},
    "few evaluations": {"line_search_fn": "strong_wolfe", "max_eval": 4},
    "few evaluations, no search": {"max_eval": 3, "lr": 0.3},
    "short history": {"lr": 0.4, "history_size": 2, "max_iter": 6},
    "short history, searched": {"history_size": 2, "max_iter": 6, "line_search_fn": "strong_wolfe"},
    "coarse gradient": {"lr": 0.3, "tolerance_grad": 0.05},
    "coarse change": {"lr": 0.3, "tolerance_change": 1e-2},
    "tensor lr": {"lr": torch.tensor(0.3, dtype=torch.float64), "max_iter": 4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("updates", [1, 5])
def test_parity_with_torch(case: str, updates: int) -> None:
    kwargs = CASES[case]
    expected, kept = by_torch(updates, **kwargs)
    got, state = ours(ft.optim.lbfgs(**kwargs), updates)
    for name, p in start().items():
        moved = (expected[name] - p).abs().max()
        assert moved > 1e-3, f"{name} did not move, so nothing was compared"
        assert (got[name] - expected[name]).abs().max() < 1e-9 * moved, name
    assert int(state.iterations) == kept["n_iter"]


def test_every_argument_of_torch_is_varied() -> None:
    known = set(inspect.signature(torch.optim.LBFGS).parameters) - {"params"}
    assert known == set(inspect.signature(ft.optim.lbfgs).parameters)
    assert known == {name for kwargs in CASES.values() for name in kwargs}


def test_the_comparison_fails_on_another_learning_rate() -> None:
    expected, _ = by_torch(2, lr=0.3, max_iter=3)
    got, _ = ours(ft.optim.lbfgs(0.3 * (1 + 1e-7), max_iter=3), 2)
    assert (got["weight"] - expected["weight"]).abs().max() > 1e-9


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_it_minimises_rosenbrock(line_search_fn: str | None) -> None:
    def rosenbrock(params: Params) -> tuple[Tensor, Params]:
        x = params["x"].detach().requires_grad_()
        value = (100.0 * (x[1:] - x[:-1].square()).square() + (1.0 - x[:-1]).square()).sum()
        return value.detach(), {"x": torch.autograd.grad(value, x)[0]}

    tx = ft.optim.lbfgs(1.0 if line_search_fn else 0.3, max_iter=200, line_search_fn=line_search_fn, history_size=5)
    params = {"x": torch.tensor([-1.0, 1.2, 0.8], dtype=torch.float64)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(rosenbrock(params)[1], state, params, value_fn=rosenbrock)
        params = ft.optim.apply_updates(params, updates)
    torch.testing.assert_close(params["x"], torch.ones(3, dtype=torch.float64), rtol=0.0, atol=1e-5)


# -- state ----------------------------------------------------------------------------------------------------------------------


def test_the_state_keeps_its_form_and_nothing_is_changed_in_place() -> None:
    tx = ft.optim.lbfgs(line_search_fn="strong_wolfe", history_size=3, max_iter=4)
    params = start()
    state = tx.init(params)
    for _ in range(3):
        before = tree.map(torch.clone, (params, state))
        new, after = one_update(tx, params, state)
        tree.check_same(state, after, root="state.opt", what="L-BFGS changed the form of its state.")
        for was, now in zip(tree.leaves(before), tree.leaves((params, state)), strict=True):
            assert torch.equal(was, now)
        params, state = new, after
    assert int(state.pairs) > 3  # so the ring has gone round


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_a_copied_state_goes_on_bitwise_as_the_state_itself(line_search_fn: str | None) -> None:
    make = lambda: ft.optim.lbfgs(0.5, max_iter=3, history_size=3, line_search_fn=line_search_fn)  # noqa: E731
    tx, again = make(), make()
    params, state = ours(tx, 4)
    copied = tree.map(torch.clone, state)
    for _ in range(3):
        (one, state), (two, copied) = one_update(tx, params, state), one_update(again, params, copied)
        assert all(torch.equal(one[name], two[name]) for name in one)
        params = one


def test_init_on_meta_has_the_same_structure() -> None:
    tx = ft.optim.lbfgs(history_size=3)
    real, meta = tx.init(start()), tx.init({name: p.to("meta") for name, p in start().items()})
    assert tree.same_structure(real, meta)
    for a, b in zip(tree.leaves(real), tree.leaves(meta), strict=True):
        assert (a.shape, a.dtype, b.device.type) == (b.shape, b.dtype, "meta")


def test_parameters_of_two_dtypes_keep_theirs() -> None:
    def quadratic(params: Params) -> tuple[Tensor, Params]:
        value = sum((p.double() - 1.0).square().sum() for p in params.values())
        return value, {name: (2.0 * (p.double() - 1.0)).to(p.dtype) for name, p in params.items()}

    params = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}
    tx = ft.optim.lbfgs(line_search_fn="strong_wolfe")
    updates, state = tx.update(quadratic(params)[1], tx.init(params), params, value_fn=quadratic)
    assert {name: u.dtype for name, u in updates.items()} == {"a": torch.float32, "b": torch.float64}
    assert state.grad.dtype == torch.float64
    assert all((u - 1.0).abs().max() < 1e-6 for u in updates.values())


# -- in a step ------------------------------------------------------------------------------------------------------------------


def regression() -> tuple[Any, Any, dict[str, Tensor]]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    return model, lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(), {"x": X, "y": Y}


@pytest.mark.parametrize("chained", [False, True])
def test_a_train_step_searches_along_the_line(chained: bool) -> None:
    model, loss_fn, batch = regression()
    tx = ft.optim.lbfgs(line_search_fn="strong_wolfe", max_iter=10)
    tx = ft.optim.chain(tx) if chained else tx
    state, step = ft.init(model, tx), ft.train_step(model, loss_fn, tx)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.LBFGS([leaves[n] for n in sorted(leaves)], line_search_fn="strong_wolfe", max_iter=10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss_fn(lambda x: torch.func.functional_call(model, leaves, (x,)), batch)
        value.backward()
        return value

    for _ in range(3):
        state, metrics = step(state, batch)
        optimizer.step(closure)
    assert float(metrics["lr"].compute()) == 1.0
    for name, p in leaves.items():
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-8, atol=1e-10)


def test_a_compiled_step_runs_it_outside_of_a_graph_and_says_why() -> None:
    model, loss_fn, batch = regression()
    tx = ft.optim.lbfgs(line_search_fn="strong_wolfe", max_iter=5)
    state, step = ft.init(model, tx), ft.train_step(model, loss_fn, tx)
    fast = ft.compile(step, backend="eager")
    with pytest.warns(ft.errors.CompileWarning, match="L-BFGS reads values on the host and runs outside of a graph"):
        new, _ = fast(state.copy(), batch)
    assert fast.rung == "loss"
    expected, _ = step(state, batch)
    for name, p in expected.params.items():
        torch.testing.assert_close(new.params[name], p, rtol=1e-8, atol=1e-10)


# -- misuse ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kwargs"), [{}, {"max_iter": 1, "line_search_fn": "strong_wolfe"}])
def test_no_value_fn_where_one_is_needed(kwargs: dict[str, Any]) -> None:
    tx = ft.optim.lbfgs(**kwargs)
    params = start()
    with pytest.raises(ft.errors.ModelError, match=r"has no way to.\n(.|\n)*value_fn=value_fn(.|\n)*max_iter=1"):
        tx.update(value_fn(params)[1], tx.init(params), params)


def test_one_iteration_without_a_search_needs_no_value_fn() -> None:
    tx = ft.optim.lbfgs(0.1, max_iter=1)
    params = start()
    got, _ = one_update(tx, params, tx.init(params), value_fn=None)
    expected, _ = by_torch(1, lr=0.1, max_iter=1)
    assert all((got[name] - p).abs().max() < 1e-15 for name, p in expected.items())


def test_a_chain_that_changes_the_gradient_but_not_the_loss() -> None:
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(0.1), ft.optim.lbfgs(line_search_fn="strong_wolfe"))
    params = start()
    with pytest.raises(ft.errors.ModelError, match=r"is not that of the loss that it evaluates(.|\n)*of norm 0.1\n"):
        one_update(tx, params, tx.init(params))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"line_search_fn": "armijo"}, "no line search 'armijo'(.|\n)*strong_wolfe"),
        ({"max_iter": 0}, "max_iter=0 makes no sense(.|\n)*from 1 on"),
        ({"history_size": 2.5}, "history_size=2.5 makes no sense"),
        ({"max_eval": 0}, "max_eval=0 makes no sense"),
        ({"lr": -1.0}, "lr=-1.0 is negative"),
        ({"tolerance_grad": -1.0}, "tolerance_grad=-1.0 is negative"),
    ],
)
def test_bad_hyper_parameters(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ft.errors.LimitError, match=text):
        ft.optim.lbfgs(**kwargs)


def test_vmap_says_that_it_cannot() -> None:
    tx = ft.optim.lbfgs(max_iter=1)
    params = {"w": torch.ones(2, 3)}

    def one(w: Tensor) -> Tensor:
        return tx.update({"w": w}, tx.init({"w": w}), {"w": w})[0]["w"]

    with pytest.raises(ft.errors.CompileError, match="cannot run inside vmap"):
        torch.func.vmap(one)(params["w"])
