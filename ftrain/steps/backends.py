"""What ftrain knows of the inside of torch.compile: backends, guards worth keeping, compiled programs, graphs to refuse."""

from __future__ import annotations

import difflib
import re
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import rng, tree
from ..errors import CompileError, explain

__all__ = ["Drawn", "Program", "Refused", "check_backend", "checkpoints", "compiler", "programs", "worth_guarding"]


class Program(NamedTuple):
    """One compiled form of a step: its guards, its bytecode, the structure of the states it was made for."""

    check: Callable[[dict[str, Any]], bool]
    run: types.FunctionType
    structure: tree.Structure


class Refused(Exception):
    """A graph that the rung must not compile, with the reason."""


def check_backend(backend: object, mode: str | None, options: dict[str, Any] | None) -> None:
    """Raise where torch has no such backend, or Inductor no such mode or option; names the nearest."""
    if callable(backend):
        return
    names = torch._dynamo.list_backends(exclude_tags=())
    if backend not in names:
        near = difflib.get_close_matches(str(backend), names, 1)
        raise CompileError(
            explain(
                f"ft.compile: there is no backend {backend!r}.",
                expected=", ".join(names),
                fix=f"backend={near[0]!r}" if near else 'backend="inductor"',
            )
        )
    if mode is None and not options:
        return
    inductor = _inductor()
    if mode is not None and mode not in inductor.list_mode_options():
        raise CompileError(
            explain(f"ft.compile: Inductor has no mode {mode!r}.", expected=", ".join(inductor.list_mode_options()))
        )
    known = inductor.list_options() if options else []
    for name in options or {}:
        if name.replace("-", "_") not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise CompileError(
                explain(
                    f"ft.compile: Inductor has no option {name!r}.",
                    fix=f"options={{{near[0]!r}: ...}}" if near else None,
                )
            )


def _inductor() -> Any:
    with warnings.catch_warnings():  # its import warns of a torch.jit function that torch itself uses (2.13)
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._inductor.compile_fx
    return torch._inductor


def programs(fn: types.FunctionType, structure: tree.Structure, known: list[Program]) -> list[Program]:
    """The compiled forms that dynamo keeps for a function, the oldest first; [] where torch does not show them.

    In the order in which they were compiled, not in dynamo's, which has the newest one first. That one, compiled for all sizes after a
    short batch, would take the batches of the usual size as well, and round them otherwise than the first one had; so would the
    result of a run depend on whether, and where, it was resumed, and on what the step was used for before.
    """
    try:
        entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(fn.__code__)
        found = [(entry.guard_manager.check, entry.code) for entry in entries]
    except AttributeError:
        return []
    codes = {code for _, code in found}
    old = [program for program in known if program.run.__code__ in codes]
    new = {code: check for check, code in reversed(found)}
    for program in old:
        del new[program.run.__code__]
    return old + [Program(check, types.FunctionType(code, fn.__globals__), structure) for code, check in new.items()]


def compiler(backend: str | Callable[..., Any], mode: str | None, options: dict[str, Any] | None) -> Callable[..., Any]:
    """The backend as a function `(graph, inputs) -> callable`; imported when first used."""

    def build(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if callable(backend):
            own: Callable[..., Any] = backend(graph, inputs)
            return own
        if backend != "inductor":
            found: Callable[..., Any] = torch._dynamo.lookup_backend(backend)(graph, inputs)
            return found
        inductor = _inductor()
        # The guards have checked sizes and strides of all inputs; the generated code need not check them again (0.4 us a leaf).
        patches = {"size_asserts": False, **(inductor.list_mode_options(mode) if mode else {}), **(options or {})}
        compiled: Any = inductor.compile_fx.compile_fx(graph, inputs, config_patches=patches)
        return compiled  # type: ignore[no-any-return]  # a function, for a graph that is not exported

    return build


_LIBRARY = ("__import_ftrain_", "__import_torch_", "__import_optree", "__builtins_dict__")
_STRUCTURAL = ("EMPTY_NN_MODULE_HOOKS_DICT", "NOT_PRESENT_IN_GENERIC_DICT", "DUPLICATE_INPUT")
_SLOTS = re.compile(
    r"\.(param_slots|buffer_slots|param_names|buffer_names|names|shapes|modules)(\[[^]]*\])*$|\._(parameters|buffers|modules)$"
)
_DICTS = re.compile(r"\._(parameters|buffers)\[[^]]*\]$")
_MODES = re.compile(r"\.modules\[\d+\]\.training$")  # put back at the end of each call
_SUBMODULE = re.compile(r"\._modules\['[^']*'\]")


def worth_guarding(own_names: set[str]) -> Callable[[Any], list[bool]]:
    """Which of dynamo's guards to keep: those on the state, the batch, and what a user can change between two calls.

    Left out are guards on the code of torch, optree and ftrain itself, and on the structure of the private copy of the module,
    which nobody else holds. Values in it (an attribute that the forward pass changes) stay guarded.

    Args:
        own_names: the globals of the traced function that are ftrain's.
    """

    def keep(name: str, kind: str, value: object) -> bool:
        if not name or name.startswith(("state", "batch", "L[")):
            return True
        if any(mark in name for mark in _LIBRARY) or name.startswith(("type(", "dict(type(")):
            return False
        if name.startswith("G['") and name[3:].partition("'")[0] in own_names:
            return False
        if kind == "DUPLICATE_INPUT":
            return False
        if ".skeleton" in name:
            private = kind in _STRUCTURAL or isinstance(value, torch.nn.Module)
            inner = _SUBMODULE.sub("", name)
            return not (private or _SLOTS.search(inner) or _DICTS.search(inner) or _MODES.search(inner))
        return True

    return lambda entries: [keep(e.name, e.guard_type, e.value if e.has_value else None) for e in entries]


def checkpoints(graph: torch.fx.GraphModule) -> bool:
    """Whether a graph has a region of activation checkpointing."""
    nodes = (
        node for module in graph.modules() if isinstance(module, torch.fx.GraphModule) for node in module.graph.nodes
    )
    return any(node.op == "call_function" and "checkpoint" in getattr(node.target, "__name__", "") for node in nodes)


class Drawn:
    """Whether the default generators have been drawn from since this was made."""

    def __init__(self, device: torch.device) -> None:
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            self.generators.append(rng._generator(device))
        self.states = [generator.get_state() for generator in self.generators]

    def anything(self) -> bool:
        return any(
            not torch.equal(was, generator.get_state())
            for was, generator in zip(self.states, self.generators, strict=True)
        )
