"""Parameters from the formats of others: safetensors, and state dicts that `torch.save` wrote. Nothing in them is run.

Laws
----
- What comes back is a state like `like`: names, shapes, dtypes, devices; all differences are listed in one error.
- Names that are one tensor in the module (`model=`) or in the file may stand for each other; where several are there, they agree.
- What is taken lies in memory of its own; everything else is that of `like`, and shared with it (as by `state.replace`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RestoreError, RestoreWarning, explain
from ..state import TrainState, check_state
from .dtypes import dtype_name
from .names import check_model, ties
from .paths import Rename, renamed
from .report import Report
from .safefile import Found, opened
from .torchfile import check_file, load, state_dict

__all__ = ["from_safetensors", "from_torch"]


class _File(NamedTuple):
    """What a file holds: its path, tensors by name, and groups of names that are one tensor in it."""

    path: str
    tensors: dict[str, Found]
    same: list[set[str]]


class _Asked(NamedTuple):
    """The arguments that say how."""

    what: str  # opens the message of an error
    model: nn.Module | None
    rename: Rename | None
    strict: bool
    cast: bool


def from_safetensors(
    path: str | os.PathLike[str],
    like: TrainState,
    *,
    model: nn.Module | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
) -> TrainState:
    """A state with the parameters and buffers of a safetensors file, whoever wrote it.

    Args:
        path: of the file.
        like: a state; what comes back is like it. Its counters, optimizer state and `extra` (averages, too) are kept as they are.
        model: the module from which `like` was made; not changed. With it other names of a tied tensor are understood, and buffers
            that are not persistent are kept from `like`.
        rename: which name of the file is which name of the state: `{"encoder.*": "backbone.*"}` (None leaves out), or a function; as
            for `ft.restore`.
        strict: everything must fit. False: what fits is taken, the rest is kept from `like`, and a `RestoreWarning` lists it.
        cast: convert dtypes that differ.

    Raises:
        RestoreError: the file does not fit; all differences are listed.
        CheckpointError: there is no such file, it is of another format, or it is damaged.

    >>> import tempfile, safetensors.torch, torch, ftrain as ft
    >>> state = ft.init(torch.nn.Linear(2, 1), ft.optim.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tensors = {"fc.weight": torch.ones(1, 2), "fc.bias": torch.zeros(1)}
    ...     safetensors.torch.save_file(tensors, folder + "/model.safetensors")
    ...     new = ft.checkpoint.from_safetensors(folder + "/model.safetensors", state, rename={"fc.*": "*"})
    >>> new.params["weight"]
    tensor([[1., 1.]])
    """
    what = "ft.checkpoint.from_safetensors"
    _check_arguments(like, model, what)
    check_file(path, what)
    with opened(path, what) as (tensors, metadata):
        # save_model drops all names of a tensor but one, and notes {dropped: kept}.
        dropped = {name: kept for name, kept in metadata.items() if kept in tensors and name not in tensors}
        same: dict[str, set[str]] = {}
        for name, kept in dropped.items():
            same.setdefault(kept, {kept}).add(name)
        file = _File(
            str(path), {**tensors, **{name: tensors[kept] for name, kept in dropped.items()}}, list(same.values())
        )
        return _taken(file, like, _Asked(what, model, rename, strict, cast))


def from_torch(
    path: str | os.PathLike[str],
    like: TrainState,
    *,
    key: str | None = None,
    model: nn.Module | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
) -> TrainState:
    """A state with the parameters and buffers of a state dict that `torch.save` wrote. It is read with `weights_only`: no code is run.

    Args:
        path: of the file.
        like: a state; what comes back is like it. Its counters, optimizer state and `extra` (averages, too) are kept as they are.
        key: where in the file the state dict is, if it is not all of it: `"state_dict"` for one of Lightning.
        model: the module from which `like` was made; not changed. With it other names of a tied tensor are understood, and buffers
            that are not persistent are kept from `like`. Extra state in the file is the module's, and left out.
        rename: which name of the file is which name of the state: `{"encoder.*": "backbone.*"}` (None leaves out), or a function; as
            for `ft.restore`.
        strict: everything must fit. False: what fits is taken, the rest is kept from `like`, and a `RestoreWarning` lists it.
        cast: convert dtypes that differ.

    Raises:
        RestoreError: the file does not fit, all differences are listed; or it holds no state dict.
        CheckpointError: there is no such file, it is damaged, or it holds more than tensors and plain values.

    >>> import tempfile, torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 1)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(
    ...         {"model": {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, "epoch": 3}, folder + "/model.pt"
    ...     )
    ...     new = ft.checkpoint.from_torch(folder + "/model.pt", state, key="model")
    >>> new.params["weight"]
    tensor([[1., 1.]])
    """
    what = "ft.checkpoint.from_torch"
    _check_arguments(like, model, what)
    check_file(path, what)
    named = state_dict(load(path, what), key, str(path), what)
    tensors: dict[str, Found] = {}
    same: dict[tuple[Any, ...], set[str]] = {}
    for name, one in named.items():
        if isinstance(one, Tensor) and one.layout == torch.strided:
            tensors[name] = Found(one.dtype, tuple(one.shape), one.detach)
            if one.numel():
                same.setdefault((one.data_ptr(), one.dtype, one.shape, one.stride()), set()).add(name)
        else:
            tensors[name] = Found(None, (), Tensor)  # never read: extra state, or nothing that a state can have
    file = _File(str(path), tensors, [names for names in same.values() if len(names) > 1])
    return _taken(file, like, _Asked(what, model, rename, strict, cast))


def _taken(file: _File, like: TrainState, asked: _Asked) -> TrainState:
    """Compare, complain, and only then read."""
    what, model, rename, strict, cast = asked
    here = {**like.params, **like.frozen, **like.buffers}
    new_names = renamed(rename, file.tensors, what)
    there = {new: file.tensors[old] for new, old in new_names.items()}
    same = [{new for new, old in new_names.items() if old in group} for group in file.same]
    disagreeing: list[str] = []
    unsaved: set[str] = set()
    if model is not None:
        unsaved, others = _not_of_a_state(model)
        there = {name: one for name, one in there.items() if name not in others}
        there, disagreeing = _under_first_names(there, same, ties(model))
    report = _compare(here, there, same, unsaved, cast=cast, where=(file.path, like.counters().step))
    lines = [*report.differences(), *disagreeing]
    if lines and (strict or disagreeing or not report.taken):
        raise RestoreError(
            explain(
                f"{what}: the file does not fit the state: {len(lines)} difference{'' if len(lines) == 1 else 's'}.",
                where=file.path,
                got="\n".join(lines[:50] + ([f"... {len(lines) - 50} more"] if len(lines) > 50 else [])),
                fix="rename={'head.weight': None}   # leaves one of two that differ out"
                if disagreeing
                else _fix(report, like, model),
            )
        )
    if lines:
        text = f"{what}: {len(report.taken)} tensors of {file.path} were taken, the rest is that of `like`.\n  "
        warnings.warn(text + "\n  ".join(lines), RestoreWarning, stacklevel=3)
    values = {name: _own(there[name].read(), here[name]) for name in report.taken}

    def put(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values.get(name, leaf) for name, leaf in part.items()}

    return like.replace(params=put(like.params), frozen=put(like.frozen), buffers=put(like.buffers))


def _check_arguments(like: TrainState, model: nn.Module | None, what: str) -> None:
    check_state(like, what)
    check_model(model, what)
    if like.step.is_meta:
        raise RestoreError(
            explain(
                f"{what}: `like` is on the meta device: optimizer and counters have no values.",
                fix='ft.init(model, tx, device="cpu")',
            )
        )


def _own(tensor: Tensor, leaf: Tensor) -> Tensor:
    """The numbers in memory of their own: the file may be mapped, and change later."""
    made = torch.empty_like(leaf, requires_grad=False)
    made.copy_(tensor)  # mutates: memory of our own
    return made


def _under_first_names(
    there: Mapping[str, Found], same: Iterable[set[str]], first: Mapping[str, str]
) -> tuple[dict[str, Found], list[str]]:
    """The tensors under those names that the state has for them, and which of the module's ties do not agree in the file."""
    made: dict[str, Found] = {}
    by: dict[str, str] = {}
    disagreeing = []
    for name, one in there.items():
        of = first.get(name, name)
        if of not in made:
            made[of], by[of] = one, name
        elif not any({name, by[of]} <= group for group in same) and not _equal(made[of], one):
            one_name, other = sorted((by[of], name), key=lambda each: each in first)  # the state's own name first
            disagreeing.append(f"{one_name} and {other} are one tensor in the model, and differ in the checkpoint")
    return made, disagreeing


def _equal(a: Found, b: Found) -> bool:
    """Whether two tensors have the same bits."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    one, two = (tensor.read().resolve_conj().resolve_neg().contiguous().reshape(-1) for tensor in (a, b))
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8)) if one.numel() else True


def _compare(
    here: Mapping[str, Tensor],
    there: Mapping[str, Found],
    same: Iterable[set[str]],
    unsaved: set[str],
    *,
    cast: bool,
    where: tuple[str, int],
) -> Report:
    taken, casts = [], []
    shapes: dict[str, tuple[str, str]] = {}
    dtypes: dict[str, tuple[str, str]] = {}
    for name, leaf in here.items():
        if name not in there:
            continue
        dtype, shape, _ = there[name]
        if dtype is not None and shape != tuple(leaf.shape):
            shapes[name] = (str(list(shape)), str(list(leaf.shape)))
        if dtype != leaf.dtype:
            if cast and dtype is not None and (leaf.is_complex() or not dtype.is_complex):
                casts.append(name)
            else:
                dtypes[name] = ("no dense tensor" if dtype is None else dtype_name(dtype), dtype_name(leaf.dtype))
        if name not in shapes and name not in dtypes:
            taken.append(name)
    known = {name for group in same if group & here.keys() for name in group}  # other names of what the state has
    return Report(
        *where,
        taken=tuple(taken),
        missing=tuple(name for name in here if name not in there and name not in unsaved),
        extra=tuple(name for name in there if name not in here and name not in known),
        shapes=shapes,
        dtypes=dtypes,
        cast=tuple(name for name in casts if name in taken),
        kept=tuple(name for name in here if name not in there and name in unsaved),
    )


def _not_of_a_state(model: nn.Module) -> tuple[set[str], set[str]]:
    """The buffers that are not persistent, and the entries of the module's state_dict that are no tensors of a state: extra state."""
    saved = model.state_dict()
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return buffers - saved.keys(), saved.keys() - named - buffers


def _fix(report: Report, like: TrainState, model: nn.Module | None) -> str:
    said = ["strict=False takes what fits; rename= says what is called how"]
    if report.dtypes:
        said.append("cast=True converts dtypes")
    buffers = [name for name in report.missing if name in like.buffers]
    if model is None and (buffers or report.extra):
        said.append("model=model tells of tied tensors, and of buffers that are not saved")
    return "; ".join(said)
