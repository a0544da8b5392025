"""Donation: a new state takes over the memory of the old one, which is then gone."""

from __future__ import annotations

from typing import Any

import torch

from .. import tree
from ..state import Counters, TrainState
from ..types import Batch
from .bind import batch_size

__all__ = ["carry", "consume", "overwrite"]


def consume(state: TrainState) -> dict[str, Any]:
    """Take a state's leaves away from it; from now on it raises. Gives what it held."""
    own = dict(state.__dict__)
    state.__dict__.clear()  # mutates: the donated state object, so that it cannot show memory that is no longer its own
    state.__dict__["_donated_at"] = own.get("_at", own["_host"].step if "_host" in own else "(unknown)")
    return own


def carry(own: dict[str, Any], new: TrainState, batch: Batch, counted: bool) -> None:
    """What the host knows of the counters, one step further."""
    at = own.get("_at")
    if at is not None:
        new.__dict__["_at"] = at + 1
    host = own.get("_host")
    if counted and host is not None:
        new.__dict__["_host"] = Counters(host.step + 1, host.epoch, host.samples + batch_size(batch), host.seed)


def overwrite(state: TrainState, new: TrainState) -> TrainState:
    """Donation without a graph: copy the new leaves into the memory of the old state, and hand that on."""
    pairs = []
    if new is not state:
        pairs = [(o, n) for o, n in zip(tree.leaves(state), tree.leaves(new), strict=True) if n is not o]
    memory = {o.untyped_storage().data_ptr() for o, _ in pairs}  # all that is written to
    values = [n.clone() if n.untyped_storage().data_ptr() in memory else n for _, n in pairs]
    own = consume(state)
    if pairs:  # a step may give its state back as it was
        with torch.no_grad():
            torch._foreach_copy_([o for o, _ in pairs], values)  # mutates: donation, as in the compiled program
    kept = object.__new__(TrainState)
    kept.__dict__.update({name: value for name, value in own.items() if not name.startswith("_")})
    kept.__dict__["_version"] = kept.step._version
    if new._host is not None:
        kept.__dict__["_host"] = new._host
    if "_at" in own:
        kept.__dict__["_at"] = own["_at"] + 1
    return kept
