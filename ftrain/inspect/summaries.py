"""`summary`: a model as a table, module by module, with what its state costs. Nothing is computed for it.

Laws
----
- Each parameter counts once: at the first module that holds it. The totals are those of the state.
- The model is not touched: not its numbers, its mode, or its hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import tree
from ..data.checks import integer
from ..errors import ArgumentError, LimitError, ModelError, StructureError, explain
from ..state import TrainState, check_state
from ..types import Batch
from .forwards import Call, forward
from .tables import as_html, as_text, bytes_of, count, size

__all__ = ["Row", "Summary", "summary"]

_WIDE = 40  # an output's shapes are cut off here in the text; the row has all of them


@dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        path: as in `model.named_modules()`; "" is the model itself.
        type: its class.
        depth: how deep it lies; the model itself has 0.
        parameters: how many numbers its parameters hold, submodules included, each shared parameter at its first module only.
        trainable: how many of them are trained.
        bytes: what parameters and buffers take.
        training: whether it is in training mode.
        output: shapes of what it returned at its first call; "" without a batch.
        flops: floating-point operations of its forward passes, submodules included; 0 without a batch.
        calls: how often it was called; None without a batch.
        notes: shared, lazy, frozen, never called ...

    >>> import torch, ftrain as ft
    >>> ft.summary(None, torch.nn.Linear(2, 3)).rows[0].parameters
    9
    """

    path: str
    type: str
    depth: int
    parameters: int
    trainable: int
    bytes: int
    training: bool
    output: str
    flops: int
    calls: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Summary:
    """A model as a table. Made by `ftrain.summary`; its text is the table.

    Attributes:
        rows: the modules, down to the depth that was asked for.
        parameters: how many numbers all parameters hold.
        trainable: how many of them are trained.
        frozen: how many are not.
        buffers: how many numbers the buffers hold.
        model_bytes: what parameters and buffers take.
        optimizer_bytes: what the optimizer's state takes.
        extra_bytes: what sub-states of wrappers and hooks take.
        dtypes: bytes of parameters and buffers by dtype.
        flops: of one forward pass; None without a batch.
        lazy: parameters that have no shape yet: name, and the shape that this batch would give them.

    >>> import torch, ftrain as ft
    >>> ft.summary(None, torch.nn.Linear(2, 3)).trainable
    9
    """

    rows: tuple[Row, ...]
    parameters: int
    trainable: int
    frozen: int
    buffers: int
    model_bytes: int
    optimizer_bytes: int
    extra_bytes: int
    dtypes: dict[str, int]
    flops: int | None
    lazy: dict[str, tuple[int, ...] | None]

    def __repr__(self) -> str:
        head, rows = self._table()
        return f"{as_text(head, rows, frozenset({2, 3, 4}) | ({6} if self.flops is not None else set()))}\n\n{self._totals()}"

    def _repr_html_(self) -> str:
        head, rows = self._table()
        return as_html(head, rows, self._totals())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        head = ["module", "type", "parameters", "trainable", "bytes"]
        called = self.flops is not None
        head += ["output", "FLOP"] if called else []
        noted = any(row.notes for row in self.rows)
        rows = []
        for row in self.rows:
            name = "  " * row.depth + (row.path.rpartition(".")[2] or "(model)")
            cells = [name, row.type, f"{row.parameters:,}", f"{row.trainable:,}", size(row.bytes)]
            if called:
                output = row.output if len(row.output) <= _WIDE else row.output[: _WIDE - 3] + "..."
                cells += [output, count(row.flops) if row.calls else ""]
            rows.append(cells + (["; ".join(row.notes)] if noted else []))
        return head + (["notes"] if noted else []), rows

    def _totals(self) -> str:
        lines = [
            ("parameters", f"{self.parameters:,} ({self.trainable:,} trainable, {self.frozen:,} frozen)"),
            ("buffers", f"{self.buffers:,}"),
            (
                "model",
                f"{size(self.model_bytes)} ({', '.join(f'{d} {size(n)}' for d, n in self.dtypes.items()) or 'empty'})",
            ),
        ]
        if self.optimizer_bytes:
            lines.append(("optimizer", size(self.optimizer_bytes)))
        if self.extra_bytes:
            lines.append(("extra", size(self.extra_bytes)))
        if self.flops is not None:
            lines.append(("forward", count(self.flops, "FLOP")))
        for name, found in self.lazy.items():
            lines.append(
                ("lazy", f"{name}: no shape yet" + ("" if found is None else f"; this batch gives it {list(found)}"))
            )
        return "\n".join(f"{name:<11} {text}" for name, text in lines)


def summary(
    state: TrainState | None,
    model: nn.Module,
    batch: Batch | None = None,
    *,
    depth: int = 2,
    fn: Callable[[nn.Module, Batch], Any] | None = None,
) -> Summary:
    """A table of a model: parameters, bytes, output shapes and operations of each module, and what the state costs.

    Args:
        state: made from `model`; None for a model without a state yet, then what the model itself says counts.
        model: the module. It may lie on `meta`; it is not touched.
        batch: with one (real or on `meta`), a forward pass on fake tensors tells shapes and operations.
        depth: how deep the table goes.
        fn: how the model is called: `fn(model, batch)`; default: `model(batch)`.

    Returns:
        A `Summary`; its text is the table, and a notebook shows it as HTML.

    Raises:
        StructureError: the state belongs to another model.
        ModelError: no module.
        LimitError: a depth below 0.
        ArgumentError: `forward` does not take the batch as it is: say with `fn=` how the model is called.
        InspectError: the model reads a value in its forward pass.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> ft.summary(ft.init(model, ft.optim.adam(1e-3)), model, torch.ones(32, 8))
    module   type        parameters  trainable     bytes  output     FLOP
    (model)  Sequential         212        212     848 B  [32, 4]   12.3 k
      0      Linear             144        144     576 B  [32, 16]   8.2 k
      1      ReLU                 0          0       0 B  [32, 16]      0
      2      Linear              68         68     272 B  [32, 4]    4.1 k
    <BLANKLINE>
    parameters  212 (212 trainable, 0 frozen)
    buffers     0
    model       848 B (float32 848 B)
    optimizer   1.7 kB
    forward     12.3 kFLOP
    """
    _check(state, model, depth, fn, batch)
    params = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    if state is None:
        trained = {name for name, p in params.items() if p.requires_grad}
        leaves: dict[str, Tensor] = {**params, **buffers}
        opt: list[Tensor] = []
        extra: list[Tensor] = []
    else:
        trained = set(state.params)
        leaves = {**state.params, **state.frozen, **state.buffers}
        opt, extra = tree.tensors(state.opt), tree.tensors(state.extra)
    lazy: dict[str, tuple[int, ...] | None] = {name: None for name, leaf in leaves.items() if is_lazy(leaf)}
    called: dict[str, Call] | None = None
    flops: int | None = None
    if batch is not None:
        called, flops, shapes = forward(model, leaves, batch, fn, "ft.summary")
        lazy |= shapes
    known = {name: leaf for name, leaf in leaves.items() if name not in lazy}
    counts = {name: known[name].numel() for name in params if name in known}
    dtypes: dict[str, int] = {}
    for leaf in known.values():
        dtype = str(leaf.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + leaf.numel() * leaf.element_size()
    return Summary(
        rows=tuple(_rows(model, known, trained, lazy, called, depth=depth)),
        parameters=sum(counts.values()),
        trainable=sum(n for name, n in counts.items() if name in trained),
        frozen=sum(n for name, n in counts.items() if name not in trained),
        buffers=sum(known[name].numel() for name in buffers if name in known),
        model_bytes=sum(dtypes.values()),
        optimizer_bytes=bytes_of(opt),
        extra_bytes=bytes_of(extra),
        dtypes=dict(sorted(dtypes.items(), key=lambda pair: -pair[1])),
        flops=flops,
        lazy=lazy,
    )


def _check(state: Any, model: Any, depth: Any, fn: Any, batch: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(
            explain(
                "ft.summary wants a module as its second argument.",
                expected="torch.nn.Module",
                got=type(model).__name__,
                fix="ft.summary(state, model, batch)   # or ft.summary(None, model) where there is no state",
            )
        )
    integer(depth, "ft.summary", "depth", least=0, kind=LimitError, fix="ft.summary(state, model, depth=2)")
    if fn is not None and (not callable(fn) or batch is None):
        raise ArgumentError(
            explain(
                "ft.summary: fn= says how the model is called with a batch.",
                expected="a function fn(model, batch), and a batch",
                got="no batch" if callable(fn) else type(fn).__name__,
                fix="ft.summary(state, model, batch, fn=lambda model, batch: model(batch['x']))",
            )
        )
    if state is None:
        return
    check_state(state, "ft.summary")
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {**state.params, **state.frozen, **state.buffers}
    missing, extra = [name for name in own if name not in held], [name for name in held if name not in own]
    if missing or extra:
        raise StructureError(
            explain(
                f"ft.summary: the state does not belong to the model {type(model).__name__}.",
                expected=f"leaves named as in the model; missing: {', '.join(missing[:5]) or 'none'}",
                got=f"extra: {', '.join(extra[:5]) or 'none'}",
                fix="ft.summary(state, model)   # with the model that the state was made from",
            )
        )
    for name, leaf in own.items():
        if not is_lazy(leaf) and leaf.shape != held[name].shape:
            raise StructureError(
                explain(
                    f"ft.summary: the state does not belong to the model {type(model).__name__}.",
                    where=name,
                    expected=str(list(leaf.shape)),
                    got=str(list(held[name].shape)),
                    fix="ft.summary(state, model)   # with the model that the state was made from",
                )
            )


def _rows(
    model: nn.Module,
    leaves: dict[str, Tensor],
    trained: set[str],
    lazy: dict[str, Any],
    called: dict[str, Call] | None,
    *,
    depth: int,
) -> list[Row]:
    params = dict(model.named_parameters())
    names = {id(leaf): name for name, leaf in (*params.items(), *model.named_buffers())}
    aliases: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(path)
    rows = []
    for path, module in model.named_modules():
        level = 0 if not path else path.count(".") + 1
        if level > depth:
            continue
        inside = {name: leaf for name, leaf in leaves.items() if not path or name.startswith(f"{path}.")}
        numbers = {n: leaf.numel() for n, leaf in inside.items() if n in params}
        trainable = sum(count for name, count in numbers.items() if name in trained)
        call = None if called is None else called[path]
        notes = [f"also {other or 'the model'}" for other in aliases[id(module)][1:]]
        for part_path, part in module.named_modules(prefix=path):
            if part is not module and level < depth:
                continue  # said at its own row
            for key, leaf in (*part._parameters.items(), *part._buffers.items()):
                full = f"{part_path}.{key}" if part_path else key
                if leaf is not None and names[id(leaf)] != full:
                    notes.append(f"{full.removeprefix(path + '.')} is {names[id(leaf)]}")
        if any(not path or name.startswith(f"{path}.") for name in lazy):
            notes.append("lazy")
        if numbers and not trainable:
            notes.append("frozen")
        if model.training and not module.training:
            notes.append("in evaluation mode")
        # A container (ModuleList) has no forward that could be called.
        if call is not None and call.calls != 1 and (call.calls or type(module).forward is not nn.Module.forward):
            notes.append(f"called {call.calls} times" if call.calls else "never called")
        rows.append(
            Row(
                path=path,
                type=type(module).__name__,
                depth=level,
                parameters=sum(numbers.values()),
                trainable=trainable,
                bytes=sum(leaf.numel() * leaf.element_size() for leaf in inside.values()),
                training=module.training,
                output="" if call is None else call.output,
                flops=0 if call is None else call.flops,
                calls=None if call is None else call.calls,
                notes=tuple(notes),
            )
        )
    return rows
