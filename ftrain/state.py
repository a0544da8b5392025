"""`TrainState`: everything that training changes, as one immutable tree of tensors.

Laws
----
- Every leaf is a tensor, and what a checkpoint holds is what there is: no callables, no modules, no open files.
- A field is never assigned; `replace` gives a new state that shares the other leaves with the old one.
- `init` copies: the user's model is neither changed nor aliased.
- A parameter that several modules share is one leaf, under the first of its names.
- A state whose memory was given to a donated step raises as soon as it is touched.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import rng, tree
from .errors import DeviceError, DonatedStateError, ModelError, StateError, explain
from .precision import Policy, as_policy, check_supported
from .types import Transform

__all__ = ["Counters", "TrainState", "check_device", "check_materialised", "check_state", "check_transform", "init"]

Trainable = str | Iterable[str] | Callable[[str, nn.Parameter], bool]

_FIELDS = ("params", "frozen", "buffers", "opt", "step", "epoch", "samples", "seed", "extra")


class Counters(NamedTuple):
    """The counters of a state as Python integers.

    >>> from ftrain.state import Counters
    >>> Counters(step=3, epoch=0, samples=48, seed=0).step
    3
    """

    step: int
    epoch: int
    samples: int
    seed: int


@tree.register(*_FIELDS)
@dataclass(frozen=True, eq=False, repr=False)
class TrainState:
    """Everything that training changes. Make one with `ftrain.init`.

    Attributes:
        params: trainable parameters by path, e.g. `state.params["fc.weight"]`.
        frozen: parameters that are not trained, by path.
        buffers: the model's buffers by path (batch-norm statistics ...).
        opt: the optimizer's state; its structure is the optimizer's own.
        step: int64 (), how many times a step was applied.
        epoch: int64 (), how many epochs were completed.
        samples: int64 (), how many samples were seen.
        seed: int64 (), the root of all randomness.
        extra: named sub-states of wrappers and hooks.

    >>> import torch, ftrain as ft
    >>> state = ft.init(torch.nn.Linear(3, 2), ft.optim.sgd(0.1), seed=0)
    >>> state
    TrainState(step=0, epoch=0, samples=0, seed=0, on cpu)
      params   2 tensors, 8 numbers, 32 B (float32)
      opt      2 tensors, 2 numbers, 12 B (float32, int64)
    >>> state.replace(step=state.step + 1).step
    tensor(1)
    """

    params: dict[str, Tensor]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    opt: Any
    step: Tensor
    epoch: Tensor
    samples: Tensor
    seed: Tensor
    extra: dict[str, Any] = field(default_factory=dict)

    # Not part of the tree: what the counters are, where the host knows it without asking the device.
    _host: ClassVar[Counters | None] = None
    # The version of `step`'s memory when this state was made: differs once that memory was overwritten by a donated step.
    _version: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling() and type(self.step) is Tensor and not self.step.is_inference():
            self.__dict__["_version"] = self.step._version

    def __getattr__(self, name: str) -> NoReturn:
        donated_at = self.__dict__.get("_donated_at")
        if donated_at is not None and not name.startswith("__"):
            raise _donated(f"reading state.{name}", donated_at)
        raise AttributeError(f"'TrainState' object has no attribute {name!r}; it has {', '.join(_FIELDS)}")

    def replace(self, **changes: Any) -> TrainState:
        """A state with some fields replaced; the others are shared with this one.

        >>> import torch, ftrain as ft
        >>> state = ft.init(torch.nn.Linear(3, 2), ft.optim.sgd(0.1))
        >>> state.replace(extra={"note": torch.ones(())}).extra
        {'note': tensor(1.)}
        """
        unknown = [name for name in changes if name not in _FIELDS]
        if unknown:
            raise StateError(
                explain(
                    f"TrainState.replace got the unknown field {unknown[0]!r}.",
                    expected=", ".join(_FIELDS),
                    fix="put what wrappers and hooks add under extra: "
                    f"state.replace(extra={{**state.extra, {unknown[0]!r}: value}})",
                )
            )
        new = dataclasses.replace(self, **changes)
        if not torch.compiler.is_compiling() and not changes.keys() & Counters._fields and self._host is not None:
            new.__dict__["_host"] = self._host
        return new

    def advance(self, samples: Tensor | int, **changes: Any) -> TrainState:
        """`replace`, one step and `samples` samples further; the host's copy of the counters is carried along.

        Args:
            samples: how many samples this step consumed.
            **changes: other fields to replace.

        >>> import torch, ftrain as ft
        >>> state = ft.init(torch.nn.Linear(3, 2), ft.optim.sgd(0.1)).advance(16)
        >>> state.step, state.samples
        (tensor(1), tensor(16))
        """
        new = dataclasses.replace(self, step=self.step + 1, samples=self.samples + samples, **changes)
        if not torch.compiler.is_compiling() and self._host is not None and isinstance(samples, int):
            host = self._host
            new.__dict__["_host"] = host._replace(step=host.step + 1, samples=host.samples + samples)
        return new

    def next_epoch(self) -> TrainState:
        """`replace`, one epoch further; the host's copy of the counters is carried along.

        >>> import torch, ftrain as ft
        >>> ft.init(torch.nn.Linear(3, 2), ft.optim.sgd(0.1)).next_epoch().epoch
        tensor(1)
        """
        new = dataclasses.replace(self, epoch=self.epoch + 1)
        if self._host is not None:
            new.__dict__["_host"] = self._host._replace(epoch=self._host.epoch + 1)
        return new

    def counters(self) -> Counters:
        """The counters as integers: one transfer from the device, or none where the host knows them already.

        >>> import torch, ftrain as ft
        >>> ft.init(torch.nn.Linear(3, 2), ft.optim.sgd(0.1), seed=5).counters()
        Counters(step=0, epoch=0, samples=0, seed=5)
        """
        if self._host is None:
            packed = torch.stack([self.step, self.epoch, self.samples, self.seed])
            self.__dict__["_host"] = Counters(*packed.tolist())  # sync: one read where the host has no copy yet
        assert self._host is not None
        return self._host

    @property
    def device(self) -> torch.device:
        """The device on which the state lies."""
        return self.step.device

    def copy(self) -> TrainState:
        """A state with the same values in memory of its own.

        >>> import torch, ftrain as ft
        >>> state = ft.init(torch.nn.Linear(3, 2), ft.optim.sgd(0.1))
        >>> state.copy().params["weight"] is state.params["weight"]
        False
        """
        new: TrainState = tree.map(torch.clone, self)
        if self._host is not None:
            new.__dict__["_host"] = self._host
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.__post_init__()

    def __repr__(self) -> str:
        if "_donated_at" in self.__dict__:
            return f"TrainState(donated at step {self.__dict__['_donated_at']})"
        if not isinstance(self.step, Tensor):
            return f"TrainState({', '.join(f'{name}={getattr(self, name)!r}' for name in _FIELDS)})"
        try:
            head = ", ".join(f"{k}={v}" for k, v in self.counters()._asdict().items())
        except RuntimeError:  # fake, meta or batched leaves have no values to show
            head = f"step={self.step}"
        lines = [f"TrainState({head}, on {self.device})"]
        for name in ("params", "frozen", "buffers", "opt", "extra"):
            found = tree.tensors(getattr(self, name))
            if found:
                lines.append(f"  {name:<8} {_inventory(found)}")
        return "\n".join(lines)


def _inventory(tensors: list[Tensor]) -> str:
    numbers = sum(t.numel() for t in tensors)
    size = sum(t.numel() * t.element_size() for t in tensors)
    unit = 0
    shown = float(size)
    while shown >= 1000 and unit < 4:
        shown, unit = shown / 1000, unit + 1
    text = f"{size} B" if unit == 0 else f"{shown:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors})
    plural = "" if len(tensors) == 1 else "s"
    return f"{len(tensors)} tensor{plural}, {numbers} number{'' if numbers == 1 else 's'}, {text} ({', '.join(dtypes)})"


def _donated(what: str, step: int | str) -> DonatedStateError:
    return DonatedStateError(
        explain(
            f"{what} of a state whose memory was given to a compiled step at step {step}.",
            cause="ft.compile(step, donate=True) overwrites its input, so only the state that it returned is valid",
            fix="state, metrics = step(state, batch)      # go on with the returned state\n"
            "kept = state.copy()                      # or copy before the step what must survive it\n"
            "step = ft.compile(step, donate=False)    # or compile without donation",
        )
    )


def check_state(state: object, what: str) -> TrainState:
    """Raise unless `state` is a `TrainState` whose memory is its own; `what` opens the message, e.g. "ft.fit".

    Raises:
        StateError: it is something else.
        DonatedStateError: its memory was overwritten by a donated step.

    >>> from ftrain.state import check_state
    >>> check_state({"w": 1}, "ft.fit")
    Traceback (most recent call last):
    ftrain.errors.StateError: ft.fit wants a TrainState as its first argument.
      expected: TrainState
      got:      dict
      fix:      state = ft.init(model, tx, seed=0)
    """
    if not isinstance(state, TrainState):
        hint = "state = ft.init(model, tx, seed=0)"
        if isinstance(state, nn.Module):
            hint += "   # `model` is the module that you passed"
        raise StateError(
            explain(
                f"{what} wants a TrainState as its first argument.",
                expected="TrainState",
                got=type(state).__name__,
                fix=hint,
            )
        )
    donated_at = state.__dict__.get("_donated_at")
    if donated_at is not None:
        raise _donated(f"{what}: use", donated_at)
    if isinstance(state.step, Tensor) and (state.step.dtype != torch.int64 or state.step.ndim != 0):
        raise StateError(
            explain(
                f"{what}: the counters of this state are not what ft.init made.",
                where="state.step",
                expected="int64[]",
                got=tree.describe(state.step),
                cause="a function mapped over the whole state, or several states stacked",
                fix="state.replace(params=ft.tree.map(fn, state.params))   # map over the fields that are meant",
            )
        )
    version = state._version
    if version is not None and state.step._version != version:
        raise DonatedStateError(
            explain(
                f"{what}: the memory of this state was overwritten after it was made.",
                cause="a state that shares leaves with it (made by .replace) was given to a donated step, "
                "or a leaf was changed in place",
                fix="state = state.copy()   # before the other one is donated",
            )
        )
    return state


def check_device(device: torch.device, what: str) -> torch.device:
    """Raise unless ftrain supports the device: CPU and CUDA (and `meta`, for shapes without memory).

    >>> import torch
    >>> from ftrain.state import check_device
    >>> check_device(torch.device("cpu"), "ft.init")
    device(type='cpu')
    """
    if device.type in ("cpu", "cuda", "meta"):
        return device
    note = (
        "MPS has no float64 and no int64 reductions, which counters and metrics need" if device.type == "mps" else None
    )
    raise DeviceError(
        explain(
            f"{what}: the device {str(device)!r} is not supported.",
            expected="cpu or cuda",
            got=str(device),
            cause=note,
            fix='ft.init(model, tx, device="cpu")',
        )
    )


def check_materialised(model: nn.Module, what: str) -> None:
    """Raise when the model has lazy parameters or buffers that have not seen a batch yet.

    >>> import torch
    >>> from ftrain.state import check_materialised
    >>> check_materialised(torch.nn.Linear(2, 2), "ft.init")
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, leaf in named if is_lazy(leaf)]
    if lazy:
        raise ModelError(
            explain(
                f"{what}: the model has lazy parameters that have no shape yet.",
                where=f"model.{lazy[0]}" + (f" and {len(lazy) - 1} more" if len(lazy) > 1 else ""),
                fix="model(example_input)   # once, before ft.init",
            )
        )


def check_transform(tx: object, what: str) -> None:
    """Raise unless `tx` is an optimizer.

    >>> import ftrain as ft
    >>> from ftrain.state import check_transform
    >>> check_transform(ft.optim.sgd(0.1), "ft.init")
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        torch_own = isinstance(tx, torch.optim.Optimizer)
        raise ModelError(
            explain(
                f"{what} wants an optimizer (a Transform).",
                expected="Transform(init, update)",
                got=type(tx).__name__,
                cause="a torch.optim optimizer holds state of its own" if torch_own else None,
                fix="tx = ft.optim.adamw(3e-4)",
            )
        )


def init(
    model: nn.Module,
    tx: Transform,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    trainable: Trainable | None = None,
    precision: str | int | Policy | None = None,
) -> TrainState:
    """Make the first state from an ordinary module and an optimizer. The module is copied, not kept.

    Args:
        model: any `nn.Module`. Its parameters and buffers are copied; a parameter with `requires_grad=False` is frozen.
        tx: the optimizer, e.g. `ft.optim.adamw(3e-4)`.
        seed: root of all randomness of the run.
        device: where the state lies; default: where the model's parameters lie.
        trainable: which parameters are trained: a path pattern (`"head.*"`, as in `fnmatch`), several patterns, or a predicate
            `(path, parameter) -> bool`. Parameters with `requires_grad=False` stay frozen whatever it says.
        precision: as for `ft.train_step`; floating parameters and buffers are converted to its `param` dtype. Only the
            `*-true` precisions differ from the default, which keeps the model's own dtypes.

    Returns:
        A `TrainState` at step 0. Frozen parameters have no optimizer state.

    Raises:
        ModelError: nothing to train, a pattern that matches nothing, or lazy parameters without shape.
        DeviceError: a device that is neither CPU nor CUDA, or cannot compute in this precision.
        PrecisionError: an unknown precision.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> state = ft.init(model, ft.optim.adam(1e-3), seed=0, trainable="1.*")
    >>> list(state.params), list(state.frozen)
    (['1.weight', '1.bias'], ['0.weight', '0.bias'])
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            explain(
                "ft.init wants a module as its first argument.",
                expected="torch.nn.Module",
                got=type(model).__name__,
                fix="state = ft.init(model, tx, seed=0)",
            )
        )
    check_transform(tx, "ft.init")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ModelError(explain(f"ft.init: seed={seed!r} is no seed.", expected="an integer", got=type(seed).__name__))
    check_materialised(model, "ft.init")
    named = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    where = _placement(device, {**named, **buffers})
    policy = None if precision is None else as_policy(precision, "ft.init")
    if policy is not None:
        check_supported(policy, where, "ft.init")
    chosen = _choose(named, trainable)
    if not chosen:
        _nothing_to_train(model, named)

    def own(leaf: Tensor) -> Tensor:
        # A copy always: `.to` alone would alias the module's memory where the device is the same.
        dtype = policy.param if policy is not None and leaf.is_floating_point() else leaf.dtype
        return leaf.detach().to(where, dtype, copy=True).contiguous()

    if torch.is_inference_mode_enabled():  # tensors made in there could never be trained
        with torch.inference_mode(False):
            return init(model, tx, seed=seed, device=device, trainable=trainable, precision=precision)
    params = {name: own(p) for name, p in named.items() if name in chosen}

    def count(n: int) -> Tensor:
        return torch.tensor(n, dtype=torch.int64, device=where)

    return TrainState(
        params=params,
        frozen={name: own(p) for name, p in named.items() if name not in chosen},
        buffers={name: own(b) for name, b in buffers.items()},
        opt=tx.init(params),
        step=count(0),
        epoch=count(0),
        samples=count(0),
        seed=rng.key(seed, where),
        extra={},
    )


def _placement(device: torch.device | str | None, named: dict[str, Tensor]) -> torch.device:
    if device is not None:
        try:
            where = check_device(torch.device(device), "ft.init")
        except (RuntimeError, TypeError) as error:
            raise DeviceError(
                explain(f"ft.init: {device!r} is no device.", expected="cpu or cuda", cause=str(error).splitlines()[0])
            ) from None
        if where.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                explain(
                    "ft.init: this machine (or this build of torch) has no CUDA.", got=repr(device), fix='device="cpu"'
                )
            )
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        return where
    found: dict[torch.device, str] = {}
    for name, leaf in named.items():
        found.setdefault(leaf.device, name)
    if len(found) > 1:
        (a, one), (b, two) = list(found.items())[:2]
        raise DeviceError(
            explain(
                "ft.init: the model lies on several devices.",
                where=f"{one} on {a}, {two} on {b}",
                fix=f'ft.init(model, tx, device="{b}")',
            )
        )
    return check_device(next(iter(found), torch.device("cpu")), "ft.init")


def _choose(named: dict[str, nn.Parameter], trainable: Trainable | None) -> set[str]:
    free = {name for name, p in named.items() if p.requires_grad}
    if trainable is None:
        return free
    if not isinstance(trainable, (str, Iterable)) and not callable(trainable):
        raise ModelError(
            explain(
                f"ft.init: trainable={trainable!r} makes no sense.",
                expected="a path pattern, several, or a predicate (path, parameter) -> bool",
                fix='trainable="head.*"',
            )
        )
    if callable(trainable):
        return {name for name in free if trainable(name, named[name])}
    patterns = [trainable] if isinstance(trainable, str) else list(trainable)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = set(fnmatch.filter(named, pattern))
        if not hits:
            raise ModelError(
                explain(
                    f"ft.init: the pattern trainable={pattern!r} matches no parameter.",
                    expected=f"a pattern for some of: {_some(list(named))}",
                    fix=f'trainable="{next(iter(named), "head.weight").rpartition(".")[0] or "*"}*"',
                )
            )
        chosen |= hits & free
    return chosen


def _nothing_to_train(model: nn.Module, named: dict[str, nn.Parameter]) -> NoReturn:
    got = f"{len(named)} parameters, all frozen" if named else "a module without parameters"
    raise ModelError(
        explain(
            f"ft.init: {type(model).__name__} has no trainable parameters.",
            expected="at least one parameter with requires_grad=True that trainable= selects",
            got=got,
            fix='model.head.requires_grad_(True)   # or: ft.init(model, tx, trainable="head.*")',
        )
    )


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
