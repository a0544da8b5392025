"""The laws of an optimizer, over every row of the corpus. A new one is a row of `RULES` there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ftrain as ft
from ftrain import tree
from ftrain.errors import LimitError, ModelError

from .corpus import ALL_OPTIMIZERS, RULES, Rule

Params = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {"matrix": (3, 4), "scalar": (), "vector": (5,)}


def leaves(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for k, shape in SHAPES.items()}


def update(tx: ft.Transform, fn: Callable[[Params], Tensor], state: Any, params: Params) -> tuple[Params, Any]:
    """One update for this loss, and the new parameters; a transform with a line search gets the loss as well."""

    def value_fn(params: Params) -> tuple[Tensor, Params]:
        grads, value = torch.func.grad_and_value(fn)(params)
        return value, grads

    more = {"value_fn": value_fn} if "value_fn" in inspect.signature(tx.update).parameters else {}
    updates, state = tx.update(value_fn(params)[1], state, params, **more)
    return ft.optim.apply_updates(params, updates), state


def wavy(seed: int) -> Callable[[Params], Tensor]:
    """A loss of all leaves, another for each seed."""
    return lambda params: sum(
        (0.7 * (p - 0.5).square() + 0.4 * torch.sin(3.0 * p + seed)).sum() for p in params.values()
    )


def run(tx: ft.Transform, steps: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Params, Any]:
    params = leaves(0, dtype)
    state = tx.init(params)
    for step in range(steps):
        params, state = update(tx, wavy(step), state, params)
    return params, state


def close(a: Any, b: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    assert tree.same_structure(a, b)
    for (path, one), two in zip(tree.items(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol, msg=lambda text, path=path: f"{path}: {text}")


# ------------------------------------------------------------------------------------------------------ form and purity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_an_update_keeps_the_form_of_state_and_gradient(name: str, dtype: torch.dtype) -> None:
    tx = ALL_OPTIMIZERS[name]()
    params = leaves(0, dtype)
    before = state = tx.init(params)
    for seed in range(3):
        grads = torch.func.grad(wavy(seed))(params)
        if "value_fn" not in inspect.signature(tx.update).parameters:
            updates, _ = tx.update(grads, state, params)
            for key, grad in grads.items():
                assert updates[key].shape == grad.shape
                allowed = {dtype, torch.float32} if dtype == torch.bfloat16 else {dtype}
                assert updates[key].dtype in allowed, key
        old = params
        params, state = update(tx, wavy(seed), state, params)
        tree.check_same(before, state, root="state", what="the update changed the form of the state.")
        tree.check_same(old, params, root="params", what="the update changed the form of the parameters.")
    start = leaves(0, dtype)
    assert all(not torch.equal(params[key], start[key]) for key in SHAPES), "nothing moved"
    assert all(bool(torch.isfinite(leaf).all()) for leaf in tree.leaves((params, state)))


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_a_state_has_the_same_form_on_the_meta_device(name: str) -> None:
    tx = ALL_OPTIMIZERS[name]()
    real = tx.init(leaves(0, torch.float32))
    meta = tx.init({key: p.to("meta") for key, p in leaves(0, torch.float32).items()})
    tree.check_same(
        tree.map(lambda leaf: leaf.to("meta"), real), meta, root="state", what="init depends on the device."
    )


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_an_update_changes_none_of_its_arguments_and_shares_no_memory(name: str) -> None:
    tx = ALL_OPTIMIZERS[name]()
    params = leaves(0)
    state = tx.init(params)
    for seed in range(3):
        kept = tree.map(torch.clone, (state, params))
        new, after = update(tx, wavy(seed), state, params)
        close((state, params), kept, rtol=0.0)
        memory = [leaf.untyped_storage().data_ptr() for leaf in tree.leaves((new, after))]
        assert len(set(memory)) == len(memory), "two leaves of one state share memory, so it cannot be donated"
        params, state = new, after


@pytest.mark.parametrize("name", RULES)
def test_the_state_shows_the_learning_rate(name: str) -> None:
    _, state = run(RULES[name](), steps=1)
    rates = {float(value) for key, value in ft.optim.metrics(state).items() if key.startswith("lr")}
    assert list(rates) == [pytest.approx(RULES[name].options.get("lr", 1.0))]


# -------------------------------------------------------------------------------------------------------- compile and vmap


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_an_update_traces_whole_and_computes_the_same(name: str) -> None:
    tx = ALL_OPTIMIZERS[name]()
    params, state = run(tx, steps=2)
    grads = torch.func.grad(wavy(2))(params)
    torch._dynamo.reset()
    traced = torch.compile(tx.update, backend="eager", fullgraph=True)
    close(traced(grads, state, params), tx.update(grads, state, params))


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_a_vmapped_update_is_a_loop(name: str) -> None:
    tx = ALL_OPTIMIZERS[name]()
    rows = []
    for seed in range(3):
        params = leaves(seed)
        state = tx.init(params)
        for step in range(seed):  # each at another count
            params, state = update(tx, wavy(step), state, params)
        rows.append((torch.func.grad(wavy(7))(params), state, params))
    stacked = tree.map(lambda *row: torch.stack(row), *rows)
    looped = tree.map(lambda *row: torch.stack(row), *[tx.update(*row) for row in rows])
    close(torch.func.vmap(tx.update)(*stacked), looped, atol=RULES[name].atol if name in RULES else 1e-14)


def host_reads(fn: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn()
    return sum(e.count for e in profile.key_averages() if e.key == "aten::_local_scalar_dense")


@pytest.mark.parametrize("name", ALL_OPTIMIZERS)
def test_an_update_reads_nothing_on_the_host(name: str) -> None:
    tx = ALL_OPTIMIZERS[name]()
    params, state = run(tx, steps=1)
    grads = torch.func.grad(wavy(1))(params)
    assert host_reads(lambda: tx.update(grads, state, params)) == 0


def test_a_host_read_is_found() -> None:
    some = list(leaves(0).values())
    assert host_reads(lambda: torch._foreach_add(some, torch.tensor(1.0))) > 0  # what lists.py goes around


# ------------------------------------------------------------------------------------------------------- hyper-parameters

AT_THE_START = {"rprop": {"lr"}, "adagrad": {"initial_accumulator_value"}}


def numbers(rule: Rule) -> dict[str, float]:
    """The numeric hyper-parameters of a row, at the row's value or the default."""
    found = {name: one.default for name, one in inspect.signature(rule.make).parameters.items()} | rule.options
    return {name: value for name, value in found.items() if type(value) is float}


@pytest.mark.parametrize("name", RULES)
def test_a_hyper_parameter_may_be_a_schedule_a_tensor_or_a_leaf_of_the_state(name: str) -> None:
    rule = RULES[name]
    # a zero turns something off (a momentum buffer), which only a number can
    given = {key: value for key, value in numbers(rule).items() if value != 0 and key not in rule.signed}
    assert given
    expected, _ = run(rule())
    schedules = {k: ft.schedules.constant(v) for k, v in given.items() if k not in AT_THE_START.get(name, ())}
    close(run(rule.make(**rule.options | schedules))[0], expected)
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in given.items()}
    close(run(rule.make(**rule.options | tensors))[0], expected)
    for values in (given, tensors, schedules):
        injected, state = run(ft.optim.inject(rule.make)(**rule.options | values))
        close(injected, expected)
        assert set(values) <= set(state.hyper)


@pytest.mark.parametrize("name", [name for name in RULES if "lr" not in AT_THE_START.get(name, ())])
def test_a_schedule_is_called_with_the_number_of_updates_made(name: str) -> None:
    rule = RULES[name]

    def rate(step: int) -> float:
        return 0.05 / (1 + step)

    lr = ft.schedules.ScheduleFn(lambda step: 0.05 / (1 + step), "harmonic")
    scheduled, injected = (
        rule.make(**rule.options | {"lr": lr}),
        ft.optim.inject(rule.make)(**rule.options | {"lr": 1.0}),
    )
    params = leaves(0)
    one, two = (params, scheduled.init(params)), (params, injected.init(params))
    for step in range(4):
        one = update(scheduled, wavy(step), one[1], one[0])
        hyper = {**two[1].hyper, "lr": torch.tensor(rate(step), dtype=torch.float64)}
        two = update(injected, wavy(step), two[1]._replace(hyper=hyper), two[0])
    close(one[0], two[0])


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, key) for name, rule in RULES.items() for key in numbers(rule) if key not in rule.signed],
)
def test_a_negative_hyper_parameter_is_refused(name: str, argument: str) -> None:
    with pytest.raises(LimitError, match=rf"{argument}=-0\.1 is negative.(.|\n)*fix: +{argument}=0\.1"):
        RULES[name].make(**RULES[name].options | {argument: -0.1})


@pytest.mark.parametrize(
    "name", [name for name in RULES if "maximize" in inspect.signature(RULES[name].make).parameters]
)
def test_maximize_climbs_where_the_rule_descends(name: str) -> None:
    """Climbing a loss is descending its negative; the decay stays a decay."""
    rule = RULES[name]
    params = leaves(0)
    grads = torch.func.grad(wavy(0))(params)
    down, up = rule(), rule.make(**rule.options | {"maximize": True})
    minus = {key: -g for key, g in grads.items()}
    close(up.update(grads, up.init(params), params), down.update(minus, down.init(params), params))


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "b1": (lambda: ft.optim.adamax(0.1, b1=1.0), LimitError, r"b1=1\.0 is not below 1"),
    "b2": (lambda: ft.optim.adamw(0.1, b2=1), LimitError, r"b2=1 is not below 1"),
    "rho": (lambda: ft.optim.adadelta(rho=1.5), LimitError, r"rho=1\.5 is not below 1"),
    "nesterov": (lambda: ft.optim.sgd(0.1, nesterov=True), LimitError, "nesterov=True needs a momentum"),
    "nesterov dampened": (
        lambda: ft.optim.sgd(0.1, momentum=0.9, nesterov=True, dampening=0.1),
        LimitError,
        "nesterov=True allows no dampening",
    ),
    "dampening": (lambda: ft.optim.sgd(0.1, dampening=0.1), LimitError, "dampening needs a momentum"),
    "etas": (lambda: ft.optim.rprop(0.1, eta_plus=0.9), LimitError, "0 < eta_minus < 1 < eta_plus"),
    "first step": (
        lambda: ft.optim.rprop(ft.schedules.constant(0.1)),
        LimitError,
        r"lr=constant\(0\.1\) cannot be a schedule(.|\n)*before the first update",
    ),
    "first sum": (
        lambda: ft.optim.adagrad(0.1, initial_accumulator_value=ft.schedules.constant(0.1)),
        LimitError,
        "initial_accumulator_value=.* cannot be a schedule",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_refused(case: str) -> None:
    make, error, text = BAD[case]
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    "make", [ft.optim.adam, ft.optim.adamax, ft.optim.rprop, ft.optim.rmsprop], ids=lambda f: f.__name__
)
def test_complex_parameters_are_refused(make: Callable[..., ft.Transform]) -> None:
    with pytest.raises(
        ModelError, match=rf"{make.__name__}: complex parameters(.|\n)*params\['w'\](.|\n)*view_as_real"
    ):
        make(0.1).init({"w": torch.ones(2, dtype=torch.complex64)})


def test_a_centered_variance_of_less_than_nothing_is_no_nan() -> None:
    """Where all gradients are equal, rounding leaves the variance below zero in float32; `torch.optim.RMSprop` gives NaN."""
    tx = ft.optim.rmsprop(1e-3, decay=0.5, eps=1.0, centered=True)
    params = {"w": torch.linspace(0.1, 3.0, 1000)}
    state = tx.init(params)
    for _ in range(40):
        updates, state = tx.update(params, state, params)
    assert bool((state.nu["w"] - state.mu["w"].square() < 0).any()), "no case of what is tested"
    assert bool(updates["w"].isfinite().all())


# ------------------------------------------------------------------------------------------------------------- convergence

STEPS, TOLERANCE = 600, 0.05


def quadratic(params: Params) -> Tensor:
    """Minimum at 1/2 everywhere; curvatures from 1 to 5."""
    return sum(
        (torch.linspace(1.0, 5.0, p.numel(), dtype=p.dtype).view_as(p) * (p - 0.5).square() / 2).sum()
        for p in params.values()
    )


def rosenbrock(params: Params) -> Tensor:
    """`(1 - x)^2 + 10 (y - x^2)^2`, four times over: a bent valley with its minimum at (1, 1)."""
    x, y = params["x"], params["y"]
    return ((1.0 - x).square() + 10.0 * (y - x * x).square()).sum()


PROBLEMS: dict[str, tuple[Callable[[Params], Tensor], Params, float]] = {
    "quadratic": (quadratic, {k: p + 1.0 for k, p in leaves(0).items()}, 0.5),
    "rosenbrock": (
        rosenbrock,
        {
            "x": torch.tensor([[-1.0, -0.8], [-0.5, 0.0]], dtype=torch.float64),
            "y": torch.tensor([[1.0, 0.5], [-0.5, -0.3]], dtype=torch.float64),
        },
        1.0,
    ),
}


def distance(tx: ft.Transform, problem: str) -> tuple[float, float]:
    """The largest distance of an element from the minimum, before and after."""
    fn, params, best = PROBLEMS[problem]

    def far(params: Params) -> float:
        return max(float((p - best).abs().max()) for p in params.values())

    before, state = far(params), tx.init(params)
    for _ in range(STEPS):
        params, state = update(tx, fn, state, params)
    return before, far(params)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", RULES)
def test_every_optimizer_finds_the_minimum(name: str, problem: str) -> None:
    rule = RULES[name]
    before, after = distance(rule.make(**rule.options | getattr(rule, problem)), problem)
    assert before > 1.0
    assert after < TOLERANCE


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_does_not_optimize_does_not_find_it(problem: str) -> None:
    fn, params, _ = PROBLEMS[problem]
    still = ft.optim.chain(ft.optim.identity(), ft.optim.sgd(0.0))
    assert distance(still, problem)[1] > 1.0
    uphill = ft.optim.adam(0.1, maximize=True)
    assert distance(uphill, problem)[1] > 1.0
    assert float(fn(params)) > 1.0
