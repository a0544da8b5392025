"""Parity in float64 with torch.optim, driven by PyTorch's own table of optimizer cases.

`optim_db` lists every optimizer of torch with the arguments its own tests run it with. An optimizer of the table stands in `OURS`
or, with the reason, in `EXEMPT`; each of its cases is run here, step by step beside torch's, and `MORE` adds the options that the
table leaves out. Parameters agree to 1e-12 of what moved (and their own rounding), moments to 1e-12.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import ftrain as ft

STEPS = 24
Kwargs = dict[str, Any]


def renamed(make: Callable[..., ft.Transform], **names: str | tuple[str, str]) -> Callable[[Kwargs], ft.Transform]:
    """A factory that gives torch's arguments the names of ours; one that is a pair in torch is two here."""

    def factory(kwargs: Kwargs) -> ft.Transform:
        found: Kwargs = {}
        for name, value in kwargs.items():
            ours = names.get(name, name)
            found |= {ours: value} if isinstance(ours, str) else dict(zip(ours, value, strict=True))
        return make(**found)

    return factory


def adam(kwargs: Kwargs) -> ft.Transform:
    rest = {name: value for name, value in kwargs.items() if name != "decoupled_weight_decay"}
    return renamed(ft.optim.adamw if kwargs.get("decoupled_weight_decay") else ft.optim.adam, betas=BETAS)(rest)


BETAS = ("b1", "b2")

# Torch's class: how its arguments make one of our transforms. `lr` is always among them (torch's default where a case has none).
OURS: dict[type[torch.optim.Optimizer], Callable[[Kwargs], ft.Transform]] = {
    torch.optim.SGD: renamed(ft.optim.sgd),
    torch.optim.Adam: adam,
    torch.optim.AdamW: renamed(ft.optim.adamw, betas=BETAS),
    torch.optim.Adamax: renamed(ft.optim.adamax, betas=BETAS),
    torch.optim.NAdam: renamed(ft.optim.nadam, betas=BETAS),
    torch.optim.RAdam: renamed(ft.optim.radam, betas=BETAS),
    torch.optim.Adagrad: renamed(ft.optim.adagrad),
    torch.optim.Adadelta: renamed(ft.optim.adadelta),
    torch.optim.RMSprop: renamed(ft.optim.rmsprop, alpha="decay"),
    torch.optim.Rprop: renamed(
        ft.optim.rprop, etas=("eta_minus", "eta_plus"), step_sizes=("min_step_size", "max_step_size")
    ),
    torch.optim.ASGD: renamed(ft.optim.asgd),
    torch.optim.Adafactor: renamed(ft.optim.adafactor),
    torch.optim.Muon: lambda kwargs: ft.optim.muon(**kwargs).transforms["muon"],  # what it does to matrices
}

EXEMPT: dict[str, str] = {
    "LBFGS": "evaluates the loss again and again, on one batch: tests/test_lbfgs.py",
    "SparseAdam": "takes sparse gradients alone, which no transform of ftrain does",
}

# Cases of the table, by torch 2.13: fewer are a failure, since a case that is not run proves nothing.
LEAST = {
    "SGD": 9,
    "Adam": 5,
    "AdamW": 5,
    "Adamax": 5,
    "NAdam": 7,
    "RAdam": 6,
    "Adagrad": 7,
    "Adadelta": 6,
    "RMSprop": 8,
    "Rprop": 5,
    "ASGD": 7,
    "Adafactor": 5,
    "Muon": 7,
}

# How an optimizer computes, not what: there is nothing of the kind to map.
FLAGS = ("foreach", "fused", "capturable", "differentiable")

# float64, since torch multiplies it in its own dtype: in float32 its own products are rounded by up to 1e-7 (ours are not).
LR = torch.tensor(0.003, dtype=torch.float64)

# Options that the table does not vary.
MORE: dict[type[torch.optim.Optimizer], list[Kwargs]] = {
    torch.optim.SGD: [
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.8, "nesterov": True, "maximize": True},
    ],
    torch.optim.Adam: [
        {"betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": True, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    torch.optim.AdamW: [
        {"betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
        {"lr": LR, "weight_decay": 0.1},
    ],
    torch.optim.Adamax: [{"betas": (0.8, 0.95), "eps": 1e-3}, {"lr": LR}],
    torch.optim.NAdam: [
        {"betas": (0.8, 0.95), "eps": 1e-3},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ],
    torch.optim.RAdam: [
        {"betas": (0.8, 0.95), "eps": 1e-3},
        {"betas": (0.8, 0.5)},  # so short an average that it is never rectified
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ],
    torch.optim.Adagrad: [{"eps": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.5}],
    torch.optim.Adadelta: [{"eps": 1e-2, "rho": 0.5}],
    torch.optim.RMSprop: [
        {"alpha": 0.9, "eps": 1e-3, "momentum": 0.5},
        {"alpha": 0.9, "centered": True, "maximize": True},
    ],
    torch.optim.Rprop: [{"etas": (0.3, 3.0), "step_sizes": (5e-3, 0.1)}, {"lr": LR}],
    torch.optim.Adafactor: [
        {"lr": 0.5, "eps": (1e-3, 10.0), "weight_decay": 0.1, "maximize": True},
        {"lr": LR, "d": 1.01},
    ],
    torch.optim.Muon: [
        {"nesterov": False, "eps": 10.0},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"adjust_lr_fn": "original", "lr": LR},
    ],
    torch.optim.ASGD: [{"lambd": 0.1, "alpha": 0.5, "t0": 4}, {"lambd": 0.0, "t0": 0, "weight_decay": 0.1}],
}

# Torch's name of a moment: the field of our state.
MOMENTS = {
    "momentum_buffer": "momentum",
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "exp_inf": "nu",
    "max_exp_avg_sq": "nu_max",
    "sum": "sum_of_squares",
    "square_avg": {"RMSprop": "nu", "Adadelta": "e_g"},
    "acc_delta": "e_x",
    "grad_avg": "mu",
    "prev": "prev",
    "step_size": "step_size",
    "ax": "ax",
    "row_var": "row_var",
    "col_var": "col_var",
    "variance": "variance",
}

MATRICES_ONLY = {torch.optim.Muon}


@contextmanager
def default_float64() -> Iterator[None]:
    """Torch keeps scalars of its state (NAdam's product, ASGD's eta) in the default dtype; ours owe nothing to it."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def cases() -> list[Any]:
    found = []
    for info in optim_db:
        if info.optim_cls not in OURS:
            continue
        listed = [(one.desc, one.kwargs) for one in info.optim_inputs_func(device="cpu")]
        listed += [("more: " + ", ".join(kwargs), kwargs) for kwargs in MORE.get(info.optim_cls, [])]
        for description, kwargs in listed:
            dropped = [name for name in kwargs if name in FLAGS]
            name = f"{info.optim_cls.__name__}: {description}" + (f" (without {', '.join(dropped)})" if dropped else "")
            mathematical = {name: value for name, value in kwargs.items() if name not in FLAGS}
            if isinstance(mathematical.get("lr"), Tensor):  # Muon multiplies it in its own dtype, see LR
                mathematical["lr"] = mathematical["lr"].to(torch.float64)
            found.append(pytest.param(info.optim_cls, mathematical, id=name))
    return found


def with_lr(torch_class: type[torch.optim.Optimizer], kwargs: Kwargs) -> Kwargs:
    return {"lr": inspect.signature(torch_class).parameters["lr"].default, **kwargs}


# --------------------------------------------------------------------------------------------------------- the problem


def start(torch_class: type[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """A matrix, a vector, a 0-d leaf, and one whose gradient is zero."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"matrix": (3, 4), "still": (2, 2), "vector": (5,), "scalar": ()}
    params = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: p for name, p in params.items() if torch_class not in MATRICES_ONLY or p.ndim == 2}


def loss(params: dict[str, Tensor], step: int) -> Tensor:
    """Not quadratic, coupled, another at each step (gradients change their signs and sizes)."""
    total = sum(
        (0.7 * (p - 0.5).square() + 0.4 * torch.sin(3.0 * p + step)).sum() for k, p in params.items() if k != "still"
    )
    return total + torch.tanh(sum(p.sum() for k, p in params.items() if k != "still")) + 0.0 * params["still"].sum()


@default_float64()
def torch_run(torch_class: type[torch.optim.Optimizer], kwargs: Kwargs) -> Any:
    params = {name: p.clone().requires_grad_() for name, p in start(torch_class).items()}
    optimizer = torch_class(list(params.values()), **kwargs)
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            value = loss(params, step)
            value.backward()
            return value

        optimizer.step(closure)
    state = {name: optimizer.state[p] for name, p in params.items()}
    return {name: p.detach() for name, p in params.items()}, state


def our_run(torch_class: type[torch.optim.Optimizer], tx: ft.Transform) -> Any:
    params = start(torch_class)
    state = tx.init(params)
    for step in range(STEPS):

        def value_fn(params: dict[str, Tensor], step: int = step) -> tuple[Tensor, dict[str, Tensor]]:
            grads, value = torch.func.grad_and_value(loss)(params, step)
            return value, grads

        more = {"value_fn": value_fn} if "value_fn" in inspect.signature(tx.update).parameters else {}
        updates, state = tx.update(value_fn(params)[1], state, params, **more)
        params = ft.optim.apply_updates(params, updates)
    return params, state


def moments(torch_class: type[torch.optim.Optimizer], state: Any) -> Iterator[tuple[str, str, Tensor]]:
    """`(leaf, field of ours, torch's value)` for each moment that torch keeps and `MOMENTS` names."""
    for leaf, kept in state.items():
        for name, value in kept.items():
            field: Any = MOMENTS.get(name)
            field = field.get(torch_class.__name__) if isinstance(field, dict) else field
            if field is not None and isinstance(value, Tensor):
                yield leaf, field, value


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(("torch_class", "kwargs"), cases())
def test_each_case_of_torchs_table(torch_class: type[torch.optim.Optimizer], kwargs: Kwargs) -> None:
    kwargs = with_lr(torch_class, kwargs)
    before = start(torch_class)
    expected, expected_state = torch_run(torch_class, kwargs)
    got, state = our_run(torch_class, OURS[torch_class](kwargs))
    for name, reference in expected.items():
        moved = (reference - before[name]).abs().max()
        assert name == "still" or moved > 5e-4, f"{name} did not move, so nothing was compared"
        assert got[name].dtype == torch.float64
        assert got[name].shape == reference.shape
        rounding = STEPS * torch.finfo(torch.float64).eps * before[name].abs().max()  # of the parameters themselves
        assert (got[name] - reference).abs().max() <= 1e-12 * moved + rounding, name
    for name, field, value in moments(torch_class, expected_state):
        torch.testing.assert_close(getattr(state, field)[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("torch_class", OURS)
def test_the_comparison_fails_on_another_learning_rate(torch_class: type[torch.optim.Optimizer]) -> None:
    kwargs = with_lr(torch_class, {})
    expected, _ = torch_run(torch_class, kwargs)
    got, _ = our_run(torch_class, OURS[torch_class]({**kwargs, "lr": kwargs["lr"] * (1 + 1e-9)}))
    moved = (expected["matrix"] - start(torch_class)["matrix"]).abs().max()
    assert (got["matrix"] - expected["matrix"]).abs().max() > 1e-12 * moved


def test_every_optimizer_of_torch_is_here_or_exempt() -> None:
    names = {info.optim_cls.__name__ for info in optim_db}
    ours = {torch_class.__name__ for torch_class in OURS}
    assert names - ours == set(EXEMPT)
    assert all(EXEMPT.values())
    public = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert public <= ours | set(EXEMPT)


def test_no_case_of_the_table_is_lost() -> None:
    ran = Counter(case.values[0].__name__ for case in cases() if ": more: " not in case.id)
    assert {torch_class.__name__ for torch_class in OURS} == set(LEAST)
    assert {name: ran[name] for name, least in LEAST.items() if ran[name] < least} == {}


@pytest.mark.parametrize("torch_class", OURS)
def test_every_mathematical_argument_of_torch_is_varied(torch_class: type[torch.optim.Optimizer]) -> None:
    known = set(inspect.signature(torch_class).parameters) - {"params", *FLAGS}
    varied = {name for case in cases() if case.values[0] is torch_class for name in case.values[1]}
    assert known - varied - {"lr"} == set()


# --------------------------------------------------------------------------------------------------------- what torch refuses

ALLOWED = {
    "betas must be either both floats or both Tensors": "a number and a tensor mix freely here",
}


def refused() -> list[Any]:
    found = []
    for info in optim_db:
        if info.optim_cls not in OURS or info.optim_error_inputs_func is None:
            continue
        for error in info.optim_error_inputs_func("cpu", torch.float64):
            case = error.optimizer_error_input
            of_construction = error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
            mathematical = case.kwargs and not set(case.kwargs) & set(FLAGS)
            if of_construction and mathematical and error.error_regex not in ALLOWED:
                found.append(
                    pytest.param(info.optim_cls, case.kwargs, id=f"{info.optim_cls.__name__}: {error.error_regex}")
                )
    return found


@pytest.mark.parametrize(("torch_class", "kwargs"), refused())
def test_what_torch_refuses_is_refused(torch_class: type[torch.optim.Optimizer], kwargs: Kwargs) -> None:
    with pytest.raises((ValueError, TypeError), match="expected:"):
        OURS[torch_class](with_lr(torch_class, kwargs))


def test_refusals_are_not_lost() -> None:
    # the vector as a learning rate, of every optimizer, and one argument or more of its own of each
    ran = Counter(case.values[0] for case in refused())
    assert all(ran[torch_class] >= 2 for torch_class in OURS if torch_class in ran)
    assert len(refused()) >= 23
