"""What else a checkpoint knows: where the run was in its data, the config, the metrics, and what wrote it."""

from __future__ import annotations

import os
from typing import Any

from ..errors import RestoreError, explain
from ..loops import Position
from .restoring import choose

__all__ = ["info", "position"]


def position(path: str | os.PathLike[str], step: int | str = "latest") -> Position:
    """Where the run was in its data: for `ft.loop(state, step, data, start=position)`, with the state of the same checkpoint.

    Args:
        path: a folder of checkpoints, of `ft.Checkpoints` or of `ft.save(position=...)`.
        step: a step, or `"latest"`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        RestoreError: it was saved without a position.

    >>> import tempfile, torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> state, data = ft.init(model, tx), [torch.full((1, 1), float(i)) for i in range(5)]
    >>> with tempfile.TemporaryDirectory() as path:
    ...     for tick in ft.loop(state, step, data, steps=3):
    ...         ft.save(path, tick.state, position=tick.position())
    ...     state, place = ft.restore(path, like=state), ft.checkpoint.position(path)
    >>> [tick.batch for tick in ft.loop(state, step, data, start=place)]
    [3, 4]
    """
    from .store import Store

    with Store(path, write=False) as store:
        chosen = choose(store, step, None, "min")
        plain = store.plain(chosen)
        if "position" not in plain:
            raise RestoreError(
                explain(
                    "this checkpoint was saved without a position.",
                    where=str(store.step_path(chosen)),
                    fix="ft.save(path, tick.state, position=tick.position())",
                )
            )
        return Position.of(plain["position"])


def info(path: str | os.PathLike[str], step: int | str = "latest") -> dict[str, Any]:
    """What is known of a checkpoint beside its arrays: `step`, `epoch`, `metrics`, `config`, `data` (facts), `versions`, `format`.

    Args:
        path: a folder of checkpoints.
        step: a step, or `"latest"`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.

    >>> import tempfile, torch, ftrain as ft
    >>> with tempfile.TemporaryDirectory() as path:
    ...     ft.save(path, {"w": torch.ones(2)}, step=3, config={"lr": 0.1}, metrics={"loss": 0.5})
    ...     found = ft.checkpoint.info(path)
    >>> found["step"], found["config"], found["metrics"], found["versions"]["ftrain"] == ft.__version__
    (3, {'lr': 0.1}, {'loss': 0.5}, True)
    """
    from .store import Store

    with Store(path, write=False) as store:
        document = store.document(choose(store, step, None, "min"))
    run = document.get("run") or {}
    return {
        "step": document["step"],
        "epoch": run.get("epoch"),
        "metrics": run.get("metrics") or document.get("metrics") or {},
        "config": document.get("config"),
        "data": document.get("data"),
        "versions": document["versions"],
        "format": document["format"],
    }
