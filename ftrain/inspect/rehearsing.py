"""One run of a step on fake tensors, watched: what it gives, what it counts, how much memory is alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import rng, tree
from ..errors import ArgumentError, explain
from ..state import TrainState, check_state
from ..steps.compile import CompiledStep
from ..steps.wrap import check_level
from ..types import Batch
from .circumstances import with_circumstances
from .fakes import Fakes, ReadsInOptimizer, reads_nothing
from .live import LiveBytes
from .operations import counter

__all__ = ["Rehearsed", "plain", "rehearse"]

StepFn = Callable[[TrainState, Batch], Any]


class Rehearsed(NamedTuple):
    """A step's run on fake tensors.

    Attributes:
        out: what it returned.
        state: the fake state that went in, with the sub-states of the step's wrappers.
        batch: the fake batch.
        fakes: how they were made.
        live: the memory.
        flops: the floating-point operations.
        written: paths of what the step wrote into in place.
    """

    out: Any
    state: TrainState
    batch: Batch
    fakes: Fakes
    live: LiveBytes
    flops: int
    written: tuple[str, ...]


def plain(step: Any) -> StepFn:
    """The step inside a compiled one.

    >>> import torch, ftrain as ft
    >>> from ftrain.inspect.rehearsing import plain
    >>> step = ft.eval_step(torch.nn.Linear(1, 1), lambda model, batch: {"mean": model(batch).mean()})
    >>> plain(ft.compile(step)) is step
    True
    """
    while True:
        inner = step.step if isinstance(step, CompiledStep) else getattr(step, "_torchdynamo_orig_callable", None)
        if inner is None:
            return step  # type: ignore[no-any-return]  # a function, as `check_level` sees to
        step = inner


def rehearse(step: Any, state: Any, batch: Batch, what: str) -> Rehearsed:
    """Run a step on fake tensors made like these.

    Args:
        step: any step, compiled or not.
        state: a state of real, meta or fake tensors.
        batch: a batch of such.
        what: the public function, for messages.

    Raises:
        ArgumentError: no step.
        StateError: no state.
        InspectError: the step reads a value.
        Whatever the step raises, with a note that says where, and what the batch was like.
    """
    check_level(step, "step", what)
    check_state(state, what)
    for path, leaf in tree.items(state, "state"):
        if not isinstance(leaf, torch.Tensor):
            raise ArgumentError(
                explain(f"{what}: a leaf of the state is no tensor.", where=path, got=tree.describe(leaf))
            )
    fn = plain(step)
    try:
        try:
            return _run(fn, state, batch, what, numbers=False)
        except ReadsInOptimizer:
            # An optimizer of torch counts on the host; those numbers are known where the state is real.
            return _run(fn, state, batch, what, numbers=True)
    except Exception as error:
        with_circumstances(error, batch, what)
        raise


def _run(step: StepFn, state: TrainState, batch: Batch, what: str, numbers: bool) -> Rehearsed:
    fakes = Fakes(state, batch)
    own, given = fakes.of(state), fakes.of(batch)
    if numbers:
        own = own.replace(opt=fakes.with_numbers(state.opt))
    operations, live = counter(), LiveBytes()
    # What the user's code draws outside of torch, and what dynamo compiled before, belong to the run and not to this.
    with rng.Isolated(0), torch.compiler.set_stance("force_eager"), reads_nothing(what):
        with fakes.mode:
            init = getattr(step, "init", None)
            if init is not None:
                own = init(own)
        before = [
            (path, leaf, leaf._version) for path, leaf in tree.items({"state": own, "batch": given}, "") if _fake(leaf)
        ]
        with fakes.mode, live, operations:
            live.hold("state", tree.tensors(own))
            live.hold("batch", tree.tensors(given))
            out = step(own, given)
    written = tuple(_named(path) for path, leaf, version in before if leaf._version != version)
    return Rehearsed(out, own, given, fakes, live, operations.get_total_flops(), written)


def _fake(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not leaf.is_inference()


def _named(path: str) -> str:
    """`['state'].params['w']` as `state.params['w']`."""
    root, _, rest = path.removeprefix("['").partition("']")
    return root + rest
