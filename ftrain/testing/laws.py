"""The laws of a step, for users to run on their own: `check_step` runs all that apply.

Each check takes a step and real inputs, raises `AssertionError` with the law's name and what broke it, and returns None. They
compare numbers relative to what moved, and they refuse inputs on which nothing moves, since there every law would hold.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import tree
from ..errors import FtrainError, RecompileWarning
from ..metrics import normalise
from ..state import TrainState, check_state
from ..steps.compile import CompiledStep
from ..steps.compile import compile as compile_step
from ..types import Batch

__all__ = [
    "LawError",
    "check_compiled",
    "check_donation",
    "check_moves",
    "check_pure",
    "check_random",
    "check_recompiles",
    "check_step",
    "check_structure",
]

StepFn = Callable[[TrainState, Batch], Any]


class LawError(FtrainError, AssertionError):
    """A step breaks one of the laws.

    >>> from ftrain.testing import LawError
    >>> issubclass(LawError, AssertionError)
    True
    """


def check_step(
    step: StepFn,
    state: TrainState,
    batch: Batch,
    *,
    backend: str | Callable[..., Any] = "aot_eager",
    rtol: float = 1e-3,
) -> None:
    """Run every law on a step: it moves, keeps the structure, is pure, draws from (seed, step) alone, compiles, donates.

    Args:
        step: `(state, batch) -> (state, metrics)`, not compiled.
        state: a state as `ft.init` gives it; not changed.
        batch: a batch on the state's device.
        backend: a backend of `torch.compile` for the laws about compiled steps.
        rtol: how far compiled and eager updates may differ, relative to the size of the update.

    Raises:
        LawError: with the name of the law, and the path and values that break it.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.adam(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.testing.check_step(step, ft.init(model, tx), torch.ones(4, 2), backend="eager")
    """
    check_state(state, "ft.testing.check_step")
    check_moves(step, state, batch)
    check_structure(step, state, batch)
    check_pure(step, state, batch)
    check_random(step, state, batch)
    check_compiled(step, state, batch, backend=backend, rtol=rtol)
    check_donation(step, state, batch, backend=backend)
    check_recompiles(step, state, [batch] * 3, backend=backend)


def check_moves(step: StepFn, state: TrainState, batch: Batch) -> None:
    """The step changes some parameter and advances `step` by one; else no other law could fail.

    Raises:
        LawError: all parameters stay as they are, or the counter does.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.testing.check_moves(step, ft.init(model, tx), torch.ones(4, 2))
    """
    new = _call(step, state, batch)[0]
    if int(new.step) != int(state.step) + 1:
        raise LawError(f"moves: state.step went from {int(state.step)} to {int(new.step)}, not one further")
    if all(_equal(a, b) for a, b in zip(tree.leaves(state.params), tree.leaves(new.params), strict=True)):
        raise LawError(
            "moves: no parameter changed; the batch has no gradient, or the learning rate is 0 (a warm-up begins so: step once first)"
        )


def check_structure(step: StepFn, state: TrainState, batch: Batch) -> None:
    """Law 1: the new state has the structure, shapes, dtypes and devices of the old one.

    Raises:
        LawError: with the path and both sides.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.testing.check_structure(step, ft.init(model, tx), torch.ones(4, 2))
    """
    new = _call(step, state, batch)[0]
    try:
        tree.check_same(state, new, root="state", what="structure: the step returned a state of another form.")
    except FtrainError as error:
        raise LawError(str(error)) from None


def check_pure(step: StepFn, state: TrainState, batch: Batch) -> None:
    """Law 2: state, batch and the global generators are bitwise as before the call, and a second call gives the same.

    Raises:
        LawError: what was changed, or which leaf differs between two calls.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.testing.check_pure(step, ft.init(model, tx), torch.ones(4, 2))
    """
    kept = tree.map(_clone, (state, batch))
    generators = _generators()
    first = _call(step, state, batch)
    now = _generators()
    for name, before in generators.items():
        if not _same_generator(before, now[name]):
            raise LawError(f"pure: the step changed the global generator of {name}")
    _compare("pure: the step changed its input", kept, (state, batch), "inputs")
    second = _call(step, state, batch)
    _compare("pure: two calls with the same input differ", first, second, "result")


def check_random(step: StepFn, state: TrainState, batch: Batch) -> None:
    """Law 8: what is drawn is a function of (seed, step), not of the global generators.

    Raises:
        LawError: the result changes with `torch.manual_seed`, `np.random.seed` or `random.seed`.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.testing.check_random(step, ft.init(model, tx), torch.ones(4, 2))
    """
    results = []
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    try:
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            results.append(_call(step, state, batch))
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
    _compare("random: the result depends on the global generators", results[0], results[1], "result")


def check_compiled(
    step: StepFn,
    state: TrainState,
    batch: Batch,
    *,
    backend: str | Callable[..., Any] = "aot_eager",
    rtol: float = 1e-3,
    steps: int = 3,
) -> None:
    """Law 3: after some steps, compiled and eager updates agree relative to the size of the update.

    Raises:
        LawError: the leaf that differs most, and by how much.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.testing.check_compiled(step, ft.init(model, tx), torch.ones(4, 2), backend="eager")
    """
    fast = compile_step(step, donate=False, backend=backend)
    eager = quick = state
    for _ in range(steps):
        eager, _ = _call(step, eager, batch)
        quick, _ = _call(fast, quick, batch)
    # Errors are compared over a whole group of leaves (all parameters, all first moments ...): a single leaf may have a gradient
    # that is zero but for rounding (a bias before a batch norm), which Adam blows up to the size of a step.
    groups: dict[str, list[float]] = {}
    for (path, a), b, start in zip(tree.items(eager, "state"), tree.leaves(quick), tree.leaves(state), strict=True):
        if not a.is_floating_point():
            if not _equal(a, b):
                raise LawError(f"compiled: {path} is {a.flatten()[:3]} eagerly and {b.flatten()[:3]} compiled")
            continue
        group = groups.setdefault(path.rpartition("[")[0] or path, [0.0, 0.0])
        group[0] += (a.double() - b.double()).square().sum().item()
        group[1] += (a.double() - start.double()).square().sum().item()
    if not any(moved for _, moved in groups.values()):
        raise LawError("compiled: nothing moved, so nothing was compared")
    for path, (error, moved) in groups.items():
        relative = (error / moved) ** 0.5 if moved else error
        if not relative <= rtol:
            raise LawError(
                f"compiled: {path} differs by {relative:.1e} of its update after {steps} steps; allowed are {rtol:.0e}"
            )


def check_donation(
    step: StepFn, state: TrainState, batch: Batch, *, backend: str | Callable[..., Any] = "aot_eager"
) -> None:
    """Law 2 for donation: the same values as without, in the memory of the input, which raises when it is touched.

    Raises:
        LawError: another value, other memory, or an input that is still readable.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.testing.check_donation(step, ft.init(model, tx), torch.ones(4, 2), backend="eager")
    """
    expected, _ = _call(compile_step(step, donate=False, backend=backend), state, batch)
    own = state.copy()
    where = [leaf.data_ptr() for leaf in tree.leaves(own)]
    new, _ = _call(compile_step(step, donate=True, backend=backend), own, batch)
    _compare("donation: other values than without", expected, new, "state")
    for (name, leaf), address in zip(tree.items(new, "state"), where, strict=True):
        if leaf.data_ptr() != address:
            raise LawError(f"donation: {name} does not lie in the memory of the input")
    try:
        _ = own.params
    except FtrainError:
        return
    raise LawError("donation: the donated state can still be read")


def check_recompiles(
    step: StepFn,
    state: TrainState,
    batches: Sequence[Batch],
    *,
    backend: str | Callable[..., Any] = "aot_eager",
    most: int = 1,
) -> None:
    """Law 9: a run over these batches compiles at most `most` times (2 where the last batch is short).

    Raises:
        LawError: the leaf that changed at each further compilation.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> ft.testing.check_recompiles(step, ft.init(model, tx), [torch.ones(4, 2)] * 3, backend="eager")
    """
    fast = step if isinstance(step, CompiledStep) else compile_step(step, donate=False, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecompileWarning)
        for batch in batches:
            state, _ = _call(fast, state, batch)
    programs = 1 + len(fast.recompiles)
    if programs > most:
        said = "; ".join(f"{r.leaf}: {r.before} -> {r.after}" for r in fast.recompiles)
        raise LawError(f"recompiles: {programs} programs over {len(batches)} batches, allowed are {most}: {said}")


def _call(step: StepFn, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    out = step(state, batch)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)):
        raise LawError(f"the step returned {tree.describe(out)}, not (state, metrics)")
    return out[0], normalise(out[1], None, "the metrics that the step returned")


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _equal(a: Any, b: Any) -> bool:
    """Bitwise equal; NaN equals NaN."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def _compare(law: str, a: Any, b: Any, root: str) -> None:
    if not tree.same_structure(a, b):
        raise LawError(f"{law}: the structure differs")
    for (path, one), two in zip(tree.items(a, root), tree.leaves(b), strict=True):
        if not _equal(one, two):
            raise LawError(f"{law}: {path}")


def _generators() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}


def _same_generator(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in zip(a, b, strict=True))
