"""What a run does when gradients were not finite.

That a step was skipped is decided and counted on the device, by `ft.optim.skip_nonfinite` or by dynamic loss scaling, without a
look at it from the host. This hook looks at the counts now and then, and ends the run when there are too many. Without the hook
the run goes on: the policy `skip`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import HookError, LimitError, LossError, explain
from ...state import TrainState
from ..cadences import Cadence
from ..events import Event, Hook, Outcome, on
from ..units import every

__all__ = ["nonfinite"]

Memory = dict[str, Tensor]

_FIX = (
    "loss_fn(ft.to_module(model, state), batch).backward()   # under torch.autograd.set_detect_anomaly(True): where it begins\n"
    "ft.optim.skip_nonfinite(ft.optim.chain(ft.optim.clip_by_global_norm(1.0), tx))   # with a lower lr, or a warm-up"
)
_every = every


def nonfinite(policy: str, *, every: Cadence | None = None, allow: int = 0, name: str = "nonfinite") -> Any:
    """A hook that ends the run when steps were skipped because their gradient held an inf or a NaN.

    It reads the counts of `ft.optim.skip_nonfinite` and of dynamic loss scaling from the state, when the cadence fires and at the end.
    The steps themselves were skipped at once, so nothing is spoilt however late it looks.

    Args:
        policy: `"raise"` an error, or `"stop"` the run with a reason. To skip and go on is what happens without this hook.
        every: when to look; default: every 50 steps, as often as `ft.fit` records.
        allow: so many skipped steps are let pass between two looks. Dynamic loss scaling finds its scale by skipping: let it.
        name: of the memory in `state.extra`: the count at the last look.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`.

    Raises:
        LimitError: now, if an argument makes no sense.
        HookError: when the run starts, if nothing in the state counts skipped steps.
        LossError: in the run, under the policy `"raise"`.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.skip_nonfinite(ft.optim.sgd(0.1))
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> data = [torch.ones(2, 1), torch.full((2, 1), 1e30), torch.ones(2, 1)]
    >>> hook = ft.hooks.nonfinite("stop", every=ft.every(steps=1))
    >>> ft.fit(ft.init(model, tx), step, data, hooks=[hook], progress=False, compile=False).reason
    'nonfinite: 1 step was skipped because its gradient was not finite'
    """
    if policy not in ("raise", "stop"):
        raise LimitError(
            explain(
                f"ft.hooks.nonfinite: there is no policy {policy!r}.",
                expected='"raise" or "stop"',
                got=repr(policy),
                cause="to skip and go on is what happens without the hook" if policy == "skip" else None,
                fix='ft.hooks.nonfinite("raise")',
            )
        )
    if isinstance(allow, bool) or not isinstance(allow, int) or allow < 0:
        raise LimitError(
            explain(
                "ft.hooks.nonfinite: allow= is a count.", expected="an integer >= 0", got=repr(allow), fix="allow=10"
            )
        )
    if every is not None and not isinstance(every, Cadence):
        raise LimitError(
            explain(
                "ft.hooks.nonfinite: every= is no cadence.",
                expected="ft.every(...)",
                got=repr(every),
                fix="every=ft.every(steps=50)",
            )
        )

    def init(state: TrainState) -> Memory:
        return {"seen": _skipped(state)}

    def update(state: TrainState, memory: Memory, event: Event) -> Any:
        if event.kind == "start":
            _check_counted(state)
            return state, memory
        now = _skipped(state)
        found, new = int(now - memory["seen"]), {"seen": now}  # sync: once per look
        if found <= allow:
            return state, new
        steps = f"{found} step{'' if found == 1 else 's'} {'was' if found == 1 else 'were'} skipped"
        whose = "its gradient was" if found == 1 else "their gradients were"
        if policy == "stop":
            return Outcome(state, stop=f"{name}: {steps} because {whose} not finite"), new
        raise LossError(
            explain(
                f"{steps}, because {whose} not finite.",
                where=f"since the last look at the counts, up to step {event.step}",
                expected=f"at most {allow}" if allow else "none",
                got=str(found),
                cause="inputs that hold inf or NaN, a log, root or division at zero, a learning rate that is too high, "
                "or the range of float16",
                fix=_FIX,
            )
        )

    return on(("start", every or _every(steps=50), "end"), Hook(name, init, update))


def _skipped(state: TrainState) -> Tensor:
    """How many steps were skipped in all, by whatever counts them: int64 (), not read."""
    total = torch.zeros((), dtype=torch.int64, device=state.device)
    for count in _counts((state.opt, state.extra)):
        total = total + count
    return total


def _counts(node: Any) -> Iterator[Tensor]:
    if isinstance(node, tuple) and {"skipped", "finite"} <= set(getattr(node, "_fields", ())):
        yield node.skipped  # type: ignore[attr-defined]  # a NamedTuple with this field
    children = node.values() if isinstance(node, dict) else node if isinstance(node, (tuple, list)) else ()
    for child in children:
        yield from _counts(child)


def _check_counted(state: TrainState) -> None:
    if next(_counts((state.opt, state.extra)), None) is None:
        raise HookError(
            explain(
                "ft.hooks.nonfinite: nothing in the state counts skipped steps.",
                where="state.opt",
                expected="the state of ft.optim.skip_nonfinite, or a loss scale",
                got=type(state.opt).__name__,
                fix="tx = ft.optim.skip_nonfinite(tx)   # in ft.init and ft.train_step alike",
            )
        )
