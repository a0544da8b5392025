"""Which checkpoints stay: pure policies over what is known of each checkpoint, joined with `|`.

A policy is a value without memory: `kept(entries)` depends on the entries alone, so it can be asked before anything is deleted.

Laws
----
- `kept(entries)` is a set of steps of these entries; their order does not matter.
- The newest entry is always kept. (Orbax's `best_fn` with `max_to_keep` deletes it when it is not among the best: orbax_study.md,
  section 4.)
- `(a | b).kept(entries) == a.kept(entries) | b.kept(entries)`.
- What is dropped never comes back when entries are added, so deleting as the run goes leaves what one look at the whole history
  would leave. It holds while entries stay as they were: when a kept checkpoint is deleted by someone else, a metric is changed
  afterwards, or a predicate answers otherwise than before, an entry that was dropped may be wanted again, and is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import ArgumentError, LimitError, explain
from .entries import Entry, best, check_mode, never_appears, ordered, rank

__all__ = ["Entry", "Keep", "best", "keep"]


@dataclass(frozen=True)
class _Latest:
    n: int

    def wants(self, entries: Sequence[Entry]) -> Iterable[Entry]:
        return entries[-self.n :]

    def __str__(self) -> str:
        return f"latest={self.n}"


@dataclass(frozen=True)
class _Best:
    n: int
    by: str
    mode: str

    def wants(self, entries: Sequence[Entry]) -> Iterable[Entry]:
        return sorted(entries, key=lambda entry: rank(entry, self.by, self.mode))[: self.n]

    def __str__(self) -> str:
        return f"best={self.n}, by={self.by!r}" + ("" if self.mode == "min" else f", mode={self.mode!r}")


@dataclass(frozen=True)
class _Every:
    n: int

    def wants(self, entries: Sequence[Entry]) -> Iterable[Entry]:
        return [entry for entry in entries if entry.step % self.n == 0]

    def __str__(self) -> str:
        return f"every={self.n}"


@dataclass(frozen=True)
class _EveryEpochs:
    n: int

    def wants(self, entries: Sequence[Entry]) -> Iterable[Entry]:
        first: dict[int, Entry] = {}
        for entry in entries:  # in the order of their steps
            first.setdefault(entry.epoch, entry)
        return [entry for epoch, entry in first.items() if epoch > 0 and epoch % self.n == 0]

    def __str__(self) -> str:
        return f"every_epochs={self.n}"


@dataclass(frozen=True)
class _Where:
    predicate: Callable[[Entry], bool]

    def wants(self, entries: Sequence[Entry]) -> Iterable[Entry]:
        return [entry for entry in entries if self._asked(entry)]

    def _asked(self, entry: Entry) -> bool:
        answer = self.predicate(entry)
        if type(answer).__name__ not in ("bool", "bool_"):  # Python's, or numpy's
            raise ArgumentError(  # None, from a function that forgot to return, would delete checkpoints
                explain(
                    "ft.keep: the predicate of where= did not answer with True or False.",
                    where=f"the checkpoint of step {entry.step}",
                    expected="a bool",
                    got=repr(answer),
                    fix="ft.keep(where=lambda entry: entry.step < 1000)",
                )
            )
        return bool(answer)

    def __str__(self) -> str:
        return f"where={getattr(self.predicate, '__name__', repr(self.predicate))}"


_Policy = _Latest | _Best | _Every | _EveryEpochs | _Where


@dataclass(frozen=True, repr=False)
class Keep:
    """Policies of which each may want a checkpoint. Made by `ft.keep`, joined with `|`.

    >>> import ftrain as ft
    >>> ft.keep(latest=2) | ft.keep(best=3, by="val/accuracy", mode="max")
    keep(latest=2) | keep(best=3, by='val/accuracy', mode='max')
    """

    policies: tuple[_Policy, ...]

    def __or__(self, other: Keep) -> Keep:
        if not isinstance(other, Keep):
            raise ArgumentError(
                explain(
                    "only what ft.keep gave can be joined with |.",
                    expected="ft.keep(...) | ft.keep(...)",
                    got=f"{self!r} | {other!r}",
                )
            )
        return Keep(tuple(dict.fromkeys((*self.policies, *other.policies))))

    def kept(self, entries: Iterable[Entry]) -> set[int]:
        """The steps of the entries that stay; all others may be deleted.

        Raises:
            LimitError: two entries of one step, or a metric to go by that is not a number.
            ArgumentError: a predicate answers with something else than True or False.

        >>> import ftrain as ft
        >>> from ftrain.checkpoint.keeping import Entry
        >>> losses = {10: 0.5, 20: 0.2, 30: float("nan"), 40: 0.9}
        >>> entries = [Entry(step, metrics={"val/loss": loss}) for step, loss in losses.items()]
        >>> ft.keep(best=2, by="val/loss").kept(entries) == {10, 20, 40}  # 40 is the newest
        True
        """
        found = ordered(entries)
        wanted = {entry.step for policy in self.policies for entry in policy.wants(found)}
        return wanted | {entry.step for entry in found[-1:]}

    def best(self) -> list[tuple[str, str]]:
        """What is best: metric and mode of each policy that says so, to be given to `ftrain.checkpoint.best`.

        >>> import ftrain as ft
        >>> (ft.keep(latest=1) | ft.keep(best=3, by="val/loss")).best()
        [('val/loss', 'min')]
        """
        return list(dict.fromkeys((policy.by, policy.mode) for policy in self.policies if isinstance(policy, _Best)))

    def by(self) -> tuple[str, ...]:
        """The metrics that it goes by.

        >>> import ftrain as ft
        >>> ft.keep(best=3, by="val/loss").by()
        ('val/loss',)
        """
        return tuple(dict.fromkeys(by for by, _ in self.best()))

    def check(self, names: Iterable[str], *, ended: bool = False) -> None:
        """Raise when a metric that it goes by will not appear.

        An evaluator gives the same names each time, so a metric is known to be missing as soon as the evaluator in its name has
        reported. One of an evaluator that has not, or of training, may still come: it is missing once the run has ended.

        Args:
            names: the full names of all metrics that have appeared so far.
            ended: no others will appear.

        Raises:
            LimitError: it names the metric, and those that do appear.

        >>> import ftrain as ft
        >>> ft.keep(best=1, by="val/acuracy", mode="max").check(["val/loss", "val/accuracy"])
        Traceback (most recent call last):
        ftrain.errors.LimitError: ft.keep: the metric 'val/acuracy' never appears, so there is no best checkpoint.
          where:    keep(best=1, by='val/acuracy', mode='max')
          expected: one of: val/accuracy, val/loss
          got:      by='val/acuracy'
          fix:      by='val/accuracy'
        """
        known = set(names)
        for policy in self.policies:
            if not isinstance(policy, _Best) or policy.by in known:
                continue
            evaluator, slash, _ = policy.by.partition("/")
            reported = bool(slash) and any(name.startswith(evaluator + slash) for name in known)
            if ended or reported:
                raise never_appears("ft.keep", policy.by, known, f"keep({policy})")

    def __repr__(self) -> str:
        return " | ".join(f"keep({policy})" for policy in self.policies)


def keep(
    *,
    latest: int | None = None,
    best: int | None = None,
    by: str | None = None,
    mode: str | None = None,
    every: int | None = None,
    every_epochs: int | None = None,
    where: Callable[[Entry], bool] | None = None,
) -> Keep:
    """Which checkpoints are kept: for `ft.Checkpoints(..., keep=...)`. One is kept if any of what is named here wants it.

    The newest is always kept, whatever is named: it is the one to go on with.

    Args:
        latest: the newest so many.
        best: the best so many by the metric `by`. NaN is worse than any number, and no value is worse still; of equals the newer is
            better.
        by: full name of a metric, e.g. `"val/loss"`. Counted is its value at the very step of the checkpoint, so save where it is
            evaluated.
        mode: `"min"` (default) if less is better, `"max"` if more is.
        every: those whose step is a multiple of this, for ever.
        every_epochs: of each epoch that is a multiple of this, the first one made when so many were complete, for ever.
        where: a predicate of an `Entry` (`step, epoch, seconds, metrics`); it must give the same answer each time.

    Returns:
        A `Keep`, a value without memory. Join several with `|`.

    Raises:
        LimitError: nothing is named, a number is not positive, `best` and `by` are not given together, or an unknown mode.
        ArgumentError: `by` or `where` is of another kind.

    >>> import ftrain as ft
    >>> policy = ft.keep(latest=1) | ft.keep(best=3, by="val/loss") | ft.keep(every=10_000)
    >>> policy == ft.keep(latest=1, best=3, by="val/loss", every=10_000)
    True
    """
    numbers = {"latest": latest, "best": best, "every": every, "every_epochs": every_epochs}
    for name, n in numbers.items():
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise LimitError(
                explain(
                    f"ft.keep: {name}={n!r} makes no sense.",
                    expected="an integer >= 1; what is not to be kept is not named",
                    got=repr(n),
                    fix=f"{name}={max(1, abs(n)) if isinstance(n, int) else 1}",
                )
            )
    if where is not None and not callable(where):
        raise ArgumentError(
            explain(
                f"ft.keep: where={where!r} is no predicate.",
                expected="a function of an Entry that gives True or False",
                got=type(where).__name__,
                fix="where=lambda entry: entry.epoch % 10 == 0",
            )
        )
    policies: list[_Policy] = []
    if latest is not None:
        policies.append(_Latest(latest))
    chosen = _best_policy(best, by, mode)
    if chosen is not None:
        policies.append(chosen)
    if every is not None:
        policies.append(_Every(every))
    if every_epochs is not None:
        policies.append(_EveryEpochs(every_epochs))
    if where is not None:
        policies.append(_Where(where))
    if not policies:
        raise LimitError(
            explain(
                "ft.keep: nothing is named to be kept.",
                expected="latest=, best= with by=, every=, every_epochs= or where=",
                got="none",
                cause="all but the newest checkpoint would be deleted",
                fix="ft.keep(latest=1)   # if that is what you want",
            )
        )
    return Keep(tuple(policies))


def _best_policy(best: int | None, by: str | None, mode: str | None) -> _Best | None:
    if by is not None and (not isinstance(by, str) or not by):
        raise ArgumentError(
            explain("ft.keep: by= is the name of a metric.", expected="a str", got=repr(by), fix='by="val/loss"')
        )
    if mode is not None:
        check_mode(mode, "ft.keep")
    if best is None and (by is not None or mode is not None):
        raise LimitError(
            explain(
                "ft.keep: by= and mode= say what is best, but not how many to keep.",
                expected="best= with them",
                got=f"by={by!r}, mode={mode!r}, no best=",
                fix=f"ft.keep(best=1, by={by or 'val/loss'!r})",
            )
        )
    if best is None:
        return None
    if by is None:
        raise LimitError(
            explain(
                f"ft.keep: best={best} by which metric?",
                expected="by=, the full name of a metric",
                got="no by=",
                fix=f'ft.keep(best={best}, by="val/loss")',
            )
        )
    return _Best(best, by, "min" if mode is None else mode)
