"""`save`: one checkpoint, at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, explain
from ..loops import Position
from ..state import TrainState, check_state

__all__ = ["save"]


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    config: Any = None,
    position: Position | None = None,
) -> None:
    """Save a state, or any pytree, as one checkpoint; returns when it is on the disk.

    For checkpoints in the course of a run there is `ft.Checkpoints`, which saves in the background and everything that the run
    needs to go on.

    Args:
        path: a folder of checkpoints; made where there is none.
        tree: any pytree of tensors, numpy arrays and plain values (numbers, texts, None).
        step: under which step; by default that of the state, and 0 for another tree.
        metrics: numbers by name, for `ft.restore(path, step="best", by=name)`.
        config: a plain tree without tensors that is kept with it; `ft.checkpoint.info` gives it back.
        position: where a loop is in its data, from `tick.position()`; `ft.checkpoint.position` gives it back.

    Raises:
        CheckpointError: the path is a file or cannot be written to; there is a checkpoint of this step; the disk is full; a leaf
            that a checkpoint cannot hold.
        DonatedStateError: the state's memory was given away.

    >>> import tempfile, torch, ftrain as ft
    >>> state = ft.init(torch.nn.Linear(3, 2), ft.optim.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as path:
    ...     ft.save(path, state, metrics={"val/loss": 0.5})
    ...     print(ft.restore(path, like=state).params.keys())
    dict_keys(['weight', 'bias'])
    """
    if isinstance(tree, TrainState):
        check_state(tree, "ft.save")
        step = tree.counters().step if step is None else step
    numbers = dict(metrics or {})
    for name, value in numbers.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(
                explain(
                    "ft.save: metrics= wants numbers by name.",
                    where=f"metrics[{name!r}]",
                    expected="int or float",
                    got=type(value).__name__,
                    fix=f"metrics={{{name!r}: float(value)}}",
                )
            )
    if position is not None and not isinstance(position, Position):
        raise CheckpointError(
            explain(
                "ft.save: position= is where a loop is in its data.",
                expected="what tick.position() gave",
                got=type(position).__name__,
                fix="ft.save(path, tick.state, position=tick.position())",
            )
        )
    plain = {} if position is None else {"position": position.plain()}
    from .store import Store

    with Store(path, write=True) as store:
        document = {"metrics": numbers, "config": config}
        store.save(0 if step is None else step, tree, document, plain=plain, block=True)
