"""What to do when a batch makes the loss jump: leave it out, go back to before it, stop, or raise.

The statistic is kept on the device, and so is the finding that something was wrong; the host looks at it when a cadence fires. What a
spike is stands in `ftrain/steps/spikes.py`.

Laws
----
- Where there is no spike, a run is bitwise the run without this hook.
- With `"skip"` a run ends bitwise as the run on the data without the bad batches, counts of this hook aside; with `"rollback"`, as the
  run on the data without all batches since the copy.
- All it knows is in the state, copy included: a run that is resumed goes on as if it had not been stopped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tree
from ...errors import LimitError, LossError, explain
from ...state import TrainState
from ...steps.spikes import Verdict, Watch, enter, first_watch, judge, make_rule
from ..cadences import Cadence
from ..events import Event, Hook, Outcome, compose, on
from ..units import every as _every
from .monitors import check_choice, check_every, check_names, check_numbers, step_metric, value_of

__all__ = ["spike_guard"]

Memory = dict[str, Any]
_HOOK = "spike_guard"
_PARTS = ("params", "frozen", "buffers", "opt", "step", "samples")
_FIX = (
    "ft.optim.chain(ft.optim.clip_by_global_norm(1.0), tx)   # with a lower lr, or a longer warm-up\n"
    "loss_fn(ft.to_module(model, state), batch)              # look at the batch eagerly"
)


def spike_guard(
    policy: str,
    *,
    monitor: str = "loss",
    window: int = 128,
    factor: float = 6.0,
    warmup: int | None = None,
    atol: float = 0.0,
    nonfinite: bool = True,
    every: Cadence | None = None,
    limit: int = 10,
    name: str = _HOOK,
) -> Any:
    """A hook that watches a metric of training for spikes and for what is not finite.

    A value v is bad where `v > m + max(factor s, atol)`, with m, s the mean and standard deviation of the last `window` values that
    were not bad, or where it is inf or NaN.

    Policies, when something was bad since the last look:

    - `"skip"`: looks after every step. The state becomes again what it was before the step; the batch is left out.
    - `"rollback"`: the state becomes again what it was at the last look that found nothing; the batches since then are left out.
      So it is at the end of an epoch and of the run, too.
    - `"stop"`: the run ends with a reason. `"raise"`: with a `LossError`.

    Going back leaves the data where it is; steps and samples go back with the state, epochs do not. Save when it looks, with the same
    cadence: it looks first, so no checkpoint then holds a step that is undone later.

    Costs: at each step some operations on `window` numbers on the device. A look is one transfer. `"skip"` and `"rollback"` keep a
    copy of the state in the state, so they double its memory and its checkpoints; a look that finds nothing copies it anew. That is
    one transfer and one copy of the state for each step with `"skip"`. `ft.with_skip` skips without either, inside the step.

    Args:
        policy: see above.
        monitor: a metric of the step that is high where something is wrong: `"loss"`, `"grad_norm"`.
        window: over how many values mean and deviation are taken.
        factor: how many deviations above the mean is a spike.
        warmup: so many values are needed before there are spikes; default: half the window.
        atol: a rise that is not larger is no spike, in units of the metric, however small the deviation.
        nonfinite: whether inf and NaN are bad (from the first step on).
        every: when to look; default: every 100 steps. Not with `"skip"`.
        limit: how often in a row it goes back; once more is a `LossError`, since nothing is gained by going on.
        name: of the memory in `state.extra` (and, with `_copy` after it, of the copy), and of the metric that tells how often it went back so far, recorded when it does.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`; put it last. What other hooks made of the state before it, at the same event, is in the
        copy, and so are those of their memories that were in the state when the run began.

    Raises:
        LimitError: now, if an argument makes no sense.
        HookError: at the first step, if it gives no such metric.
        LossError: in the run, under the policy `"raise"`, after `limit`, or where there is no copy to go back to.

    Source: Chowdhery et al., "PaLM", JMLR 2023, section 5.1 (going back to before a spike, and leaving out the batches around it); the
    rule: Team OLMo, "2 OLMo 2 Furious", 2025.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.adam(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> good, bad = torch.ones(2, 1), torch.full((2, 1), torch.nan)
    >>> def run(data):
    ...     hook = ft.hooks.spike_guard("skip")
    ...     return ft.fit(ft.init(model, tx, seed=0), step, data, hooks=[hook], progress=False, compile=False).state
    >>> torch.equal(run([good, bad, good]).params["weight"], run([good, good]).params["weight"])
    True
    """
    check_choice(_HOOK, "policy", policy, "skip", "rollback", "stop", "raise")
    check_names(_HOOK, monitor=monitor, name=name)
    check_numbers(_HOOK, least=1, limit=limit)
    check_every(_HOOK, every)
    _check_skip(policy, every)
    what = f"ft.hooks.{_HOOK}"
    rule = make_rule(what, window=window, factor=factor, warmup=warmup, atol=atol, nonfinite=nonfinite)
    who = f"ft.hooks.{_HOOK}({policy!r}, monitor={monitor!r})"
    keeps = policy in ("skip", "rollback")
    cadence = every or _every(steps=1 if policy == "skip" else 100)

    def init(state: TrainState) -> Memory:
        count = torch.zeros((), dtype=torch.int64, device=state.device)
        memory: Memory = {
            "watch": first_watch(rule, state.device),
            "bad": torch.zeros_like(count, dtype=torch.bool),
            "first": torch.zeros(4, dtype=torch.float64, device=state.device),
        }
        if not keeps:
            return memory
        return {**memory, "row": count, "back": count.clone()}

    # The copy is a memory of its own: what a hook gives back is compared with what it was given, leaf by leaf, and at each step
    # that should be the few of the statistic only.
    def init_copy(state: TrainState) -> Memory:
        extra = {key: value for key, value in state.extra.items() if key not in (name, _copy_name(name))}
        made = torch.zeros((), dtype=torch.bool, device=state.device)
        return {**_copy(state, first_watch(rule, state.device), extra), "made": made}

    def begin(state: TrainState, memory: Memory, event: Event) -> tuple[TrainState, Memory]:
        return state, _keep(state, name).extra[_copy_name(name)]

    def watch(state: TrainState, memory: Memory, event: Event) -> tuple[TrainState, Memory]:
        value = value_of(step_metric(_HOOK, monitor, event, who), state.device, who)
        found = judge(rule, memory["watch"], value)
        fresh = found.bad & ~memory["bad"]
        new = {
            **memory,
            "watch": enter(memory["watch"], value, ~found.bad),
            "bad": memory["bad"] | found.bad,
            "first": torch.where(fresh, _told(state.step, value, found), memory["first"]),
        }
        return state, new

    def look(state: TrainState, event: Event) -> Any:
        """When the cadence fires, and before the first step."""
        memory: Memory = state.extra[name]
        if event.kind == "start":  # whatever was bad before: this state is what somebody wants to begin with
            fresh = {**memory, "bad": torch.zeros_like(memory["bad"])}
            return state.replace(extra={**state.extra, name: fresh})
        return act(state, event, memory) if _is_bad(memory) else _good(state)

    def _good(state: TrainState) -> TrainState:
        return _keep(state, name, row=torch.zeros_like(state.extra[name]["row"])) if keeps else state

    def between(state: TrainState, event: Event) -> Any:
        """At an evaluation, an epoch's end, the run's end: other hooks may have changed what was copied after this step."""
        memory: Memory = state.extra[name]
        if event.kind != "evaluation" and _is_bad(memory):
            return act(state, event, memory)
        fresh = (
            keeps and event.kind != "end" and int(_kept(state, name)["step"]) == event.step
        )  # sync: once per evaluation
        return _keep(state, name) if fresh and not _is_bad(memory) else state

    def act(state: TrainState, event: Event, memory: Memory) -> Any:
        numbers = memory["first"].tolist()  # sync: only when something was bad
        story = _story(monitor, numbers)
        if policy == "stop":
            return Outcome(state, stop=f"{name}: {story}")
        if policy == "raise":
            raise LossError(explain(f"{who}: {story}.", where=_where(numbers, event), fix=_FIX))
        if not bool(_kept(state, name)["made"]):  # sync: as above
            raise LossError(
                explain(
                    f"{who}: {story}, and there is no good state yet to go back to.",
                    where=_where(numbers, event),
                    expected='a copy made at the "start" event',
                    cause="an ft.on or ft.when around the hook, which keeps that event from it",
                    fix=f'hooks=[ft.hooks.{_HOOK}("{policy}", every=ft.every(steps=100))]   # it knows its events by itself',
                )
            )
        row, back = torch.stack([memory["row"], memory["back"]]).tolist()  # sync: as above
        if row >= limit:
            raise LossError(
                explain(
                    f"{who}: went back {row} times in a row, and {story}. Nothing is gained by going on.",
                    where=_where(numbers, event),
                    expected=f"at most {limit} times in a row (limit={limit})",
                    cause="a learning rate that is too high, data that is bad from here on, or a level that has changed",
                    fix=_FIX,
                )
            )
        return Outcome(_gone_back(state, name), {name: back + 1.0})

    for one in (look, between):
        one.__name__ = name  # as messages call them
    others = {"skip": ("epoch", "evaluation"), "rollback": ("epoch", "evaluation", "end"), "stop": ("epoch",)}
    parts = [
        on("step", Hook(name, init, watch)),
        on(("start", cadence) if keeps else cadence, look),
        on(others.get(policy, ("epoch", "end")), between),
    ]
    return compose(*parts, on("start", Hook(_copy_name(name), init_copy, begin))) if keeps else compose(*parts)


def _copy_name(name: str) -> str:
    return f"{name}_copy"


def _kept(state: TrainState, name: str) -> Memory:
    found: Memory = state.extra[_copy_name(name)]
    return found


def _check_skip(policy: str, every: object) -> None:
    if policy == "skip" and every is not None:
        raise LimitError(
            explain(
                'ft.hooks.spike_guard: "skip" looks after every step.',
                expected="no every=",
                got=f"every={every!r}",
                cause="a batch that was found bad later has been followed by others",
                fix=f'ft.hooks.spike_guard("rollback", every={every!r})   # leaves out the others too\n'
                "ft.with_skip(step)                          # skips inside the step, without a look",
            )
        )


def _is_bad(memory: Memory) -> bool:
    return bool(memory["bad"])  # sync: once per look


def _copy(state: TrainState, watch: Watch, extra: dict[str, Any]) -> dict[str, Any]:
    """The state in memory of its own, which a donated step cannot take; and the statistic, which goes back with it."""
    kept = {part: getattr(state, part) for part in _PARTS}
    copied: dict[str, Any] = tree.map(torch.clone, {**kept, "extra": extra, "watch": watch})
    return copied


def _keep(state: TrainState, name: str, **changes: Tensor) -> TrainState:
    """The state with a new copy of itself in this hook's memory."""
    memory, kept = state.extra[name], _kept(state, name)
    # What has come to be in the state after the copy's form was fixed (the memory of hooks that were made later) is not in it.
    extra = {key: state.extra[key] for key in kept["extra"]}
    new = {**_copy(state, memory["watch"], extra), "made": torch.ones_like(kept["made"])}
    return state.replace(extra={**state.extra, name: {**memory, **changes}, _copy_name(name): new})


def _gone_back(state: TrainState, name: str) -> TrainState:
    """The state that was copied, in the present epoch; the copy stays, for the next time."""
    memory = state.extra[name]
    again = tree.map(torch.clone, _kept(state, name))
    own = {
        **memory,
        "watch": again["watch"],
        "bad": torch.zeros_like(memory["bad"]),
        "first": torch.zeros_like(memory["first"]),
        "row": memory["row"] + 1,
        "back": memory["back"] + 1,
    }
    extra = {**state.extra, **again["extra"], name: own}
    return state.replace(**{part: again[part] for part in _PARTS}, extra=extra)


def _told(step: Tensor, value: Tensor, found: Verdict) -> Tensor:
    """What is said of a bad value: float64 (4,)."""
    return torch.stack([step.to(torch.float64), value, found.mean, found.deviation])


def _story(monitor: str, first: list[float]) -> str:
    step, value, mean, deviation = first
    compared = f"where {mean:.6g} +- {deviation:.2g} was usual"
    return f"{monitor} was {value:.6g} at step {int(step)}" + (f", {compared}" if value - value == 0 else "")


def _where(first: list[float], event: Event) -> str:
    return f"step {int(first[0])}, found at step {event.step}"
