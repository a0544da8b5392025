"""What is a spike: one rule, as pure functions of tensors, for the step that skips (`ft.with_skip`) and the hook that goes back.

A value v is a spike where it lies far above the last `window` values that were none: with their mean m and standard deviation s,

    v > m + max(factor * s, atol),

asked from when `warmup` values are known. Where `nonfinite` holds, inf and NaN are spikes at any time. What is a spike, and
what is not finite, does not enter the window, so that one bad batch does not hide the next one, and the statistic is that of the
run without it.

Source: Team OLMo, "2 OLMo 2 Furious", 2025 (steps are skipped where loss or gradient norm is more than six standard deviations above
the last 128; there, spikes enter the window too). That the batches around a spike are left out, from a state before it: Chowdhery
et al., "PaLM", JMLR 2023, section 5.1.

Laws
----
- Nothing is read on the host.
- A value that is a spike leaves the statistic bitwise as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LimitError, explain

__all__ = ["Rule", "Verdict", "Watch", "enter", "first_watch", "judge", "make_rule"]


class Watch(NamedTuple):
    """The statistic: `values` float64 (window,), a ring, 0 where there is none yet; `seen` int64 (), how many ever entered."""

    values: Tensor
    seen: Tensor


class Verdict(NamedTuple):
    """What was found of a value: `bad` bool (); the `mean` and `deviation` it was compared with, float64 ()."""

    bad: Tensor
    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Rule:
    """The numbers of the rule; see `make_rule`."""

    window: int
    factor: float
    warmup: int
    atol: float
    nonfinite: bool


def make_rule(what: str, *, window: int, factor: float, warmup: int | None, atol: float, nonfinite: bool) -> Rule:
    """The rule with these numbers; `what` opens the messages.

    Raises:
        LimitError: a number that makes no sense.

    >>> from ftrain.steps.spikes import make_rule
    >>> make_rule("ft.with_skip", window=128, factor=6.0, warmup=None, atol=0.0, nonfinite=True).warmup
    64
    """
    _whole(what, "window", window, 2, 128)
    _number(what, "factor", factor, 6.0)
    _number(what, "atol", atol, 0.0)
    if warmup is not None:
        _whole(what, "warmup", warmup, 2, 64)
    if not isinstance(nonfinite, bool):
        raise LimitError(
            explain(
                f"{what}: nonfinite= is True or False.", expected="a bool", got=repr(nonfinite), fix="nonfinite=True"
            )
        )
    return Rule(window, float(factor), max(2, window // 2) if warmup is None else warmup, float(atol), nonfinite)


def first_watch(rule: Rule, device: torch.device) -> Watch:
    """The statistic of no values.

    >>> import torch
    >>> from ftrain.steps.spikes import first_watch, make_rule
    >>> rule = make_rule("ft.with_skip", window=2, factor=6.0, warmup=None, atol=0.0, nonfinite=True)
    >>> first_watch(rule, torch.device("cpu"))
    Watch(values=tensor([0., 0.], dtype=torch.float64), seen=tensor(0))
    """
    return Watch(
        torch.zeros(rule.window, dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def judge(rule: Rule, watch: Watch, value: Tensor) -> Verdict:
    """Whether a value, float64 (), is a spike.

    >>> import torch
    >>> from ftrain.steps.spikes import Watch, judge, make_rule
    >>> rule = make_rule("ft.with_skip", window=4, factor=6.0, warmup=3, atol=0.0, nonfinite=True)
    >>> watch = Watch(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64), torch.tensor(3))
    >>> [judge(rule, watch, torch.tensor(v, dtype=torch.float64)).bad.item() for v in (8.0, 8.1, -9.0, torch.nan)]
    [False, True, False, True]
    """
    known = watch.seen.clamp(max=rule.window)
    mean = watch.values.sum() / known.clamp(min=1)
    place = torch.arange(rule.window, device=watch.values.device)
    apart = torch.where(place < known, watch.values - mean, 0.0)
    deviation = (apart.square().sum() / (known - 1).clamp(min=1)).sqrt()
    bad = (watch.seen >= rule.warmup) & (value > mean + (rule.factor * deviation).clamp(min=rule.atol))
    return Verdict(bad | ~torch.isfinite(value) if rule.nonfinite else bad, mean, deviation)


def enter(watch: Watch, value: Tensor, where: Tensor) -> Watch:
    """The statistic with one value more, where the flag, bool (), holds and the value is finite.

    >>> import torch
    >>> from ftrain.steps.spikes import Watch, enter
    >>> watch = Watch(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor(2))
    >>> enter(watch, torch.tensor(5.0, dtype=torch.float64), torch.tensor(True))
    Watch(values=tensor([5., 2.], dtype=torch.float64), seen=tensor(3))
    """
    enters = where & torch.isfinite(value)
    size = watch.values.shape[0]
    place = torch.arange(size, device=watch.values.device) == watch.seen % size
    return Watch(torch.where(place & enters, value, watch.values), watch.seen + enters.to(torch.int64))


def _whole(what: str, key: str, value: object, least: int, better: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LimitError(
            explain(
                f"{what}: {key}={value!r} makes no sense.",
                expected=f"an integer >= {least}, in steps",
                got=repr(value),
                fix=f"{key}={better}",
            )
        )


def _number(what: str, key: str, value: object, better: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= math.inf:
        raise LimitError(
            explain(
                f"{what}: {key}={value!r} makes no sense.",
                expected="a number >= 0",
                got=repr(value),
                fix=f"{key}={better}",
            )
        )
