"""`check`: everything about a step that can be known without computing it, on fake tensors. `flops`: what it will compute.

Laws
----
- No memory is allocated and nothing is computed, however large state and batch are; both may lie on `meta`.
- State, batch, model and the random generators are afterwards as they were.
- What the step returns is held against law 1: the new state has the structure, shapes, dtypes and device of the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import rng, tree
from ..errors import StateError, explain
from ..metrics import Metric, normalise
from ..state import TrainState
from ..types import Batch
from .fakes import quiet
from .graphs import Break, Graphs, graphs
from .live import Memory
from .rehearsing import Rehearsed, plain, rehearse
from .tables import bytes_of, count, size

__all__ = ["Checked", "Spec", "check", "flops"]

_PARTS = Memory._fields[1:-1]


@dataclass(frozen=True)
class Spec:
    """The form of a tensor.

    >>> import torch
    >>> from ftrain.inspect import Spec
    >>> Spec((2, 3), torch.float32, torch.device("cpu"))
    float32[2, 3]
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(str(n) for n in self.shape)}]"


@dataclass(frozen=True, repr=False)
class Checked:
    """What `ftrain.check` found out about a step.

    Attributes:
        kind: `"train"` for a step that returns a state, `"read"` for one that returns metrics or outputs only.
        metrics: the metrics by name, with a `Spec` in place of each tensor; `{}` where the step gives other outputs.
        outputs: what a step of kind "read" returns, with a `Spec` in place of each tensor; None for other steps.
        whole: whether `ft.compile` takes the step as one graph; None where that was not asked for.
        reason: why it does not.
        breaks: where the graph would break, and why.
        memory: bytes at the peak of a step that is not compiled, and what they are (`memory.peak` is their sum).
        flops: floating-point operations of the step, forward, backward and what is computed twice.
        device: where the step would run.
        notes: what is no error, but worth knowing.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.check(step, ft.init(model, tx), torch.ones(4, 2), compile=False).metrics["loss"].total
    float32[]
    """

    kind: Literal["train", "read"]
    metrics: dict[str, Any]
    outputs: Any
    whole: bool | None
    reason: str | None
    breaks: tuple[Break, ...]
    memory: Memory
    flops: int
    device: torch.device
    notes: tuple[str, ...]
    _sizes: tuple[int, int]

    def __repr__(self) -> str:
        leaves, held = self._sizes
        rows = [
            (
                "state",
                f"{leaves} leaves, {size(held)}" + (", come back in the same form" if self.kind == "train" else ""),
            )
        ]
        rows += [("metric" if self.metrics else "outputs", text) for text in self._described()]
        if self.whole is not None:
            rows.append(
                ("compile", "the whole step in one graph" if self.whole else f"not in one graph: {self.reason}")
            )
        rows += [("break", str(one)) for one in self.breaks]
        parts = [f"{name} {size(value)}" for name, value in zip(_PARTS, self.memory[1:-1], strict=True) if value]
        rows.append(("memory", f"{size(self.memory.peak)} at the peak: {', '.join(parts)}"))
        if self.memory.until_update != self.memory.peak:
            rows.append(("", f"{size(self.memory.until_update)} at most until the update"))
        rows.append(("compute", count(self.flops, "FLOP")))
        rows += [("note", note) for note in self.notes]
        return "\n".join(
            [f"Checked({self.kind} step, on {self.device})", *(f"  {name:<8} {text}" for name, text in rows)]
        )

    def _described(self) -> list[str]:
        if not self.metrics:
            return [] if self.kind == "train" else [str(self.outputs)]
        return [f"{name}: {metric!r}" for name, metric in self.metrics.items()]


def check(
    step: Callable[[TrainState, Batch], Any], state: TrainState, batch: Batch, *, compile: bool = True
) -> Checked:
    """Try a step on fake tensors: no memory, no compute, whatever the size of the model.

    Args:
        step: a step of any kind: train, evaluation, prediction, hand-written; of a compiled one, the step inside.
        state: its tensors may be real, on `meta` (`ft.init(model_on_meta, tx)`) or fake. Not changed.
        batch: the same for the batch.
        compile: also ask whether `ft.compile` takes the step whole. It is traced for that, which takes the most time.

    Returns:
        A `Checked`; its text is a table. The memory is that of the step as it is: a compiled and donated one needs less. Not in it
        is what kernels take for themselves while they run.

    Raises:
        StructureError: the new state is not like the old one; with path, expected and got.
        StateError: no state, or a step that returns neither `(state, metrics)` nor metrics or outputs.
        MetricError: the step's metrics are no metrics.
        InspectError: the step reads a value (`.item()`, `if tensor:`), with the line that does it.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(512, 512, bias=False, device="meta"), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.check(step, ft.init(model, tx), torch.ones(64, 512, device="meta"))
    Checked(train step, on cpu)
      state    7 leaves, 1.0 MB, come back in the same form
      metric   loss: Mean(total=float32[], weight=float32[])
      metric   lr: Last(value=float32[], seen=float32[])
      compile  the whole step in one graph
      memory   4.3 MB at the peak: state 1.0 MB, batch 131.1 kB, ... gradients 1.0 MB, update 2.1 MB
               2.4 MB at most until the update
      compute  67.1 MFLOP
    """
    seen = rehearse(step, state, batch, "ft.check")
    fn = plain(step)
    notes: list[str] = []
    kind: Literal["train", "read"] = "read"
    metrics, outputs = _read(seen.out, fn)
    if _has_state(seen.out):
        kind = "train"
        metrics, outputs = _trained(seen, notes), None
    if seen.written:
        notes.append(f"the step writes in place into {', '.join(seen.written[:3])}: it changes what it was given")
    found = Graphs(True, None, ())
    if compile:
        with rng.Isolated(0), quiet():
            found = graphs(fn, seen.state, seen.batch, seen.fakes)
    held = tree.tensors(seen.state)
    return Checked(
        kind=kind,
        metrics=metrics,
        outputs=outputs,
        whole=found.whole if compile else None,
        reason=found.reason,
        breaks=found.breaks,
        memory=seen.live.memory(),
        flops=seen.flops,
        device=seen.state.device,
        notes=tuple(notes),
        _sizes=(len(held), bytes_of(held)),
    )


def flops(step: Callable[[TrainState, Batch], Any], state: TrainState, batch: Batch) -> int:
    """Floating-point operations of one step, all of it: forward, backward, and what is computed twice (`remat`).

    Matrix products, convolutions, attention and recurrent layers count, a multiplication and an addition as two; operations
    element by element do not. Nothing is computed for it.

    Args:
        step: a step of any kind, as for `ft.check`.
        state: of real, meta or fake tensors.
        batch: the same.

    Raises:
        InspectError: the step reads a value.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(8, 4), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.inspect.flops(
    ...     step, ft.init(model, tx), torch.ones(16, 8)
    ... ) == 2 * 16 * 8 * 4 * 2  # forward, and d loss / d weight
    True
    """
    return rehearse(step, state, batch, "ft.inspect.flops").flops


def _has_state(out: Any) -> bool:
    return isinstance(out, TrainState) or (isinstance(out, (tuple, list)) and any(_has_state(one) for one in out))


def _trained(seen: Rehearsed, notes: list[str]) -> dict[str, Any]:
    """The metrics of a step that returns a state, once that is held against law 1."""
    out = seen.out
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)):
        raise _not_a_result(out)
    new = out[0]
    tree.check_same(
        seen.state,
        new,
        root="state",
        what="ft.check: the step returned a state that is not like the one it was given.",
        fix="state.replace(params=...)   # with leaves of the same structure, shape, dtype and device",
    )
    if new.step is seen.state.step:
        notes.append("the step does not count itself: state.step stays as it was (state.advance(n), or ft.as_step)")
    kept = [
        name for name, p in seen.state.params.items() if new.params[name] is p
    ]  # an update that changes nothing is a new tensor all the same
    if kept:
        notes.append(f"{len(kept)} of {len(new.params)} parameters come back untouched: {', '.join(kept[:3])}")
    return _metrics(normalise(out[1], None, "the metrics that the step returned"))


def _read(out: Any, step: Any) -> tuple[dict[str, Any], Any]:
    """Metrics and outputs of a step that returns no state."""
    if out is None:
        raise _not_a_result(out)
    if isinstance(out, Mapping) and out and all(isinstance(one, Metric) for one in out.values()):
        return _metrics(normalise(out, None, "the metrics that the step returned")), None
    return {}, tree.map(_spec, out)


def _metrics(found: dict[str, Metric]) -> dict[str, Any]:
    return {name: tree.map(_spec, metric) for name, metric in found.items()}


def _spec(leaf: Any) -> Any:
    return Spec(tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _not_a_result(out: Any) -> StateError:
    if isinstance(out, (tuple, list)):
        got = f"a {type(out).__name__} of {', '.join(type(one).__name__ for one in out)}"
    else:
        got = type(out).__name__
    return StateError(
        explain(
            "ft.check: the step returned nothing that a step returns.",
            expected="(TrainState, dict of metrics), or metrics or outputs alone",
            got=got,
            cause="forgot to return?" if out is None else None,
            fix='return state.replace(params=params), {"loss": loss}',
        )
    )
