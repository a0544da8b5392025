"""Every ready hook, resumed after each step of a run: it ends as the run that was not stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ftrain as ft

from .test_resume import Memory

X = torch.linspace(-1, 1, 48).reshape(24, 2)
DATA = [{"x": x, "y": x.sum(dim=1, keepdim=True)} for x in X.split(4)]  # six batches


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.25), nn.Linear(4, 1))


def loss_fn(model: nn.Module, batch: Any) -> Any:
    return (model(batch["x"]) - batch["y"]).square().mean()


TX = ft.optim.skip_nonfinite(ft.optim.freezable(ft.optim.inject(ft.optim.adam)(lr=1e-2), ["0.*"]))
STEP = ft.with_mask(ft.with_ema(ft.train_step(model(), loss_fn, TX), 0.5))
VAL = ft.eval_step(model(), lambda model, batch: {"loss": (model(batch["x"]) - batch["y"]).square().mean()})

EACH = ft.every(steps=2)
HOOKS: dict[str, Callable[[], Any]] = {
    "device_stats": lambda: ft.hooks.device_stats(every=EACH),
    "early_stop": lambda: ft.hooks.early_stop("val/loss", patience=1, min_delta=10.0),
    "early_stop of training": lambda: ft.hooks.early_stop("loss", patience=1, min_delta=10.0),
    "garbage_collection": lambda: ft.hooks.garbage_collection(every=EACH),
    "learning_rate": lambda: ft.hooks.learning_rate(every=EACH, prefix="rates/"),
    "nonfinite": lambda: ft.hooks.nonfinite("stop", every=EACH, allow=1),
    "plateau": lambda: ft.hooks.plateau("val/loss", patience=0, factor=0.5, threshold=10.0),
    "plateau of training": lambda: ft.hooks.plateau("loss", patience=0, factor=0.5, threshold=10.0),
    "prune": lambda: ft.hooks.prune(0.5, when=ft.at(3)),
    "spike_guard": lambda: ft.hooks.spike_guard("skip", window=8),
    "swap_average": lambda: ft.hooks.swap_average("ema", on=ft.at(4)),
    "throughput": lambda: ft.hooks.throughput(every=EACH),
    "timer": lambda: ft.hooks.timer("1h"),
    "unfreeze": lambda: ft.hooks.unfreeze({"0.*": ft.at(3)}),
    "once": lambda: ft.once(ft.at(3), lambda state, event: ft.Outcome(state, {"third": 1.0})),
}


def run(hook: Callable[[], Any], saver: Any = None, **more: Any) -> ft.Result:
    bad = [DATA[0], {**DATA[1], "y": DATA[1]["y"] * torch.nan}, *DATA[2:]]  # for those that watch; the step skips it
    evals = {"val": ft.Evaluator(VAL, DATA[:2], every=ft.every(steps=3))}
    arguments: dict[str, Any] = {"epochs": 2, "evals": evals, "log": EACH, "progress": False, "compile": False}
    return ft.fit(ft.init(model(), TX), STEP, bad, hooks=[hook()], checkpoint=saver, **arguments, **more)


@pytest.mark.parametrize("name", HOOKS)
def test_resumed_after_each_step(name: str) -> None:
    hook = HOOKS[name]
    whole = run(hook)
    saver = Memory(ft.every(steps=1) | ft.every(epochs=1))
    run(hook, saver)
    assert len(saver.shots) > 2
    for shot in saver.shots:
        again = run(hook, Memory(ft.every(epochs=100), shot), resume="auto")
        assert again.reason == whole.reason
        for (path, one), two in zip(ft.tree.items(again.state, "state"), ft.tree.leaves(whole.state), strict=True):
            # What `throughput` keeps is the clock's.
            assert "throughput" in path or torch.equal(one, two) or bool((one.isnan() & two.isnan()).all()), path


def test_none_is_forgotten() -> None:
    tested = {name.partition(" ")[0] for name in HOOKS} - {"once"}
    assert tested == set(ft.hooks.__all__)
