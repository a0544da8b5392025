"""What an optimization recipe costs: clipping, averages, mixed precision and accumulation, against the loops that people write.

- the recipe: AdamW, clipping by global norm, an exponential moving average, autocast (with a loss scale for float16), in one step;
- the parts: one update from eight micro-batches, in one call.

`agree` compares what was trained, relative to how far it moved.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import cases
import torch
import torch.nn.functional as F
from cases import Problem
from rounds import Contender
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ftrain as ft

MAX_NORM, EMA, PARTS = 1.0, 0.999, 8

# What `agree` allows. In float32 two ways differ in the order of sums. In half precision they round at other places, and AdamW
# makes as large a step of a gradient that is all rounding as of any other.
TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 0.1, "16-mixed": 0.1}

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def parts_large(device: str = "cpu") -> Problem:
    """The MLP of 24 M parameters on batches of eight times 32."""
    sizes = cases.large("cpu").sizes
    return Problem.make("24 M MLP", sizes, batch=32 * PARTS, count=2, device=device)


def parts_small(device: str = "cpu") -> Problem:
    """The small MLP on batches of eight times 16."""
    return Problem.make("small MLP", cases.small("cpu").sizes, batch=16 * PARTS, count=100, device=device)


# ---------------------------------------------------------------------------------------------------- written by hand


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        module.parameters(),
        lr=cases.LR,
        betas=(cases.B1, cases.B2),
        eps=cases.EPS,
        weight_decay=cases.DECAY,
        fused=True,
    )


def _told(run: Any, module: nn.Module, average: nn.Module | None = None) -> Callable[[int], object]:
    run.params = lambda: [p.detach() for p in module.parameters()]
    if average is not None:
        run.averages = lambda: list(average.parameters())
    return run  # type: ignore[no-any-return]  # the function itself


def hand_recipe(problem: Problem, precision: str = "bf16-mixed", *, compiled: bool = False) -> Callable[[int], object]:
    """The recipe as torch's documentation writes it, with the fused optimizer."""
    module = problem.model()
    model = torch.compile(module) if compiled else module
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = _adamw(module)
    scaler = torch.amp.GradScaler(problem.device) if precision == "16-mixed" else None
    batches = problem.forever()

    def forward(batch: cases.Batch) -> Tensor:
        dtype = _AUTOCAST.get(precision)
        with torch.autocast(problem.device, dtype=dtype) if dtype else contextlib.nullcontext():
            return F.cross_entropy(model(batch["x"]), batch["y"])

    def run(steps: int) -> None:
        for batch in itertools.islice(batches, steps):
            optimizer.zero_grad()
            loss = forward(batch)
            if scaler is None:
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
                scaler.step(optimizer)
                scaler.update()
            average.update_parameters(module)

    return _told(run, module, average.module)


def hand_parts(problem: Problem, *, compiled: bool = False) -> Callable[[int], object]:
    """Eight micro-batches, whose gradients autograd adds up in place."""
    module = problem.model()
    model = torch.compile(module) if compiled else module
    optimizer = _adamw(module)
    batches = problem.forever()

    def run(steps: int) -> None:
        for batch in itertools.islice(batches, steps):
            optimizer.zero_grad()
            for x, y in zip(batch["x"].chunk(PARTS), batch["y"].chunk(PARTS), strict=True):
                loss = F.cross_entropy(model(x), y) / PARTS
                loss.backward()
            optimizer.step()

    return _told(run, module)


# ------------------------------------------------------------------------------------------------------------- ftrain


def recipe(model: nn.Module, precision: str | None = "bf16-mixed") -> tuple[Any, ft.Transform]:
    """The recipe's step, and its optimizer."""
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(MAX_NORM), cases.ft_adamw())
    return ft.with_ema(ft.train_step(model, cases.loss_fn, tx, precision=precision), EMA), tx


def parts(model: nn.Module) -> tuple[Any, ft.Transform]:
    """The step of eight micro-batches, and its optimizer."""
    tx = cases.ft_adamw()
    return ft.train_step(model, cases.loss_fn, tx, accumulate=PARTS), tx


def ft_run(problem: Problem, make: Callable[..., Any], *, donate: bool = True) -> Callable[[int], object]:
    """A compiled step in a loop of one line; `make` is `recipe` or `parts`."""
    model = problem.model()
    step, tx = make(model)
    state = step.init(ft.init(model, tx, seed=0))
    del model
    fast = ft.compile(step, donate=donate)
    batches = problem.forever()

    def run(steps: int) -> None:
        nonlocal state
        now = state
        for batch in itertools.islice(batches, steps):
            now, _metrics = fast(now, batch)
        state = now

    run.params = lambda: list(state.params.values())  # type: ignore[attr-defined]
    if "ema" in state.extra:
        run.averages = lambda: list(state.extra["ema"].params.values())  # type: ignore[attr-defined]
    run.step = fast  # type: ignore[attr-defined]
    return run


# ---------------------------------------------------------------------------------------------------------- contenders


def recipe_contenders(problem: Problem, steps: int = 2, precision: str = "bf16-mixed") -> list[Contender]:
    return [
        Contender("hand", "hand-written, eager, fused AdamW", hand_recipe(problem, precision), steps),
        Contender(
            "hand_compiled", "hand-written, compiled model", hand_recipe(problem, precision, compiled=True), steps
        ),
        Contender("ft_donated", "ft.compile, donated", ft_run(problem, lambda model: recipe(model, precision)), steps),
    ]


def parts_contenders(problem: Problem, steps: int = 1) -> list[Contender]:
    return [
        Contender("hand", "hand-written, eager, fused AdamW", hand_parts(problem), steps),
        Contender("hand_compiled", "hand-written, compiled model", hand_parts(problem, compiled=True), steps),
        Contender("ft_donated", "ft.compile, donated, one call", ft_run(problem, parts), steps),
    ]


def agree(contenders: Sequence[Contender], problem: Problem, precision: str = "32-true") -> str:
    """Raise unless all have trained to the same parameters and averages, up to a fraction of what training changed.

    Both are norms over all parameters: a single element whose gradient is near zero says nothing.
    """
    start = [p.detach() for p in problem.model().parameters()]
    allowed, worst = TOLERANCE[precision], 0.0
    for what in ("params", "averages"):
        found = {one.key: getattr(one.run, what)() for one in contenders if hasattr(one.run, what)}
        if not found:
            continue
        (first, want), *others = found.items()
        moved = _distance(want, start)
        if not moved > 0:
            raise RuntimeError(f"{first}: the {what} were not trained")
        for key, got in others:
            off = _distance(got, want) / moved
            worst = max(worst, off)
            if not off <= allowed:
                raise RuntimeError(f"{key} trains otherwise than {first}: {what} differ by {off:.1%} of the update")
    return f"within {worst:.1e} of the update"


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x - y).double().square().sum() for x, y in zip(a, b, strict=True)) ** 0.5)
