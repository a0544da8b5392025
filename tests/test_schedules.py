"""Schedules: the numbers of torch and optax at every step, the laws over all of them, pictures, and wrong arguments."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.optim import lr_scheduler as tls
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain as ft
from ftrain import errors
from ftrain import schedules as s  # type: ignore[attr-defined]  # the door is lazy
from ftrain.optim.schedules import warmup_cosine
from ftrain.optim.schedules.torch_scheduler import _Table

STEPS = 130

# Every schedule, with arguments that have it do all that it does within STEPS. The laws below run over these.
ALL: dict[str, Callable[[], ft.schedules.ScheduleFn]] = {
    "constant": lambda: s.constant(0.1),
    "linear": lambda: s.linear(0.1, 0.01, 100),
    "linear_late_up": lambda: s.linear(0.01, 0.2, 60, transition_begin=20),
    "polynomial": lambda: s.polynomial(0.1, 0.02, 2.5, 100, 10),
    "polynomial_root": lambda: s.polynomial(0.02, 0.1, 0.5, 100),
    "cosine": lambda: s.cosine(0.1, 100),
    "cosine_alpha": lambda: s.cosine(0.1, 100, 0.2, 1.5),
    "restarts": lambda: s.cosine_restarts(0.1, 30),
    "restarts_2": lambda: s.cosine_restarts(0.1, 7, 2, 0.1),
    "restarts_3": lambda: s.cosine_restarts(0.1, 1, t_mult=3),
    "exponential": lambda: s.exponential(0.1, 10, 0.7),
    "exponential_stairs": lambda: s.exponential(0.1, 10, 0.7, 5, True, 0.02),
    "exponential_up": lambda: s.exponential(0.1, 10, 1.3, end_value=0.5),
    "step": lambda: s.step(0.1, 30, 0.5),
    "multi_step": lambda: s.multi_step(0.1, [20, 50, 51]),
    "inverse_sqrt": lambda: s.inverse_sqrt(0.1, 20),
    "inverse_sqrt_t5": lambda: s.inverse_sqrt(0.1, 20, start=0.1),
    "inverse_sqrt_scale": lambda: s.inverse_sqrt(0.1, 20, 5.0, start=0.01),
    "warmup_cosine": lambda: s.warmup_cosine(0.1, 20, 100, start=0.01, end=0.001),
    "warmup_stable_decay": lambda: s.warmup_stable_decay(0.1, 20, 50, 30, start=0.01, end=0.001),
    "wsd_cosine": lambda: s.warmup_stable_decay(0.1, 20, 50, 30, decay="cosine"),
    "wsd_sqrt": lambda: s.warmup_stable_decay(0.1, 20, 50, 30, decay="sqrt"),
    "wsd_exponential": lambda: s.warmup_stable_decay(0.1, 0, 50, 30, end=0.01, decay="exponential"),
    "one_cycle": lambda: s.one_cycle(100, 0.1),
    "one_cycle_linear": lambda: s.one_cycle(100, 0.1, 0.25, 10.0, 100.0, pct_final=0.85, kind="linear"),
    "piecewise_constant": lambda: s.piecewise_constant(0.1, {50: 0.5, 20: 0.1, 51: 3.0}),
    "piecewise_linear": lambda: s.piecewise_interpolate("linear", 0.1, {20: 0.1, 50: 3.0, 100: 0.5}),
    "piecewise_cosine": lambda: s.piecewise_interpolate("cosine", 0.1, {20: 0.1, 50: 3.0, 51: 0.5}),
    "warmup_linear": lambda: s.warmup(s.cosine(0.1, 80), 20),
    "warmup_cosine_kind": lambda: s.warmup(s.step(0.1, 20), 20, 0.01, "cosine"),
    "warmup_exponential": lambda: s.warmup(s.linear(0.1, 0.0, 80), 20, 1e-4, kind="exponential"),
    "warmup_constant": lambda: s.warmup(0.1, 20, start=0.02, kind="constant"),
    "warmup_of_none": lambda: s.warmup(s.cosine(0.1, 80), 0),
    "join": lambda: s.join([s.linear(0.0, 0.1, 10), 0.1, s.exponential(0.1, 10, 0.5), s.step(0.01, 9)], [10, 40, 80]),
    "sgdr": lambda: s.join([s.warmup_cosine(0.1, 10, 40, start=0.01), s.warmup_cosine(0.05, 5, 50)], [40]),
    "product": lambda: 0.5 * s.linear(1.0, 0.1, 100) * s.step(0.2, 30),
    "cyclic": lambda: s.cyclic(0.01, 0.1, 15),
    "cyclic_2": lambda: s.cyclic(0.01, 0.1, 10, 25, "triangular2"),
    "cyclic_exp": lambda: s.cyclic(0.01, 0.1, 16, 8, mode="exp_range", gamma=0.99),
    "from_torch": lambda: s.from_torch(tls.StepLR, 0.1, 100, step_size=30),
}


def values(schedule: Any, steps: int = STEPS) -> np.ndarray[Any, Any]:
    out = schedule(torch.arange(steps))
    assert out.dtype == torch.float64
    return out.numpy()


def close(got: Any, expected: Any) -> None:
    """Equal to rounding, relative to the largest value: a recursive scheduler is off by more than that near zero."""
    assert np.ptp(expected) > 0 or np.ptp(got) == 0
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-14 * np.max(np.abs(expected)))


# ------------------------------------------------------------------------------------------------------- against torch


def torch_run(make: Callable[[Any], Any], lr: float, steps: int = STEPS) -> np.ndarray[Any, Any]:
    """The learning rate of each step of a run with a torch scheduler, as a loop by hand sees it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls its own schedulers in a way that is deprecated
        scheduler = make(optimizer)
        for i in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if i + 1 < steps:
                scheduler.step()
    return np.asarray(found)


def sequential(*parts: tuple[Callable[[Any], Any], int]) -> Callable[[Any], Any]:
    return lambda o: tls.SequentialLR(o, [make(o) for make, _ in parts], [at for _, at in parts if at])


TORCH: dict[str, tuple[Callable[[], Any], float, Callable[[Any], Any]]] = {
    "ConstantLR": (lambda: s.join([0.05, 0.1], [20]), 0.1, lambda o: tls.ConstantLR(o, 0.5, 20)),
    "LinearLR": (lambda: s.linear(0.05, 0.02, 60), 0.1, lambda o: tls.LinearLR(o, 0.5, 0.2, 60)),
    "LinearLR warmup": (lambda: s.warmup(0.1, 60, 0.03), 0.1, lambda o: tls.LinearLR(o, 0.3, 1.0, 60)),
    "CosineAnnealingLR": (lambda: s.cosine(0.1, STEPS, 0.2), 0.1, lambda o: tls.CosineAnnealingLR(o, STEPS, 0.02)),
    "CosineAnnealingWarmRestarts": (
        lambda: s.cosine_restarts(0.1, 30, alpha=0.2),
        0.1,
        lambda o: tls.CosineAnnealingWarmRestarts(o, 30, 1, 0.02),
    ),
    "CosineAnnealingWarmRestarts x2": (
        lambda: s.cosine_restarts(0.1, 7, t_mult=2),
        0.1,
        lambda o: tls.CosineAnnealingWarmRestarts(o, 7, 2),
    ),
    "CosineAnnealingWarmRestarts x3": (
        lambda: s.cosine_restarts(0.1, 1, t_mult=3),
        0.1,
        lambda o: tls.CosineAnnealingWarmRestarts(o, 1, 3),
    ),
    # Torch is at the peak at step 0.3 n - 1, and at the end at step n - 1.
    "OneCycleLR cos": (
        lambda: s.one_cycle(129, 0.1, 38.5 / 129, 10.0, 50.0),
        0.3,
        lambda o: tls.OneCycleLR(o, 0.1, 130, pct_start=0.3, div_factor=10.0, final_div_factor=50.0),
    ),
    "OneCycleLR linear": (
        lambda: s.one_cycle(129, 0.1, 38.5 / 129, kind="linear"),
        0.3,
        lambda o: tls.OneCycleLR(o, 0.1, 130, pct_start=0.3, anneal_strategy="linear"),
    ),
    "OneCycleLR three phases": (
        lambda: s.one_cycle(129, 0.1, 38.5 / 129, pct_final=76.5 / 129),
        0.3,
        lambda o: tls.OneCycleLR(o, 0.1, 130, pct_start=0.3, three_phase=True),
    ),
    "PolynomialLR": (lambda: s.polynomial(0.1, 0.0, 1.5, 100), 0.1, lambda o: tls.PolynomialLR(o, 100, 1.5)),
    "ExponentialLR": (lambda: s.exponential(0.1, 1, 0.97), 0.1, lambda o: tls.ExponentialLR(o, 0.97)),
    "StepLR": (lambda: s.step(0.1, 17, 0.3), 0.1, lambda o: tls.StepLR(o, 17, 0.3)),
    "StepLR as exponential": (
        lambda: s.exponential(0.1, 17, 0.3, staircase=True),
        0.1,
        lambda o: tls.StepLR(o, 17, 0.3),
    ),
    "MultiStepLR": (lambda: s.multi_step(0.1, [20, 50, 51], 0.3), 0.1, lambda o: tls.MultiStepLR(o, [20, 50, 51], 0.3)),
    "CyclicLR": (lambda: s.cyclic(0.01, 0.1, 15), 0.3, lambda o: tls.CyclicLR(o, 0.01, 0.1, 15, cycle_momentum=False)),
    "CyclicLR triangular2": (
        lambda: s.cyclic(0.01, 0.1, 10, 25, "triangular2"),
        0.3,
        lambda o: tls.CyclicLR(o, 0.01, 0.1, 10, 25, mode="triangular2", cycle_momentum=False),
    ),
    "CyclicLR exp_range": (
        lambda: s.cyclic(0.01, 0.1, 16, 8, "exp_range", 0.99),
        0.3,
        lambda o: tls.CyclicLR(o, 0.01, 0.1, 16, 8, mode="exp_range", gamma=0.99, cycle_momentum=False),
    ),
    "SequentialLR": (
        lambda: s.join([s.constant(0.02), s.step(0.1, 7, 0.8), s.exponential(0.1, 1, 0.9)], [20, 50]),
        0.1,
        sequential(
            (lambda o: tls.ConstantLR(o, 0.2, 1000), 20),
            (lambda o: tls.StepLR(o, 7, 0.8), 50),
            (lambda o: tls.ExponentialLR(o, 0.9), 0),
        ),
    ),
    "SequentialLR warmup and cosine": (
        lambda: s.warmup_cosine(0.1, 20, 130, start=0.01),
        0.1,
        sequential((lambda o: tls.LinearLR(o, 0.1, 1.0, 20), 20), (lambda o: tls.CosineAnnealingLR(o, 110), 0)),
    ),
    "ChainedScheduler": (
        lambda: s.step(0.1, 20, 0.5) * s.exponential(1.0, 1, 0.98),
        0.1,
        lambda o: tls.ChainedScheduler([tls.StepLR(o, 20, 0.5), tls.ExponentialLR(o, 0.98)]),
    ),
    "LambdaLR inverse square root": (
        lambda: s.inverse_sqrt(0.1, 20),
        0.1,
        lambda o: tls.LambdaLR(o, lambda t: min(t / 20, math.sqrt(20 / max(t, 1)))),
    ),
    "LambdaLR T5": (
        lambda: s.inverse_sqrt(0.1, 20, start=0.1),
        0.1,
        lambda o: tls.LambdaLR(o, lambda t: math.sqrt(20 / max(t, 20))),
    ),
    "LambdaLR WSD": (
        lambda: s.warmup_stable_decay(0.1, 20, 50, 30, decay="sqrt"),
        0.1,
        lambda o: tls.LambdaLR(o, lambda t: min(t / 20, 1.0) * (1 - math.sqrt(min(max(t - 70, 0) / 30, 1.0)))),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_the_numbers_of_torch_at_every_step(name: str) -> None:
    make, lr, make_torch = TORCH[name]
    close(values(make()), torch_run(make_torch, lr))


@pytest.mark.parametrize("name", TORCH)
def test_from_torch_gives_them_to_the_last_digit(name: str) -> None:
    _, lr, make_torch = TORCH[name]
    schedule = s.from_torch(make_torch, lr, STEPS)
    expected = torch_run(make_torch, lr)
    assert values(schedule).tolist() == expected.tolist()
    assert np.ptp(expected) > 0
    assert values(schedule, STEPS + 50)[STEPS:].tolist() == [expected[-1]] * 50


# ------------------------------------------------------------------------------------------------------- against optax


def optax_run(make: Callable[[Any], Any]) -> np.ndarray[Any, Any]:
    """In float64, which is switched on for this block alone."""
    import jax  # here, because importing it takes a second
    import optax

    with jax.enable_x64(True):
        schedule = make(optax)
        found = np.asarray([float(schedule(jax.numpy.asarray(i))) for i in range(STEPS)])
    assert jax.numpy.asarray(1.0).dtype == "float32", "float64 leaked out of the test"
    return found


def optax_wsd(o: Any, end: Callable[[], Any]) -> Any:
    return o.join_schedules([o.linear_schedule(0.01, 0.1, 20), o.constant_schedule(0.1), end()], [20, 70])


OPTAX: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: o.constant_schedule(0.1),
    "linear": lambda o: o.linear_schedule(0.1, 0.01, 100),
    "linear_late_up": lambda o: o.linear_schedule(0.01, 0.2, 60, transition_begin=20),
    "polynomial": lambda o: o.polynomial_schedule(0.1, 0.02, 2.5, 100, 10),
    "polynomial_root": lambda o: o.polynomial_schedule(0.02, 0.1, 0.5, 100),
    "cosine": lambda o: o.cosine_decay_schedule(0.1, 100),
    "cosine_alpha": lambda o: o.cosine_decay_schedule(0.1, 100, 0.2, 1.5),
    "exponential": lambda o: o.exponential_decay(0.1, 10, 0.7),
    "exponential_stairs": lambda o: o.exponential_decay(0.1, 10, 0.7, 5, True, 0.02),
    "exponential_up": lambda o: o.exponential_decay(0.1, 10, 1.3, end_value=0.5),
    "warmup_cosine": lambda o: o.warmup_cosine_decay_schedule(0.01, 0.1, 20, 100, 0.001),
    "warmup_stable_decay": lambda o: optax_wsd(o, lambda: o.linear_schedule(0.1, 0.001, 30)),
    "one_cycle": lambda o: o.cosine_onecycle_schedule(100, 0.1),
    "one_cycle_linear": lambda o: o.linear_onecycle_schedule(100, 0.1, 0.25, 0.85, 10.0, 100.0),
    "piecewise_constant": lambda o: o.piecewise_constant_schedule(0.1, {50: 0.5, 20: 0.1, 51: 3.0}),
    "piecewise_linear": lambda o: o.piecewise_interpolate_schedule("linear", 0.1, {20: 0.1, 50: 3.0, 100: 0.5}),
    "piecewise_cosine": lambda o: o.piecewise_interpolate_schedule("cosine", 0.1, {20: 0.1, 50: 3.0, 51: 0.5}),
    "warmup_linear": lambda o: o.warmup_cosine_decay_schedule(0.0, 0.1, 20, 100),
    "warmup_of_none": lambda o: o.cosine_decay_schedule(0.1, 80),
    "join": lambda o: o.join_schedules(
        [
            o.linear_schedule(0.0, 0.1, 10),
            o.constant_schedule(0.1),
            o.exponential_decay(0.1, 10, 0.5),
            o.exponential_decay(0.01, 9, 0.1, staircase=True),
        ],
        [10, 40, 80],
    ),
    "sgdr": lambda o: o.sgdr_schedule(
        [
            {"init_value": 0.01, "peak_value": 0.1, "warmup_steps": 10, "decay_steps": 40},
            {"init_value": 0.0, "peak_value": 0.05, "warmup_steps": 5, "decay_steps": 50},
        ]
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_the_numbers_of_optax_at_every_step(name: str) -> None:
    close(values(ALL[name]()), optax_run(OPTAX[name]))


def test_a_cycle_whose_boundary_is_rounded_down() -> None:
    assert int(0.29 * 100) == 28  # as optax has it
    close(values(s.one_cycle(100, 0.1, 0.29)), optax_run(lambda o: o.cosine_onecycle_schedule(100, 0.1, 0.29)))
    close(values(s.one_cycle(100, 0.1, 0.0)), optax_run(lambda o: o.cosine_onecycle_schedule(100, 0.1, 0.0)))


# ------------------------------------------------------------------------------------------- numbers that nobody else has


# Printed by the version of warmup_cosine before there were other schedules (float.hex): they stay to the last digit.
GOLDEN = {
    warmup_cosine(3e-4, 100, 2000): {
        0: "0x0.0p+0",
        1: "0x1.92a737110e453p-19",
        7: "0x1.6052502eec7c9p-16",
        99: "0x1.376d549731098p-12",
        100: "0x1.3a92a30553261p-12",
        101: "0x1.3a9294ee18f16p-12",
        777: "0x1.c3cbf96fb8bf6p-13",
        1999: "0x1.c2e74696bb98cp-33",
        2000: "0x0.0p+0",
        5000: "0x0.0p+0",
    },
    warmup_cosine(1e-2, 2, 50, start=1e-3): {
        0: "0x1.0624dd2f1a9fcp-10",
        1: "0x1.6872b020c49bbp-8",
        2: "0x1.47ae147ae147bp-7",
        3: "0x1.475446d7e467dp-7",
        13: "0x1.1f057cb3cf5cfp-7",
        49: "0x1.67368bf37f852p-17",
        50: "0x0.0p+0",
    },
    warmup_cosine(0.1, 0, 7, start=0.2, end=0.01): {
        0: "0x1.999999999999ap-4",
        1: "0x1.8758b994935c2p-4",
        2: "0x1.54339eb28226bp-4",
        3: "0x1.0a4b88f4f907fp-4",
        5: "0x1.b96ef5d9ce6fcp-6",
        6: "0x1.d9b514a313338p-7",
        7: "0x1.47ae147ae147bp-7",
        13: "0x1.47ae147ae147bp-7",
    },
}


@pytest.mark.parametrize("schedule", GOLDEN, ids=repr)
def test_warmup_cosine_to_the_last_digit(schedule: Any) -> None:
    assert {t: float(schedule(torch.tensor(t))).hex() for t in GOLDEN[schedule]} == GOLDEN[schedule]


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_a_warm_up_rises_to_the_first_value_and_then_follows(kind: str) -> None:
    schedule = s.polynomial(0.1, 0.01, 2.0, 50)
    found = values(s.warmup(schedule, 20, 1e-3, kind))
    assert found[0] == pytest.approx(1e-3, rel=1e-14)
    assert (np.diff(found[:21]) > 0).all()
    assert found[20:].tolist() == values(schedule)[: STEPS - 20].tolist()
    part = np.arange(21) / 20
    middle = {
        "linear": 1e-3 + 0.099 * part,
        "cosine": 1e-3 + 0.099 * (1 - np.cos(np.pi * part)) / 2,
        "exponential": 1e-3 * 100**part,
    }
    close(found[:21], middle[kind])


def test_decays_begin_at_the_peak_and_end_at_the_end() -> None:
    part = np.arange(31) / 30
    forms = {"linear": part, "cosine": (1 - np.cos(np.pi * part)) / 2, "sqrt": np.sqrt(part)}
    for decay, form in forms.items():
        found = values(s.warmup_stable_decay(0.1, 20, 50, 30, end=0.01, decay=decay))
        assert (found[20:71] == 0.1).all()
        close(found[70:101], 0.1 - 0.09 * form)
        assert found[101:] == pytest.approx(0.01, rel=1e-14)
    close(values(ALL["wsd_exponential"]())[50:81], 0.1 * 0.1**part)


def test_restarts_far_out_begin_at_whole_steps() -> None:
    """The period of a step is found by a logarithm, which is off by one now and then."""
    for first, mult, most in ((1, 2, 50), (7, 2, 45), (5, 3, 28), (3, 10, 12), (10, 7, 15)):
        begins = [first * (mult**n - 1) // (mult - 1) for n in range(1, most)]
        schedule = s.cosine_restarts(1.0, first, mult)
        assert schedule(torch.tensor(begins)).tolist() == [1.0] * len(begins)
        ends = [begin - 1 for begin in begins if begin > first]
        lengths = [first * mult**n for n in range(1, most)]
        expected = [(1 + math.cos(math.pi * (1 - 1 / n))) / 2 for n in lengths]
        np.testing.assert_allclose(schedule(torch.tensor(ends)), expected[: len(ends)], atol=1e-15, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", ALL)
def test_it_moves(name: str) -> None:
    assert np.ptp(values(ALL[name]())) > 0.01 or name == "constant"


@pytest.mark.parametrize("name", ALL)
def test_steps_one_by_one_and_as_a_vector(name: str) -> None:
    schedule = ALL[name]()
    one_by_one = [schedule(torch.tensor(i)) for i in range(STEPS)]
    assert all(one.shape == () and one.dtype == torch.float64 for one in one_by_one)
    np.testing.assert_allclose(torch.stack(one_by_one), values(schedule), rtol=1e-15)
    at = torch.arange(STEPS)
    assert torch.equal(schedule(at.double()), schedule(at))
    assert torch.equal(schedule(at.reshape(10, 13)), schedule(at).reshape(10, 13))
    assert torch.equal(schedule(list(range(STEPS))), schedule(at))
    assert schedule(7).shape == ()


@pytest.mark.parametrize("name", ALL)
def test_it_maps(name: str) -> None:
    schedule = ALL[name]()
    at = torch.arange(STEPS)
    torch.testing.assert_close(torch.func.vmap(schedule)(at), schedule(at), rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_it_traces_whole(name: str) -> None:
    schedule = ALL[name]()
    torch.compiler.reset()  # each row is the first one; else they would count as recompilations of one function
    traced = torch.compile(schedule, backend="eager", fullgraph=True)
    for step in (0, 19, 20, 129):
        torch.testing.assert_close(traced(torch.tensor(step)), schedule(torch.tensor(step)), rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_it_lies_where_the_step_lies(name: str) -> None:
    out = ALL[name]()(torch.empty((), dtype=torch.int64, device="meta"))
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.float64, ())


class Reads(TorchDispatchMode):
    """Counts reads on the host."""

    count = calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_read_on_the_host_and_the_step_stays(name: str) -> None:
    schedule, step = ALL[name](), torch.tensor(37)
    with Reads() as reads:
        schedule(step)
    assert (reads.count, reads.calls > 0) == (0, True)
    assert step == 37
    with Reads() as reads:
        step.item()
    assert reads.count == 1


@pytest.mark.parametrize("name", ALL)
def test_the_repr_is_the_call(name: str) -> None:
    if name == "from_torch":
        assert repr(ALL[name]()) == "from_torch(StepLR, lr=0.1, steps=100, step_size=30)"
        return
    schedule = ALL[name]()
    again = eval(repr(schedule), {key: getattr(s, key) for key in dir(s)})
    assert values(again).tolist() == values(schedule).tolist()


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "constant": s.constant,
    "linear": lambda x: s.linear(x, 0.01, 100),
    "polynomial": lambda x: s.polynomial(0.3, x, 2.0, 100),
    "cosine": lambda x: s.cosine(x, 100),
    "cosine_restarts": lambda x: s.cosine_restarts(x, 7, 2),
    "cyclic": lambda x: s.cyclic(0.001, x, 10),
    "exponential": lambda x: s.exponential(x, 10, 0.5, end_value=0.001),
    "exponential rate": lambda x: s.exponential(0.3, 10, x, end_value=1e-6),
    "inverse_sqrt": lambda x: s.inverse_sqrt(x, 20),
    "multi_step": lambda x: s.multi_step(0.3, [10, 20], x),
    "one_cycle": lambda x: s.one_cycle(100, x),
    "piecewise_constant": lambda x: s.piecewise_constant(x, {20: 0.5}),
    "piecewise_interpolate": lambda x: s.piecewise_interpolate("cosine", 0.3, {20: x, 40: 0.5}),
    "step": lambda x: s.step(x, 20),
    "warmup": lambda x: s.warmup(x, 20, 0.001, "exponential"),
    "warmup_cosine": lambda x: s.warmup_cosine(x, 20, 100),
    "warmup_stable_decay": lambda x: s.warmup_stable_decay(x, 20, 30, 40, end=0.001, decay="exponential"),
    "join": lambda x: s.join([s.constant(x), s.exponential(x, 1, 1e-3)], [60]),
    "product": lambda x: x * s.step(0.5, 20) * x,
}


@pytest.mark.parametrize("name", TENSORS)
def test_values_may_be_tensors_to_sweep_and_to_differentiate(name: str) -> None:
    make, at = TENSORS[name], torch.arange(STEPS)
    peaks = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)
    swept = torch.func.vmap(lambda x: make(x)(at))(peaks)
    for row, peak in zip(swept, peaks.tolist(), strict=True):
        number = make(peak) if name != "product" else peak * s.step(0.5, 20) * peak
        torch.testing.assert_close(row, number(at), rtol=1e-13, atol=1e-18)
    assert len(torch.unique(swept[:, 30])) == 3
    slope = torch.func.jacrev(lambda x: make(x)(at))(peaks[0])
    assert slope.isfinite().all()
    delta = 1e-6
    numeric = (make(peaks[0] + delta)(at) - make(peaks[0] - delta)(at)) / (2 * delta)
    torch.testing.assert_close(slope, numeric, rtol=1e-4, atol=1e-7)
    assert "tensor" in repr(make(peaks[0]))


def test_a_function_of_the_step_is_a_schedule() -> None:
    def decay(step: Tensor) -> Tensor:
        return 0.1 / (1 + step)

    joined = s.join([decay, s.warmup(decay, 2)], [3])
    assert repr(joined) == "join([decay, warmup(decay, 2)], [3])"
    assert joined([0, 1, 3, 4, 5]).tolist() == [0.1, 0.05, 0.0, 0.05, 0.1]
    flat = s.ScheduleFn(lambda step: torch.tensor(0.1), "flat")  # one value for all steps
    assert flat(torch.arange(3)).shape == (3,)


def test_a_product_with_something_else_is_a_type_error() -> None:
    for other in ("2", None, [1.0]):
        with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
            s.step(0.1, 10) * other
    with pytest.raises(errors.LimitError, match="value=-1 is negative"):
        -1 * s.step(0.1, 10)


@pytest.mark.parametrize("where", ["plain", "injected", "compiled"])
def test_an_optimizer_follows_it(where: str) -> None:
    make = lambda o: tls.OneCycleLR(o, 0.1, 12)  # noqa: E731 - a function for from_torch
    schedule = s.from_torch(make, lr=1.0, steps=12)
    expected = torch_run(make, 1.0, 12)
    tx = ft.optim.inject(ft.optim.sgd)(lr=schedule) if where == "injected" else ft.optim.sgd(schedule)
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    state = ft.init(model, tx)
    step = ft.train_step(model, lambda model, batch: model(batch).mean(), tx)
    if where == "compiled":
        step = ft.compile(step, backend="eager", donate=False)
    batch = torch.ones(1, 1, dtype=torch.float64)
    rates, weights = [], [state.params["weight"].item()]
    for _ in range(12):
        state, metrics = step(state, batch)
        rates.append(float(metrics["lr"].compute()))
        weights.append(state.params["weight"].item())
    assert rates == pytest.approx(expected.tolist(), rel=1e-6)  # reported in float32
    np.testing.assert_allclose(-np.diff(weights), expected, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------- from_torch


def test_from_torch_leaves_everything_as_it_was(rng_guard: Any) -> None:
    called: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda *args: called.append(args))
    filters = list(warnings.filters)
    try:
        with rng_guard():
            s.from_torch(tls.OneCycleLR, lr=0.1, steps=20, max_lr=0.2, total_steps=20)
    finally:
        handle.remove()
    assert not called
    assert warnings.filters == filters
    with torch.device("meta"), torch.no_grad():
        assert s.from_torch(tls.StepLR, 0.1, 20, step_size=5).fn.host.device.type == "cpu"


def test_from_torch_counts_the_steps_that_the_scheduler_allows() -> None:
    s.from_torch(tls.OneCycleLR, lr=0.1, steps=20, max_lr=0.2, total_steps=20)
    with pytest.raises(ValueError, match="Tried to step") as caught:
        s.from_torch(tls.OneCycleLR, lr=0.1, steps=30, max_lr=0.2, total_steps=20)
    assert "raised by step 21 of 30 in ft.schedules.from_torch" in caught.value.__notes__[0]


def test_a_table_is_copied_once_to_each_device_and_not_out_of_a_transform() -> None:
    table = _Table([1.0, 2.0])
    meta = torch.empty((), device="meta", dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        table(torch.empty((), device="meta", dtype=torch.float64))
    assert not table.copies
    torch.func.vmap(lambda x: x * table(meta))(torch.empty(2, device="meta"))
    assert not table.copies
    table(meta)
    first = table.copies[meta.device]
    table(meta)
    assert table.copies == {meta.device: first}
    assert table.on(torch.device("cpu")) is table.host


class NeedsLoss(tls.LRScheduler):
    """A scheduler of somebody's own that is stepped with the loss."""

    def _initial_step(self) -> None:
        pass

    def step(self, loss: Any) -> None:  # type: ignore[override]
        pass


PLATEAU = ("needs a metric, so it is no function of the step", 'hooks=[ft.hooks.plateau("val/loss"', "ft.optim.inject")
FROM_TORCH: dict[str, tuple[Callable[[], Any], type, tuple[str, ...]]] = {
    "plateau": (lambda: s.from_torch(tls.ReduceLROnPlateau, 0.1, 10), errors.LimitError, PLATEAU),
    "plateau made": (
        lambda: s.from_torch(lambda o: tls.ReduceLROnPlateau(o, patience=3), 0.1, 10),
        errors.LimitError,
        PLATEAU,
    ),
    "own metric": (
        lambda: s.from_torch(NeedsLoss, 0.1, 10),
        errors.LimitError,
        ("NeedsLoss needs a metric", *PLATEAU[1:]),
    ),
    "a metric inside": (
        lambda: s.from_torch(lambda o: tls.ChainedScheduler([tls.StepLR(o, 2), NeedsLoss(o)]), 0.1, 10),
        errors.LimitError,
        ("NeedsLoss needs a metric", *PLATEAU[1:]),
    ),
    "an object": (
        lambda: s.from_torch(tls.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 5), 0.1, 10),
        TypeError,
        ("wants the scheduler's class", "an object of StepLR", "fix:"),
    ),
    "an optimizer": (
        lambda: s.from_torch(torch.optim.SGD([torch.zeros(1)], 0.1), 0.1, 10),
        TypeError,
        ("wants the scheduler's class", "SGD", "fix:"),
    ),
    "a class of another kind": (
        lambda: s.from_torch(torch.optim.SGD, 0.1, 10),
        TypeError,
        ("SGD is no scheduler", "fix:"),
    ),
    "a name": (lambda: s.from_torch("StepLR", 0.1, 10), TypeError, ("wants the scheduler's class", "str", "fix:")),
    "gives nothing": (
        lambda: s.from_torch(lambda o: None, 0.1, 10),
        TypeError,
        ("gave no scheduler of torch", "NoneType", "forgot to return the scheduler?"),
    ),
    "lr text": (
        lambda: s.from_torch(tls.StepLR, "0.1", 10, step_size=5),
        TypeError,
        ("lr= is a number", "str", "fix:"),
    ),
    "lr negative": (
        lambda: s.from_torch(tls.StepLR, -0.1, 10, step_size=5),
        errors.LimitError,
        ("lr=-0.1 is negative",),
    ),
    "lr nan": (lambda: s.from_torch(tls.StepLR, math.nan, 10, step_size=5), errors.LimitError, ("lr=nan", "fix:")),
    "no steps": (
        lambda: s.from_torch(tls.StepLR, 0.1, 0, step_size=5),
        errors.LimitError,
        ("for how many steps?", "steps= a positive integer", "got:      0", "fix:"),
    ),
    "half steps": (
        lambda: s.from_torch(tls.StepLR, 0.1, 1.5, step_size=5),
        errors.LimitError,
        ("for how many steps?",),
    ),
    "options": (lambda: s.from_torch(tls.StepLR, 0.1, 10, size=5), TypeError, ("unexpected keyword argument 'size'",)),
}


@pytest.mark.parametrize("name", FROM_TORCH)
def test_from_torch_of_something_else(name: str) -> None:
    make, kind, parts = FROM_TORCH[name]
    with pytest.raises(kind) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- plots


def test_a_plot_holds_the_value_of_each_step(tmp_path: Path) -> None:
    schedule = s.warmup_cosine(3e-4, 100, 2000)
    path = tmp_path / "not" / "yet" / "lr.svg"
    figure = schedule.plot(2500, path, name="weight decay")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), np.arange(2501))
    np.testing.assert_array_equal(line.get_ydata(), values(schedule, 2501))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "weight decay")
    assert axes.get_title() == "warmup_cosine(0.0003, 100, 2000)"
    assert axes.get_yscale() == "linear"
    assert path.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("name", ALL)
def test_every_schedule_can_be_drawn(name: str) -> None:
    schedule = ALL[name]()
    (line,) = schedule.plot(STEPS).axes[0].get_lines()
    np.testing.assert_array_equal(line.get_ydata(), values(schedule, STEPS + 1))


def test_logarithmic_values() -> None:
    axes = s.linear(1.0, 0.0, 4).plot(6, log=True).axes[0]
    assert axes.get_yscale() == "log"
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), [1, 0.75, 0.5, 0.25, np.nan, np.nan, np.nan])
    s.constant(0.0).plot(3, log=True).savefig(io.BytesIO())  # nothing to draw, and no warning


def test_the_picture_is_one_of_jupyter_s_and_none_of_pyplot_s() -> None:
    code = """
import sys, ftrain as ft
schedule = ft.schedules.one_cycle(100, 0.1)
assert "matplotlib" not in sys.modules
png, size = schedule.plot(120)._repr_png_()
assert png.startswith(b"\\x89PNG") and size == {"width": 600, "height": 350}
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = {"PYTHONPATH": str(Path(ft.__path__[0]).parent)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib(?s:.*)schedule\.plot(?s:.*)'ftrain\[plot\]'"):
        s.constant(0.1).plot(10)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "10", None], ids=repr)
def test_plots_of_no_steps(steps: Any) -> None:
    with pytest.raises(
        errors.LimitError, match=r"how many steps(?s:.*)a positive integer(?s:.*)schedule\.plot\(1000\)"
    ):
        s.constant(0.1).plot(steps)


# ----------------------------------------------------------------------------------------------------- wrong arguments

WRONG: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # values
    "value": (lambda: s.constant(-0.1), ("value=-0.1 is negative", "expected: a number >= 0", "value=0.1")),
    "value nan": (lambda: s.constant(math.nan), ("value=nan is not a number",)),
    "init_value": (lambda: s.linear(-1.0, 0.0, 10), ("init_value=-1.0 is negative",)),
    "end_value": (lambda: s.linear(1.0, -0.5, 10), ("end_value=-0.5 is negative",)),
    "power": (lambda: s.polynomial(1.0, 0.0, -2, 10), ("power=-2 is negative",)),
    "alpha": (lambda: s.cosine(1.0, 10, -0.1), ("alpha=-0.1 is negative",)),
    "gamma": (lambda: s.step(1.0, 10, -0.1), ("gamma=-0.1 is negative",)),
    "peak": (lambda: s.warmup_stable_decay(-1.0, 1, 1, 1), ("peak=-1.0 is negative",)),
    "start": (lambda: s.warmup(0.1, 10, -1.0), ("start=-1.0 is negative",)),
    "factor": (lambda: s.piecewise_constant(0.1, {5: -1.0}), ("piecewise_constant: factor[5]=-1.0 is negative",)),
    # lengths
    "no transition": (
        lambda: s.linear(1.0, 0.0, 0),
        ("transition_steps=0 is 0", "expected: a number > 0", "got:      0", "transition_steps=1000"),
    ),
    "negative transition": (
        lambda: s.linear(1.0, 0.0, -10),
        ("transition_steps=-10 is negative", "transition_steps=10"),
    ),
    "negative begin": (lambda: s.linear(1.0, 0.0, 10, -1), ("transition_begin=-1 is negative", "a number >= 0")),
    "endless": (lambda: s.cosine(1.0, math.inf), ("decay_steps=inf is not finite", "decay_steps=1000")),
    "never": (lambda: s.cosine(1.0, math.nan), ("decay_steps=nan is not finite",)),
    "step_size": (lambda: s.step(1.0, 0), ("step_size=0 is 0", "a number > 0")),
    "decay_steps": (lambda: s.warmup_stable_decay(1.0, 10, 10, 0), ("decay_steps=0 is 0",)),
    "stable_steps": (lambda: s.warmup_stable_decay(1.0, 10, -10, 10), ("stable_steps=-10 is negative",)),
    "timescale": (lambda: s.inverse_sqrt(1.0, 10, 0), ("timescale=0 is 0",)),
    "total": (
        lambda: s.warmup_cosine(0.1, 100, 50),
        (
            "the decay has no length",
            "total_steps > warmup_steps (100)",
            "total_steps=50",
            "warmup_cosine(0.1, 100, 1000)",
        ),
    ),
    "half a period": (
        lambda: s.cosine_restarts(1.0, 10.5),
        ("decay_steps=10.5 is not whole", "a positive integer", "periods begin at whole steps", "decay_steps=10"),
    ),
    "half a factor": (lambda: s.cosine_restarts(1.0, 10, 1.5), ("t_mult=1.5 is not whole", "fix:      t_mult=2")),
    "no factor": (lambda: s.cosine_restarts(1.0, 10, 0), ("t_mult=0 is 0",)),
    "rate": (lambda: s.exponential(1.0, 10, 0), ("multiplied by 0 is 0", "decay_rate > 0", "fix:")),
    # boundaries
    "boundaries fall": (
        lambda: s.join([1.0, 0.5, 0.1], [20, 10]),
        (
            "join: the boundaries do not increase",
            "a step above 20 after 20",
            "10 in [20, 10]",
            "fix:      ft.schedules.join",
        ),
    ),
    "boundaries stay": (
        lambda: s.multi_step(1.0, [10, 10]),
        ("multi_step: the boundaries do not increase", "10 in [10, 10]"),
    ),
    "boundary below 0": (lambda: s.join([1.0, 0.5], [-1]), ("join: boundary[0]=-1 is negative",)),
    "too few": (
        lambda: s.join([1.0, 0.5, 0.1], [10]),
        ("schedules and boundaries do not fit", "2 boundaries for 3 schedules", "1 boundaries, 3 schedules", "fix:"),
    ),
    "none": (lambda: s.join([], []), ("do not fit", "at least one schedule")),
    "negative boundary": (lambda: s.piecewise_constant(0.1, {-5: 1.0}), ("boundary[0]=-5 is negative",)),
    # names
    "kind": (
        lambda: s.warmup(0.1, 10, kind="exp"),
        ("kind='exp' is unknown", "'linear' or 'cosine'", "kind='exponential'"),
    ),
    "decay": (
        lambda: s.warmup_stable_decay(0.1, 1, 1, 1, decay="cos"),
        ("decay='cos' is unknown", "fix:      decay='cosine'"),
    ),
    "interpolate_type": (
        lambda: s.piecewise_interpolate("lin", 0.1),
        ("interpolate_type='lin' is unknown", "'linear' or 'cosine'", "interpolate_type='linear'"),
    ),
    "mode": (lambda: s.cyclic(0.1, 0.2, 10, mode="exp"), ("mode='exp' is unknown", "mode='exp_range'")),
    "cycle kind": (lambda: s.one_cycle(10, 0.1, kind="cos"), ("kind='cos' is unknown", "kind='cosine'")),
    # things that do not go together
    "exponential from 0": (
        lambda: s.warmup(s.cosine(0.1, 10), 5, kind="exponential"),
        ("cannot begin at 0", "start > 0", "ft.schedules.warmup(cosine(0.1, 10), 5, start=1e-6, kind='exponential')"),
    ),
    "exponential to 0": (
        lambda: s.warmup_stable_decay(0.1, 1, 1, 1, decay="exponential"),
        ("an exponential decay cannot have end=0.", "end > 0", "fix:"),
    ),
    "gamma without its mode": (
        lambda: s.cyclic(0.1, 0.2, 10, gamma=0.9),
        ("mode='triangular' has no gamma", "gamma=0.9"),
    ),
    "a long rise": (lambda: s.one_cycle(10, 0.1, 1.5), ("the rise is longer than the cycle", "0 <= pct_start <= 1")),
    "an early end": (
        lambda: s.one_cycle(10, 0.1, 0.5, pct_final=0.4),
        ("ends outside of the cycle", "pct_start (0.5) < pct_final < 1", "0.4", "fix:"),
    ),
    "div_factor": (lambda: s.one_cycle(10, 0.1, div_factor=0.0), ("div_factor=0.0 is 0", "a number > 0")),
}

WRONG_TYPES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "value": (lambda: s.constant("0.1"), ("value='0.1' is not a hyper-parameter", "got:      str", "fix:")),
    "a schedule as a value": (
        lambda: s.warmup_cosine(s.constant(0.1), 10, 100),
        ("peak=constant(0.1) is not a value of a schedule", "a number >= 0 or a 0-d tensor", "join, warmup and *"),
    ),
    "a vector as a value": (lambda: s.constant(torch.ones(2)), ("is not a hyper-parameter",)),
    "steps": (lambda: s.step(0.1, "10"), ("step_size='10' is not a number", "got:      str", "fix:")),
    "tensor steps": (lambda: s.cosine(0.1, torch.tensor(10)), ("decay_steps=tensor(10) is not a number", "Tensor")),
    "no steps": (lambda: s.cosine(0.1, None), ("decay_steps=None is not a number",)),
    "true steps": (lambda: s.cosine(0.1, True), ("decay_steps=True is not a number",)),
    "one schedule": (lambda: s.join(s.constant(0.1), []), ("join wants a list of schedules", "ScheduleFn", "fix:")),
    "a name": (lambda: s.join([0.1, "cosine"], [10]), ("join wants schedules", "got:      str", "fix:")),
    "no schedule": (lambda: s.warmup(None, 10), ("warmup wants schedules", "NoneType")),
    "one boundary": (lambda: s.multi_step(0.1, 10), ("boundaries are a sequence of steps", "got:      int", "fix:")),
    "pairs": (
        lambda: s.piecewise_constant(0.1, [(5, 0.1)]),
        ("boundaries and factors are a dict", "{step: factor}", "got:      list", "fix:"),
    ),
    "a function that gives a float": (
        lambda: s.ScheduleFn(lambda step: 0.1, "mine")(0),
        ("the schedule 'mine' did not give a value for each step", "a tensor of shape ()", "got:      float", "fix:"),
    ),
    "a function that gives more": (
        lambda: s.ScheduleFn(lambda step: torch.ones(2), "mine")(0),
        ("did not give a value for each step", "a tensor of shape (2,)"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_make_no_sense(name: str) -> None:
    make, parts = WRONG[name]
    with pytest.raises(errors.LimitError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_arguments_of_a_wrong_type(name: str) -> None:
    make, parts = WRONG_TYPES[name]
    with pytest.raises(TypeError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_every_schedule_has_a_row() -> None:
    """Here, against torch or optax, and under the laws."""
    public = {name for name in dir(s) if callable(getattr(s, name)) and not name.startswith("_")} - {"ScheduleFn"}
    written = " ".join(repr(make()) for make in ALL.values())
    assert public == {name for name in public if re.search(rf"\b{name}\(", written)}
