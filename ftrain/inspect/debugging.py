"""Steps that can be looked into: nothing compiled, nothing donated, and errors that say what the step was given.

Law: a step computes what it computes without; what is left of the context afterwards is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ContextDecorator, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..errors import ArgumentError, explain
from ..loops.failing import annotate
from ..state import TrainState
from ..steps.compile import CompiledStep
from ..steps.watching import Watcher, watching
from ..types import Batch

__all__ = ["debug"]

_HEAD = "ftrain: what the step was given"
_SHOWN = 40  # leaves of the state, and of the batch, that are listed one by one


def debug(*, anomaly: bool = True, shapes: bool = True) -> _Debug:
    """Context (and decorator) in which steps can be looked into: `fit`, `loop`, `evaluate` and compiled steps run eagerly.

    - Python's debugger, prints and `.item()` work inside the model, and errors point at its lines. What the model itself compiles
      (`torch.compile` on a module) runs eagerly, too.
    - Nothing is donated: every state stays valid, at the price of the memory of one more.
    - `anomaly`: the backward pass raises at the operation that gives NaN, and shows where in the forward pass it was called.
    - `shapes`: an error out of a step says in a note (PEP 678) shape, dtype, device and range of every leaf of the state and of the
      batch, and the first one that is not finite.

    What was compiled before is kept for afterwards. A model with dropout draws other masks than when Inductor compiles it.

    Args:
        anomaly: as above; slows the backward pass down by about a half.
        shapes: as above; costs nothing until there is an error.

    Returns:
        A context, to be entered as often as one likes; the settings of the innermost count.

    Raises:
        ArgumentError: an argument is no bool.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(3, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch["x"]).square().mean(), tx)
    >>> with ft.debug():
    ...     try:
    ...         ft.fit(ft.init(model, tx), step, [{"x": torch.ones(2, 4)}], progress=False)
    ...     except RuntimeError as error:
    ...         print(error.__notes__[0])
    ftrain: what the step was given (step 0, epoch 0):
      state.params['bias']    float32[1] on cpu     all finite, ...
      state.params['weight']  float32[1, 3] on cpu  all finite, ...
      state.opt               2 tensors             all finite
      batch['x']              float32[2, 4] on cpu  all finite, 1 to 1
      every leaf is finite
    """
    for name, value in (("anomaly", anomaly), ("shapes", shapes)):
        if not isinstance(value, bool):
            raise ArgumentError(
                explain(
                    f"ft.debug: {name}= is a bool.",
                    expected="True or False",
                    got=repr(value),
                    fix=f"with ft.debug({name}=True): ...",
                )
            )
    return _Debug(anomaly, shapes)


class _Debug(ContextDecorator):
    def __init__(self, anomaly: bool, shapes: bool) -> None:
        self._anomaly, self._shapes = anomaly, shapes
        self._open: list[ExitStack] = []  # one for each time that it was entered

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(watching(_watcher(self._shapes)))
            # Set when it is made, not when it is entered; what was set before is put back either way.
            stack.enter_context(torch.autograd.set_detect_anomaly(self._anomaly))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._open.append(stack.pop_all())

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._open.pop().close()


def _watcher(shapes: bool) -> Watcher:
    def watch(step: Any, state: TrainState, batch: Batch) -> Any:
        try:
            return step.plainly(state, batch) if isinstance(step, CompiledStep) else step(state, batch)
        except Exception as error:
            told = any(str(note).startswith(_HEAD) for note in getattr(error, "__notes__", ()))
            if shapes and not told:
                annotate(error, _report(state, batch))
            raise

    return watch


def _report(state: TrainState, batch: Batch) -> str:
    """What a step was given, as text. Never raises, since an error is on its way already."""
    try:
        return "\n".join(_lines(state, batch))
    except Exception as second:  # a donated state, a device that is out of order after a failed kernel, fake tensors
        return f"{_HEAD} cannot be read: {_first(second)}"


def _lines(state: TrainState, batch: Batch) -> Iterator[str]:
    counters = state.counters()
    yield f"{_HEAD} (step {counters.step}, epoch {counters.epoch}):"
    bad: list[str] = []
    named: list[tuple[str, Any]] = []
    for part in ("params", "frozen", "buffers"):
        named += tree.items(getattr(state, part), f"state.{part}")
    rows = _each(named, bad)
    for part in ("opt", "extra"):
        rows += _summary(list(tree.items(getattr(state, part), f"state.{part}")), f"state.{part}", bad)
    rows += _each(list(tree.items(batch, "batch")), bad)
    wide = [max((len(row[column]) for row in rows if row[1]), default=0) for column in (0, 1)]
    for path, what, how in rows:
        yield (f"  {path:<{wide[0]}}  {what:<{wide[1]}}  {how}" if what else f"  {path}").rstrip()
    yield f"  the first that is not finite: {bad[0]}" if bad else "  every leaf is finite"


def _each(named: list[tuple[str, Any]], bad: list[str]) -> list[tuple[str, str, str]]:
    """A row for each leaf; of a long list the first ones, and all that are not finite."""
    rows, left = [], 0
    for position, (path, leaf) in enumerate(named):
        how, finite = _values(leaf)
        if not finite:
            bad.append(path)
        if position < _SHOWN or not finite:
            rows.append((path, tree.describe(leaf), how))
        else:
            left += 1
    return rows + ([(f"... {left} more, all finite", "", "")] if left else [])


def _summary(named: list[tuple[str, Any]], root: str, bad: list[str]) -> list[tuple[str, str, str]]:
    """One row for all leaves, and one for each that is not finite."""
    if not named:
        return []
    rows = []
    for path, leaf in named:
        how, finite = _values(leaf)
        if not finite:
            bad.append(path)
            rows.append((path, tree.describe(leaf), how))
    said = f"{len(rows)} not finite" if rows else "all finite"
    return [(root, f"{len(named)} tensor{'' if len(named) == 1 else 's'}", said), *rows]


def _values(leaf: Any) -> tuple[str, bool]:
    """What there is to say of a leaf's values, and whether all are finite."""
    if not isinstance(leaf, Tensor):
        return repr(leaf)[:40], True
    if leaf.is_meta or not leaf.numel():
        return "no values" if leaf.is_meta else "empty", True
    values = torch.view_as_real(leaf.detach()) if leaf.is_complex() else leaf.detach()
    if values.is_floating_point():
        return _floats(values.double())  # which every kind of float can be turned into
    if leaf.dtype == torch.bool:
        return f"{int(values.sum())} of {values.numel()} true", True
    return f"{int(values.min())} to {int(values.max())}", True


def _floats(values: Tensor) -> tuple[str, bool]:
    finite = values.isfinite()
    count = int((~finite).sum())
    if not count:
        return f"all finite, {_number(values.min())} to {_number(values.max())}", True
    nan, rest = int(values.isnan().sum()), values[finite]
    range_ = f", else {_number(rest.min())} to {_number(rest.max())}" if rest.numel() else ""
    return f"{count} of {values.numel()} not finite ({nan} nan, {count - nan} inf){range_}", False


def _number(value: Tensor) -> str:
    return f"{float(value):.4g}"


def _first(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
