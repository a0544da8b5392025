"""Batch-norm statistics of given parameters, from one pass over data; for averaged weights, whose own statistics nobody has seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import rng
from ..data import Feed
from ..data.window import ungrouped
from ..errors import DataError, ModelError, explain
from ..state import TrainState, check_state
from ..steps.average import averaged
from ..steps.bind import check_closure, takes_rng
from ..steps.skeleton import Installed, Skeleton

__all__ = ["update_bn"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def update_bn(
    model: nn.Module,
    state: TrainState,
    data: Any,
    fn: Callable[..., Any] | None = None,
    *,
    params: str | None = None,
    batch_size: int | None = None,
) -> TrainState:
    """Estimate the running statistics of all batch norms anew, as plain means over the batches of some data.

    Args:
        model: the module; only its code is used. In training mode, as in a step.
        state: only read.
        data: as for `ft.evaluate`; one pass.
        fn: `fn(model, batch)` or `fn(model, batch, rng)`, which calls the model; default: `model(batch)`.
        params: the name of averaged parameters (`"swa"`) whose statistics are wanted; default: the state's own.
        batch_size: for arrays: samples in a batch.

    Returns:
        A state with the new statistics: in `state.buffers`, or those of the average.

    Raises:
        ModelError: the model has no batch norm with running statistics.
        DataError: the data has no batches.

    Source: Izmailov et al., UAI 2018; as `torch.optim.swa_utils.update_bn`.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.BatchNorm1d(1)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> ft.update_bn(model, state, [torch.tensor([[1.0], [3.0]])] * 2).buffers["running_mean"]
    tensor([2.])
    """
    skeleton = Skeleton(model, train=True)
    check_state(state, "ft.update_bn")
    call: Callable[..., Any] = (lambda model, batch: model(batch)) if fn is None else fn
    wants_rng = takes_rng(call, 2, "fn", "fn(model, batch) or fn(model, batch, rng)")
    check_closure(model, call, "fn")
    skeleton.module.train()
    own, buffers = (state.params, state.buffers) if params is None else averaged(state, params, "ft.update_bn")
    skeleton.check(own, {**state.frozen, **buffers})
    reset = _reset(skeleton.module, buffers)
    buffers = {**buffers, **reset}
    source = ungrouped(data, seed=state.counters().seed, batch_size=batch_size, what="ft.update_bn")
    source.check("ft.update_bn")
    counters = state.counters()
    feed, count = Feed(source(0), state.device, source.finish, 0), 0
    try:
        for count, batch in enumerate(feed, start=1):
            seed = rng.fold_in_host(counters.seed, counters.step, 0xB2, count)
            installed = Installed(skeleton, own, {**state.frozen, **buffers})
            with torch.no_grad(), rng.seeded(seed, state.device), installed as module:
                try:
                    if wants_rng:
                        call(module, batch, rng.key(seed, state.device))
                    else:
                        call(module, batch)
                except Exception as error:
                    if fn is None:
                        error.add_note(
                            "ftrain: ft.update_bn called model(batch); for other batches give it "
                            "fn=lambda model, batch: model(batch['x'])"
                        )
                    raise
                new = installed.buffers()
            installed.check_unwritten()
            buffers = {name: new[name] for name in state.buffers}
    finally:
        feed.close()
        source.close()
    if count == 0:
        raise DataError(explain("ft.update_bn: the data has no batches.", expected="at least one batch"))
    if not any(
        bool(buffers[name] > 0) for name in reset if name.endswith("num_batches_tracked")
    ):  # one look, at the end
        raise ModelError(
            explain(
                "ft.update_bn: no batch norm saw a batch, so there are no statistics.",
                expected="an fn that calls the model",
                got=getattr(fn, "__name__", repr(fn)),
                cause="fn does not call its argument, or the batch norms are in evaluation mode",
                fix="fn=lambda model, batch: model(batch['x'])",
            )
        )
    if params is None:
        return state.replace(buffers=buffers)
    average = state.extra[params]
    kept = {name: leaf.to(average.buffers[name].dtype) for name, leaf in buffers.items()}
    return state.replace(extra={**state.extra, params: average._replace(buffers=kept)})


def _reset(model: nn.Module, buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """First statistics, and the private copy's batch norms set to plain means (momentum None)."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, _NORMS) and module.running_mean is not None:
            module.momentum = None
            names = [f"{path}.{name}".lstrip(".") for name in ("running_mean", "running_var", "num_batches_tracked")]
            for name, value in zip(names, (0, 1, 0), strict=True):
                found[name] = torch.full_like(buffers[name], value)
    if not found:
        raise ModelError(
            explain(
                f"ft.update_bn: {type(model).__name__} has no batch norm with running statistics.",
                expected="a BatchNorm module with track_running_stats=True",
                fix="leave out ft.update_bn: nothing needs to be estimated",
            )
        )
    return found
