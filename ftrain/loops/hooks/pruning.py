"""Magnitude pruning: the smallest weights are masked, at moments of the run, by masks that `ft.with_mask` applies inside the step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import HookError, LimitError, explain
from ...optim.masks import Mask, resolve, some, take
from ...optim.transform import value_at
from ...state import TrainState
from ...steps.mask import masked_params
from ..cadences import Cadence
from ..events import Event, Outcome, compose, on
from .asking import cadence

__all__ = ["prune", "smallest"]

Amount = float | str | Callable[[Tensor], Tensor]


def prune(
    amount: Amount, *, when: Cadence, select: Mask | None = None, scope: str = "global", mask: str = "mask"
) -> Any:
    """A hook that masks the smallest weights by magnitude, whenever a cadence fires.

    Law: of the n weights in its scope, those with the `round(amount n)` smallest magnitudes are masked, what is masked already before
    the others; all others are not. The numbers are found on the device. Metric: `sparsity`, the masked part of the selected weights.

    The masks are those of `ft.with_mask(step)`, which keeps what is masked at zero in every step, inside its graph.

    Args:
        amount: the part that is masked afterwards, in [0, 1], of all and not of what is left; or a schedule, `step -> part` (int64 ()
            to a floating (), e.g. `ft.schedules.polynomial(...)`, or `lambda step: 1 - 0.8 ** (step // 1000)` for a fifth of what is
            left at each 1000 steps); where it falls, weights come back, at zero. Or `"2:4"`: the 2 largest of each 4 in a row stay.
        when: e.g. `ft.at(1000)`, `ft.every(steps=100) & ~ft.after(steps=5000)`, `ft.every(epochs=1)`.
        select: which of the masked parameters; default: all that `with_mask` has masks for.
        scope: `"global"`: the smallest of all selected weights; `"leaf"`: of each parameter by itself.
        mask: name of the masks in `state.extra`.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`. Its masks are in the state: they are in checkpoints, and the run can be resumed.

    Raises:
        LimitError: now, if an argument makes no sense.
        HookError: when the run starts or it prunes, if the state has no such masks, or `"2:4"` does not divide a row.
        ModelError: likewise, if `select` fits nothing.

    The lottery ticket, with the masks of one run and the first values of its parameters:

        first = step.init(ft.init(model, tx))
        found = ft.fit(first, step, data, epochs=9, hooks=[ft.hooks.prune(0.8, when=ft.at(epochs=8))]).state
        ticket = first.replace(extra={**first.extra, "mask": found.extra["mask"]})
        ticket = ticket.replace(params={n: p * ticket.extra["mask"].get(n, 1) for n, p in ticket.params.items()})
        ft.fit(ticket, step, data, epochs=9)

    Source: Zhu & Gupta, "To prune, or not to prune", 2017; Frankle & Carbin, "The lottery ticket hypothesis", ICLR 2019; values as
    `torch.nn.utils.prune.l1_unstructured` and `global_unstructured`.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(4, 2), ft.optim.sgd(0.1)
    >>> step = ft.with_mask(ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx))
    >>> hook, data = ft.hooks.prune(0.5, when=ft.at(2)), [torch.ones(2, 4)] * 5
    >>> result = ft.fit(ft.init(model, tx), step, data, hooks=[hook], progress=False, compile=False)
    >>> (result.state.params["weight"] == 0).sum(), result.history.last()["sparsity"]
    (tensor(4), 0.5)
    """
    who = "ft.hooks.prune"
    kept = _check_amount(amount, who)
    fraction: Any = amount
    if scope not in ("global", "leaf"):
        raise LimitError(
            explain(
                f"{who}: scope={scope!r} is unknown.",
                expected='"global" or "leaf"',
                got=repr(scope),
                fix='scope="global"',
            )
        )
    moment = cadence(when, who, steps=1000, argument="when")

    def chosen(state: TrainState) -> dict[str, Tensor]:
        masks = state.extra.get(mask)
        if not isinstance(masks, Mapping):
            raise HookError(
                explain(
                    f"{who}: the state has no masks.",
                    where=f"state.extra[{mask!r}]",
                    expected="the masks of ft.with_mask",
                    got=f"state.extra with {', '.join(state.extra) or 'nothing'}",
                    fix="step = ft.with_mask(step)",
                )
            )
        found = dict(masks)
        if select is not None:
            found = take(found, resolve(select, {name: state.params[name] for name in masks}, "prune: select"))
        if kept is not None:
            _check_rows(found, kept, who)
        return found

    def check(state: TrainState, event: Event) -> TrainState:
        chosen(state)
        return state

    def update(state: TrainState, event: Event) -> Outcome:
        old = chosen(state)
        sizes = {name: _magnitude(state.params[name], own) for name, own in old.items()}
        if kept is not None:
            new = {name: _largest(size, *kept) for name, size in sizes.items()}
        else:
            part = torch.full_like(state.step, 1.0, dtype=torch.float64) * value_at(fraction, state.step)
            if scope == "leaf":
                new = {name: ~smallest(size.flatten(), part).reshape(size.shape) for name, size in sizes.items()}
            else:
                new = _split(~smallest(torch.cat([size.flatten() for size in sizes.values()]), part), sizes)
        masks = {**state.extra[mask], **new}
        gone = torch.stack([(~own).sum() for own in new.values()]).sum()
        sparsity = gone.to(torch.float64) / sum(own.numel() for own in new.values())
        changed = state.replace(params=masked_params(state.params, masks), extra={**state.extra, mask: masks})
        return Outcome(changed, {"sparsity": sparsity})

    return compose(on("start", check), on(moment, update))


def smallest(sizes: Tensor, part: Tensor) -> Tensor:
    """Which values are the smallest: `round(part n)` of them; of equal ones the first. Nothing is read on the host.

    Args:
        sizes: (n,), floating.
        part: (), in [0, 1].

    >>> import torch
    >>> from ftrain.loops.hooks.pruning import smallest
    >>> smallest(torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor(0.5))
    tensor([False,  True, False,  True])
    """
    count = (part.to(torch.float64) * sizes.numel()).round()
    order = sizes.argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(sizes.numel(), device=sizes.device))
    return rank < count


def _magnitude(leaf: Tensor, mask: Tensor) -> Tensor:
    """What weights are compared by: their magnitude, and less than any for what is masked already."""
    size = leaf.detach().abs()
    size = size if size.dtype == torch.float64 else size.to(torch.float32)
    return torch.where(mask, size, -1.0)


def _largest(sizes: Tensor, n: int, m: int) -> Tensor:
    """The n largest of each m in a row: bool, of the shape of `sizes`."""
    groups = sizes.reshape(-1, m)
    best = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, best, True).reshape(sizes.shape)


def _split(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(flat, [one.numel() for one in like.values()])
    return {name: part.reshape(one.shape).clone() for (name, one), part in zip(like.items(), parts, strict=True)}


def _check_amount(amount: Any, who: str) -> tuple[int, int] | None:
    """The n and m of `"n:m"`, or None for a fraction."""
    form = re.fullmatch(r"(\d+):(\d+)", amount) if isinstance(amount, str) else None
    if form is not None and 0 < int(form[1]) < int(form[2]):
        return int(form[1]), int(form[2])
    number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
    if not (callable(amount) or (number and 0 <= amount <= 1)):
        raise LimitError(
            explain(
                f"{who}: amount={amount!r} makes no sense.",
                expected='a part in [0, 1], a schedule step -> part, or "2:4"',
                got=repr(amount),
                cause="it is a part of all weights, not a number of them" if number and amount > 1 else None,
                fix="ft.hooks.prune(0.5, when=ft.at(1000))",
            )
        )
    return None


def _check_rows(masks: dict[str, Tensor], kept: tuple[int, int], who: str) -> None:
    odd = [name for name, own in masks.items() if not own.ndim or own.shape[-1] % kept[1]]
    if odd:
        raise HookError(
            explain(
                f"{who}: rows are not a multiple of {kept[1]} long.",
                where=some(odd),
                expected=f"a last dimension that is a multiple of {kept[1]}",
                got=str(tuple(masks[odd[0]].shape)),
                fix="select=...   # those that are",
            )
        )
