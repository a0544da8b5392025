"""Whether `torch.compile` takes a step whole, and where it would break: by tracing it on fake tensors, running nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import Unsupported

from ..optim.opaque import reason_in
from ..state import TrainState
from ..steps.changes import first_line, innermost
from ..steps.compile import compile as compile_step
from ..steps.compile import pieces
from ..types import Batch
from .fakes import Fakes, place, users_own

__all__ = ["Break", "Graphs", "graphs"]


class Break(NamedTuple):
    """One place at which a graph ends before the step does.

    Attributes:
        where: `file:line in function: code`, of the user's code where it is there.
        reason: in the words of torch.

    >>> from ftrain.inspect.graphs import Break
    >>> print(Break("train.py:3 in loss_fn: print(x)", "print() is not traced"))
    train.py:3 in loss_fn: print(x): print() is not traced
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Graphs(NamedTuple):
    """How `ft.compile` would take a step.

    Attributes:
        whole: whether as one graph.
        reason: why not, in one line.
        breaks: the places at which the graph would end.

    >>> from ftrain.inspect.graphs import Graphs
    >>> Graphs(True, None, ()).whole
    True
    """

    whole: bool
    reason: str | None
    breaks: tuple[Break, ...]


def graphs(step: Callable[[TrainState, Batch], Any], state: TrainState, batch: Batch, fakes: Fakes) -> Graphs:
    """Trace a step on fake tensors.

    Args:
        step: the step, not compiled.
        state: of fake tensors.
        batch: of fake tensors.
        fakes: with which they were made.

    >>> import torch, ftrain as ft
    >>> from ftrain.inspect.fakes import Fakes
    >>> from ftrain.inspect.graphs import graphs
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).mean(), tx)
    >>> state, batch = ft.init(model, tx), torch.ones(4, 2)
    >>> fakes = Fakes(state, batch)
    >>> graphs(step, fakes.of(state), fakes.of(batch), fakes)
    Graphs(whole=True, reason=None, breaks=())
    """

    def shielded(state: TrainState, batch: Batch) -> Any:
        if torch.compiler.is_compiling():
            return step(state, batch)
        with fakes.mode:  # a step that does not compile is run once more, to see what is wrong
            return step(state, batch)

    try:
        compile_step(shielded, donate=False, rung="step", backend=_not_run)(state, batch)
    except Exception as error:  # what a trace raises has no common class; the step itself was run before, and is right
        cause = innermost(error)
        reason = first_line(error)
    else:
        return Graphs(True, None, ())
    if not isinstance(
        cause, Unsupported
    ):  # refused by ftrain, or an error of the trace: there is no place to go on from
        return Graphs(False, reason, ())
    opaque = reason_in(str(cause))
    if opaque is not None:  # an optimizer that runs outside of a graph says so itself
        return Graphs(False, opaque, ())
    stopped = _break(str(cause), cause.real_stack)
    try:
        with fakes.mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the step warns of, it said when it was run before
            ends: list[Any] = [graph.compile_subgraph_reason for graph in pieces(step, state, batch)]
            found = [_break(str(end.reason), end.user_stack) for end in ends if end is not None and end.graph_break]
    except Exception as error:  # torch fails where it goes on after a break
        return Graphs(False, f"{reason} (further breaks are not known: {first_line(error)})", (stopped,))
    return Graphs(False, reason, tuple(dict.fromkeys(found or [stopped])))


def _not_run(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend whose program gives the fake results of the trace."""
    (ends,) = next(node for node in graph.graph.nodes if node.op == "output").args
    results = [node.meta["example_value"] if isinstance(node, torch.fx.Node) else node for node in ends]
    return lambda *_: results


def _break(reason: str, stack: Any) -> Break:
    frame = users_own(list(stack or ()))
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("Explanation:")), "").removeprefix("Explanation:").strip()
    return Break("unknown" if frame is None else place(frame), f"{lines[0]}. {said}" if said else lines[0])
