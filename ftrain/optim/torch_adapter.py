"""Any `torch.optim.Optimizer` as a pure transform.

Laws
----
- `update` computes what the optimizer's own `step` computes, and changes nothing that it was given: the optimizer works on copies.
- The state holds everything that the optimizer keeps (see `kept.py`): to run n updates, copy the state and run m more is to run
  n + m.
- The state has one structure. It is learnt in `init` by two steps on tensors without memory (`meta`) or, where those do not run,
  on zeros. An optimizer whose state changes its form later on raises.

The first update makes the optimizer start as it does by itself, whatever values the state holds, so that what it keeps need not
start from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rng, tree
from ..errors import FtrainError, ModelError, explain
from ..types import Transform
from .kept import Kept, read, snapshot, write
from .masks import check_patterns, matches, names
from .opaque import no_value_fn, refuse_trace
from .rules.lbfgs import lbfgs
from .torch_refusals import cannot_run, changes_by_itself, check_class, check_settings, needs_closure, refused
from .transform import is_schedule

__all__ = ["TorchState", "from_torch"]

Values = dict[str, Any]


class TorchState(NamedTuple):
    """State of an optimizer of torch.

    `count`: int64 () on the CPU, updates made; `lr`: float64 () for each parameter group, by the name of its metric; `kept`: what
    the optimizer keeps for its parameters, in its groups, and on itself.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: dict[str, Tensor]
    kept: Kept

    def metrics(self) -> dict[str, Tensor]:
        return self.lr


def from_torch(
    optimizer: type[torch.optim.Optimizer],
    /,
    *,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    closure: bool | None = None,
    **hyper: Any,
) -> Transform:
    """Run an optimizer of `torch.optim`, or anybody's subclass of `torch.optim.Optimizer`, as a transform.

    Law: `params + updates` is what `optimizer.step()` makes of `params`, up to the rounding of that sum.

    It works on copies, so an update needs the memory of parameters, gradients and state once more for its time; and it runs outside
    of a graph: `ft.compile` takes the rung below the whole step. For an optimizer that ftrain has, `ft.optim.<name>` is faster.

    Args:
        optimizer: the class. `torch.optim.LBFGS`, whose state grows, is run by `ft.optim.lbfgs`.
        groups: settings for parameters by path pattern, e.g. `{"*.bias": {"weight_decay": 0.0}}`; the first that matches counts.
        closure: whether to call `step(closure)`, which evaluates the loss again. Default: where `step` demands it.
        **hyper: the optimizer's arguments, `fused=True` and `foreach=True` among them. Schedules of `ft.schedules` are evaluated at
            each update, `lr` may be any function of the step, and 0-d tensors stand for their values.

    Returns:
        A transform with the state `TorchState`. Its learning rates are among the metrics: `lr`, and `lr/<pattern>` for a group.

    Raises:
        ModelError: not an optimizer class, one that cannot be run in this way, or a pattern that matches nothing.
        LimitError: arguments that the optimizer refuses.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.from_torch(torch.optim.SGD, lr=0.5, momentum=0.9)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = tx.update({"w": torch.ones(2)}, tx.init(params), params)
    >>> updates["w"], state.kept.slots["w"]
    (tensor([-0.5000, -0.5000]), {'momentum_buffer': tensor([1., 1.])})
    """
    refuse_trace("ft.optim.from_torch", "makes an optimizer of torch")
    check_class(optimizer, hyper)
    if optimizer is torch.optim.LBFGS:
        if groups:
            raise ModelError(
                explain(
                    "from_torch: torch.optim.LBFGS has no parameter groups.",
                    got=f"groups={groups!r}",
                    fix="groups=None",
                )
            )
        return lbfgs(**hyper)
    adapter = Adapter(optimizer, hyper, {key: dict(own) for key, own in (groups or {}).items()}, closure)
    adapter.check_arguments()
    if adapter.closure:
        return Transform(adapter.init, adapter.update)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        return adapter.update(grads, state, params)

    return Transform(adapter.init, update)


class Adapter:
    """An optimizer's class and arguments as two functions. It keeps nothing between two calls."""

    def __init__(
        self, kind: type[torch.optim.Optimizer], hyper: Values, groups: dict[str, Values], closure: bool | None
    ) -> None:
        self.kind = kind
        self.hyper = {"": hyper, **groups}  # by group; under "" the arguments, which are those of all parameters
        self.closure = needs_closure(kind) if closure is None else closure
        # Kernels that take a tensor for a learning rate need not have it read.
        self.on_device = bool(hyper.get("fused") or hyper.get("capturable"))

    def init(self, params: Any, /) -> TorchState:
        refuse_trace(f"torch.optim's {self.kind.__name__}", "changes tensors in place")
        leaves = dict(zip(names(params), tree.leaves(params), strict=True))
        check_patterns([group for group in self.hyper if group], list(leaves), "from_torch: groups")
        count = torch.zeros((), dtype=torch.int64)
        real = next((leaf.device for leaf in leaves.values() if not leaf.is_meta), torch.device("cpu"))
        with rng.Isolated(0), rng.seeded(0, real):  # an optimizer may draw random numbers
            try:
                kept, rates = self._probe(leaves, torch.device("meta"))
            except FtrainError:
                raise
            except Exception:  # it reads values, or has a kernel that wants memory
                try:
                    kept, rates = self._probe(leaves, real)
                except FtrainError:
                    raise
                except Exception as error:
                    raise cannot_run(self.kind, error) from error
        for group, own in kept.groups.items():
            given = {**self.hyper[""], **self.hyper[group]}
            taken = next((key for key in own if callable(given.get(key)) or isinstance(given.get(key), Tensor)), None)
            if taken is not None:
                raise changes_by_itself(self.kind, taken)
        return TorchState(count, rates, _placed(kept, leaves))

    def update(self, grads: Any, state: Any, params: Any, /, *, value_fn: Any = None) -> tuple[Any, Any]:
        refuse_trace(f"torch.optim's {self.kind.__name__}", "changes tensors in place")
        if self.closure and value_fn is None:
            raise no_value_fn(f"{self.kind.__name__}.step(closure)")
        old, given = tree.leaves(params), tree.leaves(grads)
        copies = dict(zip(names(params), [p.detach().clone() for p in old], strict=True))
        members = self._members(copies)
        optimizer = self._make(copies, state.count)
        if int(state.count) > 0:  # sync: on the CPU, so no device is waited for
            write(optimizer, state.kept, copies, members)
        for p, g in tree.zip_strict(list(copies.values()), given, "parameters and gradients are"):
            p.grad = g.detach().to(p.dtype, copy=True)  # in the parameter's dtype, as torch demands
        before = snapshot(optimizer)
        self._step(optimizer, _closure(value_fn, tree.structure(params), list(copies.values())))
        kept = read(optimizer, copies, members, before, also=state.kept)
        kept = _as_before(kept, state.kept, self.kind)
        updates = [_change(new, p, g) for new, p, g in zip(copies.values(), old, given, strict=True)]
        rates = _rates(optimizer, members, state.lr)
        return tree.unflatten(tree.structure(grads), updates), TorchState(state.count + 1, rates, kept)

    def check_arguments(self) -> None:
        """Raise where the optimizer refuses its arguments, as soon as the transform is made."""
        arguments = self._arguments(torch.zeros((), dtype=torch.int64))
        all_of_them = [{"params": [torch.zeros(2, 2, requires_grad=True)], **own} for own in arguments.values()]
        check_settings(self._construct(all_of_them, arguments[""]), self.hyper)

    def _members(self, leaves: Mapping[str, Any]) -> dict[str, list[str]]:
        """The names of the parameters in each group; groups without any are left out."""
        members: dict[str, list[str]] = {group: [] for group in self.hyper}
        for name in leaves:
            members[next((group for group in self.hyper if group and matches(name, (group,))), "")].append(name)
        return {group: found for group, found in members.items() if found}

    def _arguments(self, count: Tensor) -> dict[str, Values]:
        return {
            group: {key: _at(key, value, count, self.on_device) for key, value in own.items()}
            for group, own in self.hyper.items()
        }

    def _make(self, leaves: Mapping[str, Tensor], count: Tensor) -> torch.optim.Optimizer:
        """A new optimizer over these tensors, with its arguments at this count."""
        for leaf in leaves.values():
            leaf.requires_grad_()
        arguments = self._arguments(count)
        groups = [
            {"params": [leaves[name] for name in found], **(arguments[group] if group else {})}
            for group, found in self._members(leaves).items()
        ]
        return self._construct(groups, arguments[""])

    def _construct(self, groups: list[Values], arguments: Values) -> torch.optim.Optimizer:
        make: Callable[..., torch.optim.Optimizer] = self.kind
        try:
            return make(groups, **arguments)
        except (TypeError, ValueError) as error:
            raise refused(self.kind, self.hyper[""], error) from error

    def _step(self, optimizer: Any, closure: Callable[[], Tensor]) -> None:
        if self.closure:
            optimizer.step(closure)
        else:
            with torch.no_grad():
                optimizer.step()

    def _probe(self, leaves: dict[str, Tensor], device: torch.device) -> tuple[Kept, dict[str, Tensor]]:
        """Two steps with gradients of ones: the first tells what the optimizer keeps, the second whether that is all.

        Gives that, and the learning rates at the start.
        """
        copies = {name: torch.zeros_like(leaf, device=device) for name, leaf in leaves.items()}
        members = self._members(copies)
        optimizer = self._make(copies, torch.zeros((), dtype=torch.int64))
        where = next((leaf.device for leaf in leaves.values()), None)
        rates = {
            _metric(group): torch.zeros((), dtype=torch.float64, device=where)
            for group, settings in zip(members, optimizer.param_groups, strict=True)
            if "lr" in settings
        }
        rates = _rates(optimizer, members, rates)

        def closure() -> Tensor:
            for p in copies.values():
                p.grad = torch.ones_like(p)
            return torch.ones((), device=device)

        before = snapshot(optimizer)
        found: list[Kept] = []
        for _ in range(2):
            closure()
            self._step(optimizer, closure)
            found.append(read(optimizer, copies, members, before, also=found[0] if found else None))
        _check_form(found[0].slots, found[1].slots, self.kind, "slots")
        return found[1], rates


def _closure(value_fn: Any, shape: tree.Structure, copies: list[Tensor]) -> Callable[[], Tensor]:
    """What torch's optimizers call to evaluate the loss at the parameters that they hold now."""

    def closure() -> Tensor:
        with torch.enable_grad():
            value, grads = value_fn(tree.unflatten(shape, [p.detach() for p in copies]))
        for p, g in zip(copies, tree.leaves(grads), strict=True):
            p.grad = g.detach().to(p.dtype, copy=True)
        return value.detach()  # type: ignore[no-any-return]  # a tensor, by the contract of ValueFn

    return closure


def _at(key: str, value: Any, count: Tensor, on_device: bool) -> Any:
    """An argument at this count, as torch takes it."""
    if is_schedule(value) or (key == "lr" and callable(value)):
        value = value(count)
    if isinstance(value, Tensor) and value.ndim == 0 and not (on_device and value.device.type != "cpu"):
        return value.item()  # sync: on the CPU as a rule; on a device where the user put a number there
    if type(value) in (tuple, list):
        return type(value)([_at("", one, count, on_device) for one in value])
    return value


def _metric(group: str) -> str:
    return f"lr/{group}" if group else "lr"


def _rates(optimizer: Any, members: Mapping[str, Any], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The learning rates of the groups, in the form of these leaves."""
    rates = {}
    for group, settings in zip(members, optimizer.param_groups, strict=True):
        leaf, rate = leaves.get(_metric(group)), settings.get("lr")
        if leaf is not None:
            shown = rate.detach().to(leaf, copy=True) if isinstance(rate, Tensor) else torch.full_like(leaf, rate)
            rates[_metric(group)] = shown.reshape(())
    return rates


def _placed(kept: Kept, leaves: dict[str, Tensor]) -> Kept:
    """What was learnt, as zeros where it will lie: beside the parameters, or on the CPU what an optimizer keeps on the host."""

    def place(leaf: Tensor, beside: Tensor) -> Tensor:
        on_host = leaf.device.type == "cpu" and (leaf.ndim == 0 or not beside.is_meta)
        return torch.zeros_like(leaf, device="cpu" if on_host else beside.device)

    slots = {name: tree.map(lambda leaf, b=leaves[name]: place(leaf, b), own) for name, own in kept.slots.items()}
    first = next(iter(leaves.values()), torch.zeros(()))
    groups, own = (tree.map(lambda leaf: place(leaf, first), part) for part in (kept.groups, kept.own))
    return Kept(slots, groups, own)


def _as_before(new: Kept, old: Kept, kind: type) -> Kept:
    """The new state where the old one lies; raises where it is of another form."""
    if not tree.same_structure(new, old):
        _check_form(old, new, kind, "state")
    # A state that was moved as a whole has what the optimizer keeps on the host on the device as well.
    moved = tree.map(lambda a, b: a.to(b.device) if a.ndim == 0 else a, new, old)
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(tree.leaves(moved), tree.leaves(old), strict=True)):
        _check_form(old, moved, kind, "state")
    return moved  # type: ignore[no-any-return]  # of the type of `new`


def _check_form(expected: Any, got: Any, kind: type, root: str) -> None:
    tree.check_same(
        expected,
        got,
        root=root,
        what=f"from_torch: {kind.__name__} changes the form of its state between two steps, but a transform's state has one form.",
        fix="write it as a transform: ft.optim.Transform(init, update), as in ftrain/optim/rules/sgd.py",
    )


def _change(new: Tensor, old: Tensor, grad: Tensor) -> Tensor:
    new = new.detach()
    if grad.dtype in (torch.float16, torch.bfloat16):
        return new.float() - old.float()
    return (new - old).to(grad.dtype)
