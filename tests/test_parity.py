"""Parity with hand-written loops of torch.optim, in float64, and golden losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ftrain as ft

from .corpus import MODELS, Gpt, setup

PAIRS: dict[str, tuple[Callable[[], ft.Transform], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (lambda: ft.optim.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd_momentum_decay": (
        lambda: ft.optim.sgd(0.05, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    ),
    "sgd_nesterov": (
        lambda: ft.optim.sgd(0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    ),
    "adam": (lambda: ft.optim.adam(1e-2), lambda p: torch.optim.Adam(p, 1e-2)),
    "adam_l2": (
        lambda: ft.optim.adam(1e-2, b1=0.8, b2=0.99, eps=1e-6, weight_decay=1e-2),
        lambda p: torch.optim.Adam(p, 1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=1e-2),
    ),
    "adamw": (lambda: ft.optim.adamw(1e-2), lambda p: torch.optim.AdamW(p, 1e-2)),
    "adamw_injected": (lambda: ft.optim.inject(ft.optim.adamw)(lr=1e-2), lambda p: torch.optim.AdamW(p, 1e-2)),
}


def deterministic(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model


def by_hand(
    model: nn.Module, loss_fn: Any, batches: list[Any], make: Any, clip: float | None, *, schedule: Any = None
) -> dict[str, torch.Tensor]:
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) if schedule else None
    for batch in batches:
        optimizer.zero_grad()
        out = loss_fn(model, batch)
        loss = out[0] if isinstance(out, tuple) else out
        loss = loss.total / loss.weight if isinstance(loss, ft.metrics.Mean) else loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def furthest(model: nn.Module, state: ft.TrainState, expected: dict[str, torch.Tensor]) -> float:
    got = {**state.params, **state.frozen, **state.buffers}
    assert got.keys() == expected.keys()
    moved = max((expected[k] - v).abs().max().item() for k, v in dict(model.named_parameters()).items())
    assert moved > 1e-2, "nothing moved, so nothing was compared"
    return max((got[k] - v.detach()).abs().max().item() for k, v in expected.items())


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("model", ["mlp", "two_heads"])
def test_fifty_steps_of_every_optimizer(model: str, pair: str) -> None:
    _compare(model, pair, clip=None)


@pytest.mark.parametrize("model", MODELS)
def test_fifty_steps_of_every_model_with_clipping(model: str) -> None:
    _compare(model, "adamw" if model != "conv_bn" else "sgd_momentum_decay", clip=0.3)


def _compare(model: str, pair: str, clip: float | None) -> None:
    case = MODELS[model]
    module = deterministic(case.model(torch.float64))
    make, torch_make = PAIRS[pair]
    tx = make() if clip is None else ft.optim.chain(ft.optim.clip_by_global_norm(clip), make())
    state = ft.init(module, tx)
    step = ft.train_step(module, case.loss_fn, tx)
    batches = case.batches(50, dtype=torch.float64)
    for batch in batches:
        state, _ = step(state, batch)
    reference = deterministic(case.model(torch.float64))
    expected = by_hand(reference, case.loss_fn, batches, torch_make, clip)
    assert furthest(module, state, expected) < 1e-10


def test_fifty_compiled_steps() -> None:
    case = MODELS["two_heads"]
    module, tx = case.model(torch.float64), PAIRS["adamw"][0]()
    batches = case.batches(50, dtype=torch.float64)
    result = ft.fit(
        ft.init(module, tx), ft.train_step(module, case.loss_fn, tx), batches, progress=False, backend="aot_eager"
    )
    expected = by_hand(case.model(torch.float64), case.loss_fn, batches, PAIRS["adamw"][1], None)
    assert furthest(module, result.state, expected) < 1e-10


def test_the_schedule_is_that_of_a_torch_scheduler() -> None:
    case = MODELS["two_heads"]
    schedule = ft.schedules.warmup_cosine(1e-2, 5, 40, end=1e-4)
    module, tx = case.model(torch.float64), ft.optim.adamw(schedule)
    batches = case.batches(50, dtype=torch.float64)
    state, step = ft.init(module, tx), ft.train_step(module, case.loss_fn, tx)
    for batch in batches:
        state, _ = step(state, batch)
    expected = by_hand(
        case.model(torch.float64),
        case.loss_fn,
        batches,
        lambda p: torch.optim.AdamW(p, 1.0),
        None,
        schedule=lambda t: float(schedule(torch.tensor(t))),
    )
    assert furthest(module, state, expected) < 1e-10


# The losses of five steps in float64, printed by `python -m tests.test_parity`. A change of these numbers is a change of the
# numerics: say so in the changelog.
GOLDEN = {
    "two_heads": [0.8050484465013644, 1.369041123952671, 1.3770723917726388, 1.1991292299567058, 1.1431407423154951],
    "gpt": [8.81985273349009, 10.915553904396132, 10.028552511601864, 8.057702844424767, 8.169262923394076],
}


def losses(model: str) -> list[float]:
    case, step, state = setup(model, "adamw_clip_warmup", dtype=torch.float64)
    found = []
    for batch in case.batches(5, dtype=torch.float64):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"].compute()))
    return found


@pytest.mark.parametrize("model", GOLDEN)
def test_golden_losses(model: str) -> None:
    assert losses(model) == pytest.approx(GOLDEN[model], rel=1e-12)


def test_tied_weights_are_one_leaf() -> None:
    state = ft.init(Gpt(), ft.optim.adam(1e-3))
    assert "token.weight" in state.params
    assert "head.weight" not in state.params


if __name__ == "__main__":
    print({model: losses(model) for model in GOLDEN})  # noqa: T201 - what the comment above GOLDEN asks for
