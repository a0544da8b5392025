"""What changed between two calls of a compiled step, and what went wrong in a compilation, in words."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import tree
from ..optim.opaque import reason_in
from ..state import TrainState
from ..types import Batch
from .backends import Program, Refused

__all__ = ["NO_COMPILER", "Recompile", "difference", "doubt", "first_line", "signature"]


NO_COMPILER = "no C++ compiler was found, which torch.compile needs (install g++, or pass compile=False)"


class Recompile(NamedTuple):
    """One more compilation: at which call, which leaf changed, from what to what."""

    call: int
    leaf: str
    before: str
    after: str
    short_batch: bool


def signature(state: TrainState, batch: Batch) -> dict[str, str]:
    """What a program depends on, leaf by leaf."""
    found = {}
    for root, value in (("state", state), ("batch", batch)):
        for path, leaf in tree.items(value, root=root):
            found[path] = (
                f"{tree.describe(leaf)}, stride {tuple(leaf.stride())}" if isinstance(leaf, Tensor) else repr(leaf)
            )
    return found


def difference(call: int, known: list[dict[str, str]], now: dict[str, str], doubts: list[str]) -> Recompile:
    """The first leaf that differs from the nearest known signature; else what dynamo's guards say."""

    def changes(before: dict[str, str]) -> list[str]:
        return [path for path in (*before, *(p for p in now if p not in before)) if before.get(path) != now.get(path)]

    nearest = min(known, key=lambda before: len(changes(before)), default={})
    changed = changes(nearest)
    if not changed:
        reason = next((d for d in doubts if d), "a value outside state and batch")
        return Recompile(call, reason, "what it was when the step was traced", "something else", False)
    batch_only = all(path.startswith("batch") for path in changed)
    path = changed[0]
    return Recompile(call, path, nearest.get(path, "absent"), now.get(path, "absent"), batch_only)


def doubt(program: Program, state: TrainState, batch: Batch) -> str:
    """Which guard of a program fails, as dynamo words it."""
    owner = getattr(program.check, "__self__", None)
    verbose = getattr(owner, "check_verbose", None)
    if verbose is None:
        return ""
    parts = getattr(verbose({"state": state, "batch": batch}), "verbose_code_parts", [])
    return str(parts[0]).split("#")[0].strip() if parts else ""


def innermost(error: BaseException) -> BaseException:
    """The error from which a compilation's failure came."""
    while not isinstance(error, Refused):
        cause = error.__cause__ or getattr(error, "inner_exception", None)  # BackendCompilerFailed has the latter
        if cause is None:
            break
        error = cause
    return error


def first_line(error: BaseException) -> str:
    """What went wrong, from the innermost cause, in one line."""
    cause = innermost(error)
    reason = reason_in(str(cause))
    if reason is not None:
        return reason
    if type(cause).__name__ == "InvalidCxxCompiler":
        return NO_COMPILER
    if "requires_grad_()" in str(cause):
        return "the model or loss_fn stores a tensor with a gradient outside of the state (self.last = activation, say)"
    text = next((line for line in str(cause).splitlines() if line.strip()), "no message")
    return text if isinstance(cause, Refused) else f"{type(cause).__name__}: {text.strip()}"
