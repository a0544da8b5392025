"""A run in small: a few batches through all of its parts, before it is begun.

Laws
----
- It is `fit` itself, with data that ends after n batches: one epoch of training, each evaluator, each hook at each of its events, and
  a checkpoint that is saved, restored and compared.
- The caller's state and the global generators are as they were; no sink is called, and nothing is written but to a temporary folder,
  which is gone afterwards.

To overfit one batch, which a sound model and loss can do, repeat it: `data.take(1).cache().repeat()` after `batch`.

>>> import torch, ftrain as ft
>>> x = torch.randn(64, 1)
>>> model, tx = torch.nn.Linear(1, 1), ft.optim.adam(0.1)
>>> step = ft.train_step(model, lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(), tx)
>>> one = ft.data.source({"x": x, "y": 3 * x}, batch_size=8).take(1).cache().repeat()
>>> result = ft.fit(ft.init(model, tx), step, one, steps=400, progress=False, compile=False)
>>> float(result.history["loss"][-1]) < 1e-3
True
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import tree
from ..checkpoint import Checkpoints, restore
from ..data import Epochs, Reader, as_epochs
from ..data.checks import integer
from ..data.reader import Place
from ..data.spans import LISTENER
from ..data.window import ungrouped
from ..errors import ArgumentError, CheckpointError, LimitError, explain
from ..loops import Evaluator, Hook, Result, fit
from ..loops.arguments import check_arguments
from ..loops.cadences import Cadence
from ..loops.calling import Hooks
from ..loops.events import Event, Many, On, When
from ..loops.failing import annotate
from ..loops.limits import Limits
from ..loops.units import every, until
from ..state import TrainState, check_state

__all__ = ["DryRun", "dry_run"]


@dataclass(frozen=True, repr=False)
class DryRun:
    """What `dry_run` gives back.

    Attributes:
        steps: how many batches were trained on.
        reason: why it ended, as in `ft.Result`; `"epochs"` where nothing stopped it.
        metrics: the last values, by `"train"` and name of evaluator, then by metric.
        seconds: by part: `data`, `step` (compilation included), `evaluation`, `hooks`, `checkpoint`, `restore`.
        heard: what each hook heard, in order: kinds of events by name of hook.
        checkpoint_bytes: the size of the checkpoint of the last state, with all that belongs to it.

    >>> import ftrain as ft
    >>> ft.tune.DryRun(1, "epochs", {"train": {"loss": 0.5}}, {"step": 0.25}, {"plateau": ("start", "step")}, 4096)
    DryRun(1 step, ended by epochs)
      train       loss 0.5
      hooks       plateau: start, step
      checkpoint  4096 bytes, saved, restored and compared
      seconds     step 0.25
    """

    steps: int
    reason: str
    metrics: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    heard: Mapping[str, tuple[str, ...]]
    checkpoint_bytes: int

    def __repr__(self) -> str:
        lines = [f"DryRun({self.steps} step{'s' if self.steps != 1 else ''}, ended by {self.reason})"]
        for split, metrics in self.metrics.items():
            shown = (f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float))
            lines.append(f"  {split:<11} {', '.join(shown) or 'no numbers'}")
        for i, (name, kinds) in enumerate(self.heard.items()):
            lines.append(f"  {'' if i else 'hooks':<11} {name}: {', '.join(dict.fromkeys(kinds)) or 'nothing'}")
        lines.append(f"  {'checkpoint':<11} {self.checkpoint_bytes} bytes, saved, restored and compared")
        lines.append(f"  {'seconds':<11} {', '.join(f'{name} {value:.2f}' for name, value in self.seconds.items())}")
        return "\n".join(lines)


def dry_run(
    state: TrainState, step: Callable[[TrainState, Any], Any], data: Any, n: int = 1, **arguments: Any
) -> DryRun:
    """Try a run with n batches: train, evaluate, call all hooks, save and restore a checkpoint; keep nothing.

    Hooks are called at all that they listen to: what waits for a cadence is called at each step and at the end of the epoch, and
    predicates of `ft.when` are asked, but not obeyed. Evaluators run at the end, on n batches each. Where `checkpoint=` is given, its
    settings are used, but for the folder. All arguments are checked as `fit` does, limits and sinks too, though neither is used.

    Args:
        state: where to begin. It stays as it is.
        step: as for `fit`; what is compiled for it serves `fit` as well.
        data: as for `fit`. (An iterator is advanced by n batches.)
        n: how many batches, of training and of each evaluator.
        **arguments: those of `fit`, by name: `ft.dry_run(state, step, data, **config)`, then `ft.fit(state, step, data, **config)`.

    Returns:
        A `DryRun`: metrics, seconds by part, what hooks heard, the size of a checkpoint.

    Raises:
        LimitError: `n` is below 1.
        ArgumentError: an argument that `fit` does not have, or a `checkpoint=` that is no `ft.Checkpoints`.
        CheckpointError: what was restored differs from what was saved.
        Whatever `fit` raises, with a note that says in which part it happened.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> val = ft.Evaluator(ft.eval_step(model, lambda model, batch: {"mean": model(batch).mean()}), [torch.ones(4, 1)])
    >>> config = {"epochs": 100, "evals": {"val": val}, "hooks": [lambda state, event: state], "compile": False}
    >>> tried = ft.dry_run(ft.init(model, tx), step, [torch.ones(4, 1)] * 50, n=2, **config)
    >>> tried.steps, sorted(tried.metrics), tried.heard
    (2, ['train', 'val'], {'<lambda>': ('start', 'step', 'step', 'epoch', 'evaluation', 'end')})
    """
    check_state(state, "ft.dry_run")
    integer(n, "ft.dry_run", "n", least=1, kind=LimitError, fix="ft.dry_run(state, step, data, n=2)")
    known = [name for name, one in inspect.signature(fit).parameters.items() if one.kind is one.KEYWORD_ONLY]
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ArgumentError(
                explain(
                    f"ft.dry_run: ft.fit has no argument {name!r}.",
                    expected=f"one of: {', '.join(known)}",
                    got=f"{name}={_short(value)}",
                    fix=f"ft.dry_run(state, step, data, {near}=...)   # the nearest name",
                )
            )
    watch = _Watch()
    given = dict(arguments)
    checkpoint = _checkpoints(given.get("checkpoint"))
    seed, counted = state.counters().seed, given.get("tokens") is not None
    sized = {"batch_size": given.pop("batch_size", None), "shuffle": given.pop("shuffle", True)}
    source = as_epochs(data, seed=seed, what="ft.dry_run", **sized)
    source.check("ft.dry_run")
    epochs, steps, ends = (given.pop(name, None) for name in ("epochs", "steps", "until"))
    if source.length is not None or any(one is not None for one in (epochs, steps, ends)):
        Limits.of(epochs, steps, ends, source, "ft.dry_run", at_least=given.get("at_least"), tokens=counted)
    if given.get("checkpoint") is None:
        check_arguments(None, (), (), None, False, resume=given.get("resume"))
    given["evals"] = _evaluators(given.get("evals"), n, seed, (source.length, counted), watch)
    hooks = given.get("hooks", ())
    if isinstance(hooks, Sequence) and not isinstance(hooks, Hook):
        Hooks(hooks, source.length, counted)  # what is wrong with their cadences shows here
        given["hooks"] = [_listening(hook, watch) for hook in hooks]
    if isinstance(given.get("sinks"), Sequence):
        given["sinks"] = [_Quiet() if callable(sink) else sink for sink in given["sinks"]]
    if given.get("checkpoint") is not None and given.get("resume") is not None:
        given["resume"] = "auto"  # which begins in an empty folder
    given |= {"at_least": until(epochs=1), "donate": False, "signals": False}
    if hasattr(given.get("progress", True), "refresh") or isinstance(given.get("progress", True), bool):
        given["progress"] = False
    with tempfile.TemporaryDirectory(prefix="ftrain-dry-run-") as folder:
        given["checkpoint"] = dataclasses.replace(checkpoint, path=folder, on_exception=False, on_signal=False)
        few = _first(source, n, watch, "the step on batch")
        began = time.perf_counter()
        with watch.watching():
            result = fit(state, step, few, epochs=1, **given)
        total = time.perf_counter() - began
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        restored = _restored(result, folder)
    taken = {part: watch.seconds.get(part, 0.0) for part in ("data", "evaluation", "hooks", "checkpoint")}
    seconds = {"data": taken.pop("data"), "step": max(0.0, total - sum(watch.seconds.values())), **taken}
    metrics: dict[str, dict[str, Any]] = {"train": {}}
    for record in result.history:
        metrics.setdefault(record.split, {}).update(record.metrics)
    steps = result.state.counters().step - state.counters().step
    heard = {name: tuple(kinds) for name, kinds in watch.heard.items()}
    return DryRun(steps, result.reason, metrics, {**seconds, "restore": restored}, heard, size)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass
class _Watch:
    """Where the run is, how long its parts took, and what hooks heard."""

    at: str = "the beginning"
    told: bool = False  # whether the error says where it comes from already
    heard: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    depth: int = 0

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """For what `fit` tells a listener; a part within another (data of an evaluation) counts for the outer one."""
        began, self.depth = time.perf_counter(), self.depth + 1
        if part == "checkpoint":
            self.at = "the checkpoint"
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    @contextmanager
    def watching(self) -> Iterator[None]:
        token = LISTENER.set(self.span)
        try:
            yield
        except BaseException as error:
            self.note(error, self.at)
            raise
        finally:
            LISTENER.reset(token)

    def note(self, error: BaseException, where: str) -> None:
        if not self.told:
            self.told = True
            annotate(error, f"ftrain: in ft.dry_run, at {where}")


class _Quiet:
    """Stands for a sink: it is there, and tells nobody."""

    def __call__(self, record: Any) -> None:
        """Nothing is logged."""


# -- n batches ------------------------------------------------------------------------------------------------------------------


class _Few(Iterator[Any]):
    """The first batches of a reader."""

    def __init__(self, reader: Reader, n: int, watch: _Watch, what: str) -> None:
        self.reader, self.left, self.watch, self.what = reader, n, watch, what

    @property
    def steady(self) -> bool:
        return self.reader.steady

    def place(self) -> dict[str, Any]:
        """What stands in the place beside the count of batches."""
        return {name: value for name, value in self.reader.place().items() if name != "batch"}

    def __next__(self) -> Any:
        if self.left <= 0:
            raise StopIteration
        number = self.reader.read
        try:
            batch = next(self.reader)
        except Exception as error:
            if not isinstance(error, StopIteration):
                self.watch.note(error, f"the reading of data, for {self.what} {number}")
            raise
        self.left -= 1
        self.watch.at = f"{self.what} {number}"
        return batch

    def close(self) -> None:
        self.reader.close()


def _first(source: Epochs, n: int, watch: _Watch, what: str) -> Epochs:
    """Data that ends after n batches."""

    def make(epoch: int, place: Place) -> Iterator[Any]:
        return _Few(source(epoch, place), n - place["batch"], watch, what)

    length = None if source.length is None else min(n, source.length)
    return Epochs(
        make, length, source.once, source.sizes, facts=source.facts, finish=source.finish, closing=source.close
    )


# -- evaluators and hooks -------------------------------------------------------------------------------------------------------


def _evaluators(evals: Any, n: int, seed: int, known: tuple[int | None, bool], watch: _Watch) -> Any:
    """The evaluators on n batches, at the end of the epoch; what is no evaluator is left for `fit` to refuse."""
    if not isinstance(evals, Mapping):
        return evals
    found: dict[Any, Any] = {}
    for name, one in evals.items():
        found[name] = one
        if isinstance(one, Evaluator) and isinstance(one.every, Cadence):
            what = f"the evaluator {name!r}"
            one.every.bound(*known, what)
            source = ungrouped(one.data, seed=seed, batch_size=one.batch_size, what=what)
            source.check(what)
            few = _first(source, n, watch, f"{what} on batch")
            found[name] = dataclasses.replace(one, data=few, batch_size=None, every=every(epochs=1))
    return found


def _listening(hook: Any, watch: _Watch) -> Any:
    """The hook, called at all that it listens to, and what it hears noted."""
    if isinstance(hook, On):
        at_all = every(steps=1) | every(epochs=1)
        return On(tuple(at_all if isinstance(one, Cadence) else one for one in hook.when), _listening(hook.hook, watch))
    if isinstance(hook, When):
        return When(_asked(hook.predicate), _listening(hook.hook, watch))
    if isinstance(hook, Many):
        return Many(tuple(_listening(one, watch) for one in hook.hooks))
    if isinstance(hook, Hook):
        watch.heard.setdefault(hook.name, [])

        def update(state: Any, memory: Any, event: Event) -> Any:
            with _hearing(watch, hook.name, event):
                return hook.update(state, memory, event)

        return hook._replace(update=update)
    if not callable(hook):
        return hook
    name = getattr(hook, "__name__", repr(hook))
    watch.heard.setdefault(name, [])

    def call(state: Any, event: Event) -> Any:
        with _hearing(watch, name, event):
            return hook(state, event)

    return functools.update_wrapper(call, hook) if hasattr(hook, "__name__") else call


@contextmanager
def _hearing(watch: _Watch, name: str, event: Event) -> Iterator[None]:
    watch.heard[name].append(event.kind)
    try:
        yield
    except Exception as error:
        watch.note(error, f"the hook {name!r}, at a {event.kind!r} event")
        raise


def _asked(predicate: Callable[[Event], bool]) -> Callable[[Event], Any]:
    def ask(event: Event) -> Any:
        found: Any = predicate(event)
        return True if found is False else found  # what is no bool is refused by whoever asks

    return ask


# -- the checkpoint -------------------------------------------------------------------------------------------------------------


def _checkpoints(given: Any) -> Checkpoints:
    """The settings of the checkpoints, the user's where there are some."""
    if given is None:
        return Checkpoints("unused", every=every(epochs=1))
    if not isinstance(given, Checkpoints):
        raise ArgumentError(
            explain(
                "ft.dry_run: checkpoint= is no ft.Checkpoints, so it cannot be put elsewhere for a trial.",
                expected="ft.Checkpoints(path), or None",
                got=tree.describe(given),
                fix='checkpoint=ft.Checkpoints("run/ckpt")',
            )
        )
    return given


def _restored(result: Result, folder: str) -> float:
    """Restore the checkpoint and compare it with the state, bitwise; gives the seconds of the restore."""
    began = time.perf_counter()
    again = restore(folder, like=result.state)
    seconds = time.perf_counter() - began
    pairs = zip(tree.items(result.state, root="state"), tree.leaves(again), strict=True)
    for (path, saved), found in pairs:
        if not bool(((saved == found) | ((saved != saved) & (found != found))).all()):  # noqa: PLR0124 - NaN is NaN
            raise CheckpointError(
                explain(
                    "ft.dry_run: what was restored differs from what was saved.", where=path, got=tree.describe(found)
                )
            )
    return seconds
