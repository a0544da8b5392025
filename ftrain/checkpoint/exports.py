"""Parameters in the formats of others: safetensors, and a state dict for `torch.load(weights_only=True)`.

Laws
----
- `model.load_state_dict(torch.load(path, weights_only=True))` and `safetensors.torch.load_model(model, path)` work in plain torch,
  `strict`, on what was exported with `model=`.
- Every number is written bit for bit, and `from_torch` and `from_safetensors` give them back.
- A file is replaced as a whole or not at all.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError, explain
from ..state import TrainState, check_state
from .atomic import replacing
from .names import check_model, state_dict, ties
from .safefile import Spec, order, write
from .streaming import Stored

__all__ = ["to_safetensors", "to_torch"]

Path = str | os.PathLike[str]


def to_safetensors(
    path: Path,
    state: TrainState | Path,
    *,
    step: int | str = "latest",
    model: nn.Module | None = None,
    params: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state's parameters (trained and frozen) and buffers to a safetensors file, under the names of the module.

    The file takes its name when it is complete and on the disk. One tensor at a time is in host memory.

    Args:
        path: of the file.
        state: a state, or the folder of its checkpoints, which needs no model and little memory.
        step: of the checkpoints, which: its number or `"latest"`.
        model: the module from which the state was made; not changed. With it the file is what `safetensors.torch.save_model` would
            write of that module: buffers that are not persistent are left out, and of the names of one tensor the first of the
            alphabet is written, the others are noted in the metadata. Without it all of the state is written, under its own names.
        params: the name of averaged parameters to export in the place of the parameters, e.g. `"ema"`.
        metadata: texts to write beside them.

    Raises:
        CheckpointError: it cannot be written (the file that was there before is as it was); a dtype that the format lacks (complex128);
            no such checkpoint.
        StateError: the state has no such average.
        StructureError: the state belongs to another model.

    >>> import tempfile, safetensors.torch, torch, ftrain as ft
    >>> model = torch.nn.Linear(3, 2)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ft.checkpoint.to_safetensors(folder + "/model.safetensors", state, model=model)
    ...     safetensors.torch.load_model(
    ...         model, folder + "/model.safetensors"
    ...     )  # plain torch; missing and unexpected names
    (set(), [])
    """
    what = "ft.checkpoint.to_safetensors"
    check_model(model, what)
    notes = _check_metadata(metadata, what)
    if isinstance(state, (str, os.PathLike)):
        with Stored(state, step, params, what) as stored:
            specs, shared = _without_ties(stored.specs(model), model)
            write_all(path, specs, stored.tensors(order(specs)), {**notes, **shared}, what)
        return
    _check_step(step, what)
    tensors = state_dict(check_state(state, what), model, params, what)
    strange = [name for name, one in tensors.items() if not isinstance(one, Tensor)]
    if strange:
        raise CheckpointError(
            explain(
                f"{what}: the module's state_dict has an entry that is no tensor.",
                where=strange[0],
                expected="tensors alone",
                got=type(tensors[strange[0]]).__name__,
                cause="a module with get_extra_state",
                fix="ft.checkpoint.to_torch(path, state, model=model)",
            )
        )
    kept, shared = _without_ties(tensors, model)
    specs = {name: Spec(one.dtype, tuple(one.shape)) for name, one in kept.items()}
    write_all(path, specs, ((name, _plain(kept[name])) for name in order(specs)), {**notes, **shared}, what)


def to_torch(
    path: Path,
    state: TrainState | Path,
    *,
    step: int | str = "latest",
    model: nn.Module | None = None,
    params: str | None = None,
) -> None:
    """Write a state's parameters (trained and frozen) and buffers as a state dict, for `torch.load(path, weights_only=True)`.

    The file takes its name when it is complete and on the disk. All tensors are written as of the CPU, each as large as it is, whatever
    memory it is a part of.

    Args:
        path: of the file.
        state: a state, or the folder of its checkpoints.
        step: of the checkpoints, which: its number or `"latest"`.
        model: the module from which the state was made; not changed. With it the file holds the module's own `state_dict()`: tied
            tensors under all of their names (sharing memory), buffers that are not persistent left out, and extra state as the module
            has it now. Without it all of the state is written, under its own names.
        params: the name of averaged parameters to export in the place of the parameters, e.g. `"ema"`.

    Raises:
        CheckpointError: it cannot be written (the file that was there before is as it was); no such checkpoint; extra state that
            `torch.load(weights_only=True)` would refuse.
        StateError: the state has no such average.
        StructureError: the state belongs to another model.

    >>> import tempfile, torch, ftrain as ft
    >>> model = torch.nn.Linear(3, 2)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ft.checkpoint.to_torch(folder + "/model.pt", state, model=model)
    ...     model.load_state_dict(torch.load(folder + "/model.pt", weights_only=True))  # plain torch
    <All keys matched successfully>
    """
    what = "ft.checkpoint.to_torch"
    check_model(model, what)
    if isinstance(state, (str, os.PathLike)):
        with Stored(state, step, params, what) as stored:
            named = _stored_dict(stored, model)
    else:
        _check_step(step, what)
        named = state_dict(check_state(state, what), model, params, what)
    first = {} if model is None else ties(model)
    made: dict[str, Any] = {}
    for name, one in named.items():
        if isinstance(one, Tensor):
            of = first.get(name, name)
            if of not in made:
                # Of its own, since torch.save writes the whole memory that a tensor is a part of.
                plain = _plain(one)
                made[of] = plain.clone() if _is_part(plain) else plain
        else:
            _check_extra(one, name, what)
    memory: set[int] = set()
    for name, one in made.items():
        if (
            one.numel() and one.untyped_storage().data_ptr() in memory
        ):  # two leaves in one memory, which the module does not tie
            made[name] = one.clone()
        memory.add(one.untyped_storage().data_ptr())
    out = OrderedDict(
        (name, made[first.get(name, name)] if isinstance(one, Tensor) else one) for name, one in named.items()
    )
    if hasattr(named, "_metadata"):
        out._metadata = named._metadata  # type: ignore[attr-defined]  # the versions of modules, which load_state_dict reads
    with replacing(path, what) as file:
        torch.save(out, file)


def _stored_dict(stored: Stored, model: nn.Module | None) -> dict[str, Any]:
    """What `state_dict` gives for a state, of a checkpoint: with a module all that its `state_dict()` has, and the numbers read."""
    tensors = dict(stored.tensors(list(stored.specs(model))))
    if model is None:
        return tensors
    found: dict[str, Any] = model.state_dict()
    for name in found.keys() & tensors.keys():
        found[name] = tensors[name]
    return found


def write_all(
    path: Path, specs: Mapping[str, Spec], tensors: Iterator[tuple[str, Tensor]], metadata: Mapping[str, str], what: str
) -> None:
    """A safetensors file, as a whole or not at all."""
    with replacing(path, what) as file:
        write(file, specs, tensors, metadata, what)


def _without_ties(tensors: Mapping[str, Any], model: nn.Module | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Each tensor under one name, and `{other name: that one}`; by the rule of `safetensors.torch.save_model`."""
    if model is None:
        return dict(tensors), {}
    groups: dict[str, list[str]] = {}
    first = ties(model)
    for name in tensors:
        groups.setdefault(first.get(name, name), []).append(name)
    chosen = {min(names): sorted(names)[1:] for names in groups.values()}
    shared = {other: name for name, others in chosen.items() for other in others}
    return {name: one for name, one in tensors.items() if name in chosen}, shared


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, and nothing but numbers."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()  # sync: a file is written from host memory


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _check_metadata(metadata: Mapping[str, str] | None, what: str) -> dict[str, str]:
    texts = {} if metadata is None else dict(metadata)
    for key, text in texts.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ArgumentError(
                explain(
                    f"{what}: metadata= holds something else than texts.",
                    where=f"metadata[{key!r}]",
                    expected="a str",
                    got=repr(text),
                    fix="json.dumps(...)   # of what is more than a text",
                )
            )
    return texts


def _check_step(step: int | str, what: str) -> None:
    if step != "latest":
        raise ArgumentError(
            explain(
                f"{what}: step= is about a folder of checkpoints.",
                expected="a folder with it",
                got=f"a state, and step={step!r}",
                fix=f'{what}(path, "run/ckpt", step={step!r})',
            )
        )


def _check_extra(value: Any, path: str, what: str) -> None:
    """Raise unless torch.load reads it with weights_only."""
    if value is None or type(value) in (bool, int, float, str, Tensor, nn.Parameter):
        return
    if type(value) in (list, tuple, dict, OrderedDict):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            _check_extra(one, f"{path}[{key!r}]", what)
        return
    raise CheckpointError(
        explain(
            f"{what}: the module's extra state holds what torch.load(weights_only=True) would refuse.",
            where=path,
            expected="tensors, numbers, texts, and lists and dicts of them",
            got=type(value).__name__,
        )
    )
