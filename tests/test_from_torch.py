"""`from_torch`: every optimizer of torch, and hand-written ones that keep Python numbers in all places, equal their own loop.

The reference is always the optimizer itself, on the same gradients. Parameters agree bitwise, or to the rounding of one addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import optim_db

import ftrain as ft
from ftrain import tree
from ftrain.optim.kept import Float, Int

STEPS = 20
Params = dict[str, Tensor]
Kwargs = dict[str, Any]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Torch keeps scalars of its state in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def start(kind: type[torch.optim.Optimizer]) -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (3, 4), "b.weight": (2, 3), "b.bias": (5,), "scale": ()}
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: p for name, p in params.items() if kind is not torch.optim.Muon or p.ndim == 2}


def loss(params: Params, step: int) -> Tensor:
    total = sum((0.7 * (p - 0.5).square() + 0.4 * torch.sin(3.0 * p + step)).sum() for p in params.values())
    return total + torch.tanh(sum(p.sum() for p in params.values()))


def value_and_grads(params: Params, step: int) -> tuple[Tensor, Params]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    value = loss(leaves, step)
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def by_torch(kind: Any, kwargs: Kwargs, *, groups: Any = None, steps: int = STEPS, closure: bool = False) -> Params:
    leaves = {name: p.clone().requires_grad_() for name, p in start(kind).items()}
    optimizer = kind(groups(leaves) if groups else [leaves[name] for name in sorted(leaves)], **kwargs)
    for step in range(steps):

        def evaluate(step: int = step) -> Tensor:
            value, grads = value_and_grads(leaves, step)
            for name, g in grads.items():
                leaves[name].grad = g
            return value

        evaluate()
        optimizer.step(*([evaluate] if closure else []))
    return {name: p.detach() for name, p in leaves.items()}


def ours(kind: Any, tx: ft.Transform, *, steps: int = STEPS, copy_at: int = STEPS // 2) -> tuple[Params, Any]:
    params = start(kind)
    state = tx.init(params)
    for step in range(steps):
        if step == copy_at:
            state = tree.map(torch.clone, state)
        grads = value_and_grads(params, step)[1]
        more = {}
        if ft.optim.transform.takes_value_fn(tx):
            more["value_fn"] = lambda params, step=step: value_and_grads(params, step)
        updates, new = tx.update(grads, state, params, **more)
        tree.check_same(state, new, root="state", what="the state changed its form.")
        tree.check_same(grads, updates, root="updates", what="the updates are not like the gradients.")
        params, state = ft.optim.apply_updates(params, updates), new
    return params, state


def check_equal(got: Params, expected: Params, kind: Any) -> None:
    for name, p in start(kind).items():
        assert (expected[name] - p).abs().max() > 1e-4, f"{name} did not move, so nothing was compared"
        assert (got[name] - expected[name]).abs().max() <= 1e-15, name


# -- every optimizer of torch -----------------------------------------------------------------------------------------------------

EXEMPT = {"SparseAdam": "sparse gradients alone", "LBFGS": "see test_lbfgs_is_run_by_ours"}


def cases() -> list[Any]:
    found = []
    for info in optim_db:
        if info.name in EXEMPT:
            continue
        kind = info.optim_cls
        listed = [(one.desc, dict(one.kwargs)) for one in info.optim_inputs_func(device="cpu")]
        for flag in ("foreach", "fused", "capturable"):
            on_cpu = flag == "foreach" or (flag == "fused" and "cpu" in info.supports_fused_on)
            if flag in info.supported_impls and on_cpu:
                listed.append((flag, {flag: True}))
        for description, kwargs in listed:
            if isinstance(kwargs.get("lr"), Tensor):  # torch multiplies it in its own dtype
                kwargs["lr"] = kwargs["lr"].to(torch.float64)
            found.append(pytest.param(kind, kwargs, id=f"{kind.__name__}: {description}"))
    return found


@pytest.mark.parametrize(("kind", "kwargs"), cases())
def test_every_optimizer_equals_its_own_loop(kind: Any, kwargs: Kwargs) -> None:
    got, state = ours(kind, ft.optim.from_torch(kind, **kwargs))
    check_equal(got, by_torch(kind, kwargs), kind)
    lr = kwargs.get("lr", kind(list(start(kind).values())).defaults["lr"])
    assert {k: float(v) for k, v in ft.optim.metrics(state).items()} == {"lr": float(lr)}


def test_no_optimizer_is_lost() -> None:
    names = {case.values[0].__name__ for case in cases()}
    assert names | set(EXEMPT) == {info.name for info in optim_db}
    flags = [case.id for case in cases() if case.id.endswith(("fused", "foreach"))]
    assert {"AdamW: fused", "AdamW: foreach", "SGD: fused"} <= set(flags)


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad"])
def test_the_comparison_fails_on_another_learning_rate(name: str) -> None:
    kind = getattr(torch.optim, name)
    got, _ = ours(kind, ft.optim.from_torch(kind, lr=1e-2 * (1 + 1e-9)))
    with pytest.raises(AssertionError):
        check_equal(got, by_torch(kind, {"lr": 1e-2}), kind)


def test_lbfgs_is_run_by_ours() -> None:
    tx = ft.optim.from_torch(torch.optim.LBFGS, lr=0.5, max_iter=3, line_search_fn="strong_wolfe")
    got, state = ours(torch.optim.LBFGS, tx, steps=3, copy_at=1)
    expected = by_torch(
        torch.optim.LBFGS, {"lr": 0.5, "max_iter": 3, "line_search_fn": "strong_wolfe"}, steps=3, closure=True
    )
    assert type(state) is ft.optim.LbfgsState
    for name, p in expected.items():
        torch.testing.assert_close(got[name], p, rtol=1e-9, atol=1e-9)


# -- optimizers by hand -------------------------------------------------------------------------------------------------------------


class Counting(torch.optim.Optimizer):
    """Keeps Python numbers, lists and None for each parameter, in its groups, and on itself; all of them matter."""

    def __init__(self, params: Any, lr: float = 0.1, power: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "power": power, "seen": 0, "best": math.inf})
        self.total = 0.0

    def step(self, closure: Any = None) -> None:
        self.total += 0.5
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"t": 0, "speed": 1.0, "up": True, "last": [torch.zeros_like(p), None], "unused": None}
                state["t"] += 1
                state["up"] = not state["up"]
                state["speed"] *= 0.9 if state["up"] else 1.05
                group["best"] = min(group["best"], p.grad.norm().item())  # a value: this needs real tensors
                state["last"][0] = 0.5 * state["last"][0] + p.grad
                size = group["lr"] * state["speed"] / (state["t"] + group["seen"] + self.total) ** group["power"]
                p.data.add_(state["last"][0] / (1.0 + group["best"]), alpha=-size)


def test_numbers_in_all_places_are_kept() -> None:
    got, state = ours(Counting, ft.optim.from_torch(Counting, lr=0.2), copy_at=7)
    check_equal(got, by_torch(Counting, {"lr": 0.2}), Counting)
    kept = state.kept.slots["scale"]
    assert type(kept["t"]) is Int
    assert type(kept["speed"]) is Float
    assert int(kept["t"].value) == STEPS
    assert int(state.kept.groups[""]["seen"].value) == STEPS
    assert float(state.kept.own["total"].value) == STEPS / 2


class Noisy(torch.optim.Optimizer):
    """Draws random numbers."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad + torch.randn_like(p) + float(np.random.rand()), alpha=-self.param_groups[0]["lr"])


def test_init_leaves_the_users_generators_alone(rng_guard: Any) -> None:
    tx = ft.optim.from_torch(Noisy, lr=0.1)
    params = {"w": torch.zeros(3)}
    with rng_guard():
        state = tx.init(params)
    torch.manual_seed(0)
    one, _ = tx.update({"w": torch.ones(3)}, state, params)
    torch.manual_seed(1)
    two, _ = tx.update({"w": torch.ones(3)}, state, params)
    assert not torch.equal(one["w"], two["w"])


class Backtracking(torch.optim.Optimizer):
    """Halves its step until the loss falls: demands a closure."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        params = self.param_groups[0]["params"]
        value, size = closure(), self.param_groups[0]["lr"]
        before, grads = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
        while True:
            with torch.no_grad():
                for p, b, g in zip(params, before, grads, strict=True):
                    p.copy_(b - size * g)
            if closure() < value or size < 1e-6:
                break
            size /= 2
        return value


def test_an_optimizer_that_demands_a_closure_gets_one() -> None:
    tx = ft.optim.from_torch(Backtracking, lr=2.0)
    got, _ = ours(Backtracking, tx)
    check_equal(got, by_torch(Backtracking, {"lr": 2.0}, closure=True), Backtracking)
    params = start(Backtracking)
    with pytest.raises(ft.errors.ModelError, match=r"Backtracking.step\(closure\) evaluates the loss again"):
        tx.update(value_and_grads(params, 0)[1], tx.init(params), params)


class TakesBoth(torch.optim.SGD):
    """Calls a closure where it is given one, and takes twice the step then."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        out = super().step(closure)
        return out if closure is None else super().step(closure)


def test_an_optional_closure_is_given_where_asked_for() -> None:
    plain, _ = ours(TakesBoth, ft.optim.from_torch(TakesBoth, lr=0.01))
    check_equal(plain, by_torch(TakesBoth, {"lr": 0.01}), TakesBoth)
    twice, _ = ours(TakesBoth, ft.optim.from_torch(TakesBoth, closure=True, lr=0.01))
    check_equal(twice, by_torch(TakesBoth, {"lr": 0.01}, closure=True), TakesBoth)
    assert not torch.equal(plain["scale"], twice["scale"])


# -- hyper-parameters and groups --------------------------------------------------------------------------------------------------


def decay(step: Tensor) -> Tensor:
    return 0.1 / (1.0 + step.to(torch.float64))


@pytest.mark.parametrize("scheduled", ["lr", "function", "weight_decay", "betas"])
def test_schedules(scheduled: str) -> None:
    schedule = ft.schedules.ScheduleFn(decay)
    kwargs: Kwargs = {
        "lr": {"lr": schedule},
        "function": {"lr": decay},
        "weight_decay": {"lr": 0.01, "weight_decay": schedule},
        "betas": {"lr": 0.01, "betas": (schedule, 0.99)},
    }[scheduled]
    got, state = ours(torch.optim.AdamW, ft.optim.from_torch(torch.optim.AdamW, **kwargs))
    leaves = {name: p.clone().requires_grad_() for name, p in start(torch.optim.AdamW).items()}
    optimizer = torch.optim.AdamW(list(leaves.values()), lr=0.01, betas=(0.9, 0.99 if scheduled == "betas" else 0.999))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            at = float(decay(torch.tensor(step)))
            name = "lr" if scheduled == "function" else scheduled
            group[name] = (at, 0.99) if name == "betas" else at
        for name, g in value_and_grads(leaves, step)[1].items():
            leaves[name].grad = g
        optimizer.step()
    check_equal(got, {name: p.detach() for name, p in leaves.items()}, torch.optim.AdamW)
    last = float(decay(torch.tensor(STEPS - 1))) if scheduled in ("lr", "function") else 0.01
    assert float(state.metrics()["lr"]) == last


def test_groups() -> None:
    tx = ft.optim.from_torch(
        torch.optim.AdamW,
        lr=ft.schedules.ScheduleFn(decay),
        groups={"*.bias": {"weight_decay": 0.0}, "b.*": {"lr": 0.003, "weight_decay": 0.3}},
    )
    got, state = ours(torch.optim.AdamW, tx)

    leaves = {name: p.clone().requires_grad_() for name, p in start(torch.optim.AdamW).items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [leaves["a.weight"], leaves["scale"]]},
            {"params": [leaves["b.bias"]], "weight_decay": 0.0},  # the first pattern that matches counts
            {"params": [leaves["b.weight"]], "lr": 0.003, "weight_decay": 0.3},
        ]
    )
    for step in range(STEPS):
        for group in optimizer.param_groups[:2]:
            group["lr"] = float(decay(torch.tensor(step)))
        for name, g in value_and_grads(leaves, step)[1].items():
            leaves[name].grad = g
        optimizer.step()
    check_equal(got, {name: p.detach() for name, p in leaves.items()}, torch.optim.AdamW)
    last = float(decay(torch.tensor(STEPS - 1)))
    assert {k: float(v) for k, v in ft.optim.metrics(state).items()} == {"lr": last, "lr/*.bias": last, "lr/b.*": 0.003}


class Cooling(torch.optim.SGD):
    """Changes its own learning rate."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["lr"] *= 0.9


def test_an_optimizer_that_changes_its_learning_rate() -> None:
    got, state = ours(Cooling, ft.optim.from_torch(Cooling, lr=0.1))
    check_equal(got, by_torch(Cooling, {"lr": 0.1}), Cooling)
    assert float(ft.optim.metrics(state)["lr"]) == pytest.approx(0.1 * 0.9**STEPS)
    tx = ft.optim.from_torch(Cooling, lr=decay)
    with pytest.raises(ft.errors.ModelError, match=r"Cooling changes its lr by itself(.|\n)*lr=0.01"):
        tx.init(start(Cooling))


def test_an_injected_learning_rate_is_a_leaf_that_anybody_may_replace() -> None:
    tx = ft.optim.inject(ft.optim.from_torch)(torch.optim.SGD, lr=0.5)
    params = {"w": torch.zeros(1)}
    state = tx.init(params)
    halved = state._replace(hyper={"lr": state.hyper["lr"] / 2})
    updates, after = tx.update({"w": torch.ones(1)}, halved, params)
    assert float(updates["w"]) == -0.25
    assert float(ft.optim.metrics(after)["lr"]) == 0.25


# -- purity, form, other trees ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "kwargs"), [(torch.optim.AdamW, {"fused": True}), (torch.optim.SGD, {"momentum": 0.9}), (Counting, {})]
)
def test_update_changes_nothing_that_it_was_given(kind: Any, kwargs: Kwargs) -> None:
    tx = ft.optim.from_torch(kind, **kwargs)
    params, state = ours(kind, tx, steps=3)
    given = (value_and_grads(params, 0)[1], state, params)
    before = tree.map(torch.clone, given)
    one, two = tx.update(*given), tx.update(*given)
    for was, now in zip(tree.leaves(before), tree.leaves(given), strict=True):
        assert torch.equal(was, now)
        assert now.grad is None
        assert not now.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(one), tree.leaves(two), strict=True))
    memory = {leaf.data_ptr() for leaf in tree.leaves(given)}
    assert not any(leaf.data_ptr() in memory for leaf in tree.leaves(one))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor, Counting])
def test_init_on_meta_has_the_same_structure(kind: Any) -> None:
    tx = ft.optim.from_torch(kind)
    real, meta = tx.init(start(kind)), tx.init({name: p.to("meta") for name, p in start(kind).items()})
    assert tree.same_structure(real, meta)
    for a, b in zip(tree.leaves(real), tree.leaves(meta), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert b.device.type == ("meta" if b.ndim else b.device.type)


def test_an_optimizer_that_starts_from_other_values_than_zero_starts_from_them() -> None:
    tx = ft.optim.from_torch(torch.optim.Adagrad, lr=1.0, initial_accumulator_value=3.0)
    params = {"w": torch.zeros(1)}
    updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
    assert float(updates["w"]) == pytest.approx(-0.5)
    assert float(state.kept.slots["w"]["sum"]) == 4.0


def test_parameters_of_half_precision_give_updates_of_float32() -> None:
    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    tx = ft.optim.from_torch(torch.optim.SGD, lr=0.1)
    updates, _ = tx.update({"w": torch.ones(3, dtype=torch.bfloat16)}, tx.init(params), params)
    assert updates["w"].dtype == torch.float32
    leaf = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    leaf.grad = torch.ones_like(leaf)
    torch.optim.SGD([leaf], lr=0.1).step()
    assert torch.equal((params["w"].float() + updates["w"]).bfloat16(), leaf.detach())


def test_nested_parameters() -> None:
    params = {"a": [torch.ones(2), torch.zeros(1)], "b": (torch.ones(1),)}
    tx = ft.optim.from_torch(torch.optim.SGD, lr=1.0, momentum=0.5, groups={"params['b'][0]": {"lr": 0.5}})
    updates, state = tx.update(tree.map(torch.ones_like, params), tx.init(params), params)
    assert tree.same_structure(updates, params)
    assert [u.tolist() for u in tree.leaves(updates)] == [[-1.0, -1.0], [-1.0], [-0.5]]
    assert list(state.kept.slots) == ["params['a'][0]", "params['a'][1]", "params['b'][0]"]


# -- in a step ----------------------------------------------------------------------------------------------------------------------


def network() -> tuple[Any, Any, dict[str, Tensor]]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    batch = {"x": torch.randn(16, 3), "y": torch.randn(16, 2)}
    return model, lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(), batch


@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_laws_of_a_step(kwargs: Kwargs) -> None:
    model, loss_fn, batch = network()
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(0.5), ft.optim.from_torch(torch.optim.AdamW, lr=1e-2, **kwargs))
    state, step = ft.init(model, tx), ft.train_step(model, loss_fn, tx)
    ft.testing.check_moves(step, state, batch)
    ft.testing.check_structure(step, state, batch)
    ft.testing.check_pure(step, state, batch)
    assert float(step(state, batch)[1]["lr"].compute()) == 1e-2


def test_a_compiled_step_runs_it_outside_of_a_graph_and_says_why() -> None:
    model, loss_fn, batch = network()
    tx = ft.optim.from_torch(torch.optim.AdamW, lr=1e-2, fused=True)
    state, step = ft.init(model, tx), ft.train_step(model, loss_fn, tx)
    fast = ft.compile(step, backend="eager")
    with pytest.warns(ft.errors.CompileWarning, match="AdamW changes tensors in place and runs outside of a graph"):
        new, _ = fast(state.copy(), batch)
    assert fast.rung == "loss"
    for _ in range(3):
        state, _ = step(state, batch)
    for _ in range(2):
        new, _ = fast(new, batch)
    for name, p in state.params.items():
        torch.testing.assert_close(new.params[name], p, rtol=1e-9, atol=1e-12)


# -- what cannot work ---------------------------------------------------------------------------------------------------------------


class Texts(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["phase"] = "warm-up"


class Growing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("history", []).append(p.grad.clone())


class GrowsLater(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["t"] = self.state[p].get("t", 0) + 1
            if self.state[p]["t"] > 2:
                self.state[p]["late"] = torch.ones(1)


class OfAll(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["global"] = torch.ones(1)


class Fails(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("only sparse gradients are supported\nmore")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Texts, r"Texts keeps something(.|\n)*where: +optimizer.state\['b.bias'\]\['phase'\](.|\n)*got: +str"),
        (Growing, r"Growing changes the form of its state between two steps"),
        (OfAll, r"OfAll keeps something(.|\n)*optimizer.state\['global'\]"),
        (Fails, r"Fails cannot take a step(.|\n)*RuntimeError: only sparse gradients are supported\n"),
    ],
)
def test_what_cannot_be_kept(kind: Any, text: str) -> None:
    tx = ft.optim.from_torch(kind, lr=0.1)
    with pytest.raises((ft.errors.ModelError, ft.errors.StructureError), match=text):
        tx.init({"b.bias": torch.zeros(2)})


def test_a_state_that_grows_later() -> None:
    with pytest.raises(ft.errors.StructureError, match=r"GrowsLater changes the form(.|\n)*extra \['late'\]"):
        ours(GrowsLater, ft.optim.from_torch(GrowsLater, lr=0.1))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: ft.optim.from_torch(torch.optim.AdamW([torch.zeros(1)])),
            "ModelError",
            "not an optimizer, which holds",
        ),
        (lambda: ft.optim.from_torch("adamw"), "ModelError", "wants the class(.|\n)*got: +'adamw'"),
        (lambda: ft.optim.from_torch(torch.nn.Linear), "ModelError", "wants the class of an optimizer"),
        (lambda: ft.optim.from_torch(torch.optim.SparseAdam), "ModelError", r"sparse gradients alone(.|\n)*adam\("),
        (
            lambda: ft.optim.from_torch(torch.optim.Adam, differentiable=True),
            "ModelError",
            "differentiable=True has no effect(.|\n)*ft.optim.adamw",
        ),
        (lambda: ft.optim.from_torch(torch.optim.AdamW, lr=-1.0), "LimitError", "lr=-1.0(.|\n)*Invalid learning rate"),
        (
            lambda: ft.optim.from_torch(torch.optim.AdamW, weight_decays=0.1),
            "LimitError",
            "AdamW refuses(.|\n)*fix: +weight_decay=0.1",
        ),
        (lambda: ft.optim.from_torch(torch.optim.LBFGS, groups={"*": {}}), "ModelError", "no parameter groups"),
    ],
)
def test_what_cannot_be_made(make: Callable[[], Any], error: str, text: str) -> None:
    with pytest.raises(getattr(ft.errors, error), match=text):
        make()


def test_a_group_that_matches_nothing() -> None:
    tx = ft.optim.from_torch(torch.optim.SGD, lr=0.1, groups={"*.bais": {"lr": 1.0}})
    with pytest.raises(ft.errors.ModelError, match=r"groups='\*.bais' matches no parameter(.|\n)*\*.bias"):
        tx.init(start(torch.optim.SGD))


def test_vmap_says_that_it_cannot() -> None:
    tx = ft.optim.from_torch(torch.optim.SGD, lr=0.1)
    state = tx.init({"w": torch.ones(3)})
    with pytest.raises(ft.errors.CompileError, match="cannot run inside vmap"):
        torch.func.vmap(lambda w: tx.update({"w": w}, state, {"w": w})[0]["w"])(torch.ones(2, 3))
