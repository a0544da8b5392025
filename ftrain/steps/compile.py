"""`compile`: the one place where a step becomes a program, and the one place where memory is reused.

Laws
----
- A compiled step computes what the step computes (up to the backend's rounding).
- Without donation the input state keeps its values. With donation the returned state lies in the input's memory, and the input
  raises as soon as it is touched.
- One program for a step, at most one more for a short last batch, none after that; each further one is a warning that names
  the leaf that changed.

The ladder, from fast to slow: the **step** (loss, gradient and update in one graph), the **loss** and the update compiled apart
with the gradient taken outside, **eager**. `rung="auto"` takes the highest that works for the model.

How a call is dispatched: dynamo traces the step once and keeps, per program, guards and bytecode. Calling those two directly
(`check` and `run` of a `Program`) does what `torch.compile`'s own entry does with a third less overhead per call; where
torch does not show them, its own entry is used.
"""

from __future__ import annotations

import functools
import itertools
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import rng, tree
from ..errors import CompileError, CompileWarning, FtrainError, RecompileWarning, StructureError, explain
from ..metrics import Collect, Metric, normalise
from ..state import TrainState, check_state
from ..types import Batch
from .backends import Drawn, Program, Refused, check_backend, checkpoints, compiler, programs, worth_guarding
from .calls import check_batch, seeded_by
from .changes import NO_COMPILER, Recompile, difference, doubt, first_line, innermost, signature
from .donation import carry, consume, overwrite
from .packed import Packed
from .regions import using
from .rehearsal import Shapes, imitate, shapes
from .watching import WATCHER
from .wrap import check_level

__all__ = ["CompiledStep", "Recompile", "Rung", "compile", "pieces"]

Rung = Literal["step", "loss", "eager"]


class _Foreign(Exception):
    """A graph has inputs with a gradient that are not the state's: the outer model's, by mistake, or a teacher's."""


_NAMES = {
    "step": "the whole step in one graph",
    "loss": "loss and update compiled apart, the gradient outside",
    "eager": "eager, nothing compiled",
}
_serial = itertools.count()
_ONCE: set[str] = set()  # reasons that are not said twice in a process


def compile(
    step: Callable[[TrainState, Batch], Any],
    *,
    donate: bool = True,
    rung: Literal["auto", "step", "loss", "eager"] = "auto",
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
) -> CompiledStep:
    """Make a step fast: compile it with `torch.compile`, in the largest piece that works for its model.

    Args:
        step: `(state, batch) -> (state, metrics)`, or a step that only reads the state (`ft.eval_step`, `ft.predict_step`).
        donate: let the new state take over the memory of the old one, which is then gone: touching it raises. Halves the
            memory of a step at no cost in time.
        rung: `"auto"` takes the highest rung that works and warns once where that is not the whole step; `"step"` and
            `"loss"` raise instead; `"eager"` compiles nothing (and still donates).
        backend: a backend of `torch.compile`: `"inductor"`, `"aot_eager"`, `"eager"`, or a function.
        mode: Inductor's mode, e.g. `"max-autotune"`.
        options: Inductor's options.
        dynamic: as in `torch.compile`; None compiles for the first shapes and, once, for all others.

    Returns:
        A `CompiledStep`: called like `step`; `.rung`, `.reason`, `.compiles` and `.recompiles` tell what happened.

    Raises:
        CompileError: an unknown option, or (with a rung named) a step that does not compile.
        DonatedStateError: when called with a state whose memory is gone.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> fast = ft.compile(step, backend="eager")
    >>> state = ft.init(model, tx, seed=0)
    >>> new, metrics = fast(state, torch.ones(8, 2))
    >>> new, fast.rung, fast.compiles
    (TrainState(step=1, epoch=0, samples=8, seed=0, on cpu)
      params   2 tensors, 3 numbers, 12 B (float32)
      opt      2 tensors, 2 numbers, 12 B (float32, int64), 'step', 1)
    >>> state.params  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    ftrain.errors.DonatedStateError: reading state.params of a state whose memory was given to a compiled step at step 0.
    """
    if isinstance(step, CompiledStep):
        raise CompileError(
            explain("ft.compile: this step is compiled already.", got=repr(step), fix="ft.compile(step.step, ...)")
        )
    if not callable(step):
        raise CompileError(explain("ft.compile wants a step.", expected="a function", got=type(step).__name__))
    check_level(step, "step", "ft.compile")
    if rung != "auto" and rung not in get_args(Rung):
        raise CompileError(explain(f"ft.compile: unknown rung {rung!r}.", expected="auto, step, loss or eager"))
    if (mode or options) and backend != "inductor":
        raise CompileError(
            explain(
                "ft.compile: mode= and options= are Inductor's.", got=f"backend={backend!r}", fix='backend="inductor"'
            )
        )
    if rung != "eager":
        check_backend(backend, mode, options)
    several = getattr(step, "compiled", None)
    if several is not None:  # a choice of steps (ft.auto_accumulate), each of which is compiled for itself
        one = functools.partial(
            compile, donate=donate, rung=rung, backend=backend, mode=mode, options=options, dynamic=dynamic
        )
        made: CompiledStep = several(one)
        return made
    return CompiledStep(step, donate=donate, rung=rung, compiler=compiler(backend, mode, options), dynamic=dynamic)


class CompiledStep:
    """A step as a program. Made by `ftrain.compile`, called like the step.

    Attributes:
        step: the step itself.
        donate: whether the input's memory is reused.
        rung: `"step"`, `"loss"` or `"eager"`; None before the first call.
        reason: why a higher rung was not taken, or None.
        compiles: how many graphs were compiled.
        recompiles: a `Recompile` for each one after the first.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> fast, state = ft.compile(step, backend="eager"), ft.init(model, tx)
    >>> for rows in (4, 4, 3):
    ...     state, metrics = fast(state, torch.ones(rows, 1))
    >>> fast.compiles, fast.recompiles[0].leaf
    (2, 'batch')
    """

    def __init__(
        self,
        step: Callable[[TrainState, Batch], Any],
        *,
        donate: bool,
        rung: str,
        compiler: Callable[..., Any],
        dynamic: bool | None,
    ) -> None:
        self.step = step
        self.donate = donate
        self.requested = rung
        self.rung: Rung | None = None
        self.reason: str | None = None
        self.compiles = 0
        self.recompiles: list[Recompile] = []
        self.advances = bool(getattr(step, "advances", False))
        self._compiler = compiler
        self._dynamic = dynamic
        self._calls = 0
        # Whether some program draws random numbers: then the generators are seeded before each call.
        self._random = False
        self._programs: list[Program] = []
        self._signatures: list[dict[str, str]] = []
        self._parts: dict[tuple[int, str], Any] = {}
        self._whole_fn: Callable[..., Any] | None = None
        self._compiled_now = False
        self._complained = False
        self._shapes: list[Shapes] = []  # of the batches for which something was compiled, in order
        self._rehearsal: list[Shapes] = []
        self._foreign = _LEAVES_OUTSIDE  # whether inputs with a gradient are known to be no mistake

    def __repr__(self) -> str:
        return f"compile({self.step!r}, donate={self.donate}, rung={self.rung or self.requested!r})"

    def init(self, state: TrainState) -> TrainState:
        """The state with the sub-states that the step's wrappers need, as the step itself gives it."""
        own = getattr(self.step, "init", None)
        return state if own is None else own(state)

    def shapes(self) -> list[Shapes]:
        """For which batches something was compiled, in order, as JSON: a `[dtype, [dimensions]]` for each leaf."""
        return self._shapes or self._rehearsal

    def rehearse(self, shapes: list[Shapes]) -> None:
        """Compile, at the first call, for batches of these shapes first; has no effect where something is compiled already.

        A process that goes on with another's run so gets the same programs, and the same numbers to the last bit.
        """
        self._rehearsal = shapes

    def plainly(self, state: TrainState, batch: Batch) -> Any:
        """What the step gives, with nothing compiled and nothing donated; the programs that there are stay as they are."""
        check_state(state, "a step")
        check_batch(batch, state.device)
        with seeded_by(state):
            out = self.step(state, batch)
        return _check_step_result(state, out) if _is_step_result(out) else out

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self(state, batch)
        watcher = WATCHER.get()
        if watcher is not None:
            return watcher(self, state, batch)
        if self._programs:  # the way of every call but the first ones
            given = _as_leaves(state) if _LEAVES_OUTSIDE else state
            for program in self._programs:
                if program.check({"state": given, "batch": batch}) and state.step._version == state._version:
                    self._calls += 1
                    try:
                        if self._random:
                            with seeded_by(state):
                                out = program.run(given, batch)
                        else:
                            out = program.run(given, batch)
                    except BaseException:
                        if self.donate:  # stopped half-way: what its memory holds is not to be trusted any more
                            consume(state)
                        raise
                    return self._finish(state, batch, out, program.structure)
        return self._slow(state, batch)

    def _finish(self, state: TrainState, batch: Batch, out: tuple[Any, Any], structure: tree.Structure) -> Any:
        leaves, rest = out
        if leaves is None:
            return rest
        if type(rest) is tuple:
            rest = Packed(*rest)
        if not self.donate:
            new: TrainState = tree.unflatten(structure, leaves)
            carry(state.__dict__, new, batch, self.advances and self._random)
            return new, rest
        new = object.__new__(TrainState)
        own = consume(state)
        new.__dict__.update(own)
        new.__dict__["_version"] = new.step._version
        new.__dict__.pop("_host", None)
        carry(own, new, batch, self.advances and self._random)
        return new, rest

    def _slow(self, state: TrainState, batch: Batch) -> Any:
        """First call, changed input, bad input, or a lower rung."""
        check_state(state, "a compiled step")
        check_batch(batch, state.device)
        check = getattr(self.step, "check", None)
        if check is not None:
            check(state, batch)
        if self._rehearsal and not self._calls and self._rehearsal[0] != shapes(batch):
            self._rehearse(state, batch)
        self._calls += 1
        before = self.compiles
        try:
            return self._at_a_rung(state, batch)
        finally:
            if self.compiles > before:
                self._shapes.append(shapes(batch))

    def _rehearse(self, state: TrainState, batch: Batch) -> None:
        wanted, self._rehearsal = self._rehearsal, []
        for one in wanted:
            zeros = imitate(batch, one)
            if zeros is not None:
                # What the user's code draws outside of torch belongs to the run, not to this.
                with rng.Isolated(0):
                    self(state.copy(), zeros)

    def _at_a_rung(self, state: TrainState, batch: Batch) -> Any:
        if "_at" not in state.__dict__ and type(state.step) is Tensor and not state.step.is_meta:
            state.__dict__["_at"] = state.counters().step
        if self.rung is None:
            return self._descend(state, batch)
        if self.rung == "step":
            return self._again(state, batch)
        return self._parted(state, batch, self.rung)

    # -- the ladder -------------------------------------------------------------------------------------------------------

    def _descend(self, state: TrainState, batch: Batch) -> Any:
        rungs: tuple[Rung, ...] = get_args(Rung) if self.requested == "auto" else (self.requested,)
        reasons: list[str] = []
        first = signature(state, batch)
        for rung in rungs:
            self._compiled_now = False
            try:
                out = self._rung(state, batch, rung)
            except Exception as error:
                if rung == "eager" or (rung == "step" and self._compiled_now) or isinstance(error, FtrainError):
                    raise
                self._forget()
                reasons.append(first_line(error))
                if self.requested != "auto":
                    self._diagnose(state, batch)
                    raise CompileError(
                        explain(
                            f"ft.compile: the step does not compile as {_NAMES[rung]}.",
                            got=reasons[0],
                            fix='ft.compile(step)   # rung="auto" takes the highest rung that works',
                        )
                    ) from error
                continue
            self.rung = rung
            self._signatures = [first]
            if reasons:
                self.reason = NO_COMPILER if NO_COMPILER in reasons else "; ".join(dict.fromkeys(reasons))
                if self.reason in _ONCE:  # the machine's fault: said for the first step, not again for each evaluator
                    return out
                if self.reason == NO_COMPILER:
                    _ONCE.add(self.reason)
                warnings.warn(
                    f"ft.compile runs {_NAMES[rung]}, not {_NAMES['step']}: {self.reason}", CompileWarning, stacklevel=4
                )
            return out
        raise AssertionError("the last rung either returns or raises")

    def _rung(self, state: TrainState, batch: Batch, rung: Rung) -> Any:
        if rung != "step":
            return self._parted(state, batch, rung)
        try:
            return self._whole(state, batch)
        except Exception as error:
            if self._foreign or not isinstance(innermost(error), _Foreign):
                raise
        self._diagnose(state, batch)  # which raises where they are the outer model's
        self._foreign = True
        self._whole_fn = None
        return self._whole(state, batch)

    def _diagnose(self, state: TrainState, batch: Batch) -> None:
        """Let the step itself say what is wrong, where the trace only knows that something is."""
        new = self.step(state, batch)
        if _is_step_result(new):
            _check_step_result(state, new)

    def _whole(self, state: TrainState, batch: Batch) -> Any:
        """Compile the whole step for these inputs, and run it."""
        if self._whole_fn is None:
            fn = _fresh(_program, _step_=self.step, _donate_=self.donate)
            self._whole_fn = torch.compile(
                fn,
                backend=functools.partial(_backend_of, weakref.ref(self), True),
                fullgraph=True,
                dynamic=self._dynamic,
                options={"guard_filter_fn": worth_guarding(set(globals()))},
            )
            self._code = fn
        structure = tree.structure(state)
        with _tracing(), torch.enable_grad():
            before = self.compiles
            with seeded_by(state):
                drawn = Drawn(state.device)
                try:
                    out = self._whole_fn(_as_leaves(state) if _LEAVES_OUTSIDE else state, batch)
                except BaseException:
                    if self.donate and self._compiled_now:
                        consume(state)
                    raise
                self._random = drawn.anything() or self._random
        if self.compiles > before:
            self._programs = programs(self._code, structure, self._programs)
        return self._finish(state, batch, out, structure)

    def _again(self, state: TrainState, batch: Batch) -> Any:
        """The whole step is compiled, but not for these inputs."""
        before = self.compiles
        known, now = list(self._signatures), signature(state, batch)
        doubts = [doubt(program, _as_leaves(state) if _LEAVES_OUTSIDE else state, batch) for program in self._programs]
        self._compiled_now = False
        call = self._calls
        try:
            out = self._whole(state, batch)
        except Exception as error:
            if self._compiled_now or isinstance(error, FtrainError):
                raise
            self._diagnose(state, batch)
            if not self._complained:
                self._complained = True
                warnings.warn(f"ft.compile runs this batch eagerly: {first_line(error)}", CompileWarning, stacklevel=4)
            return self._parted(state, batch, "eager")
        if self.compiles > before:
            self._signatures.append(now)
            self._report(difference(call, known, now, doubts))
        return out

    def _report(self, found: Recompile) -> None:
        expected = found.short_batch and not any(r.short_batch for r in self.recompiles)
        self.recompiles.append(found)
        if not expected:
            warnings.warn(
                f"ft.compile compiled the step again at call {found.call}: {found.leaf} changed from {found.before} "
                f"to {found.after}",
                RecompileWarning,
                stacklevel=5,
            )

    def _parted(self, state: TrainState, batch: Batch, rung: Rung) -> Any:
        """Run the step itself, with its regions compiled (`"loss"`) or not (`"eager"`)."""
        with seeded_by(state):
            if rung == "loss":
                with using(self._part):
                    out = self.step(state, batch)
                if not self._parts:
                    raise Refused("the step has no parts that can be compiled alone")
                if not self.compiles:
                    raise Refused("no part of the step compiles")
            else:
                out = self.step(state, batch)
        if not _is_step_result(out):
            return out
        new, metrics = _check_step_result(state, out)
        if self.donate:
            new = overwrite(state, new)
        return new, metrics

    def _part(self, owner: object, fn: Callable[..., Any], needed: bool) -> Callable[..., Any]:
        """The compiled form of a region of the step; one that is not needed runs as it is where it does not compile."""
        name = (id(owner), fn.__name__)
        if name not in self._parts:
            part = torch.compile(
                _fresh(_region, _fn_=fn),
                backend=functools.partial(_backend_of, weakref.ref(self), False),
                fullgraph=True,
                dynamic=self._dynamic,
            )

            def run(*args: Any) -> Any:
                before = self.compiles
                try:
                    with _tracing():
                        return part(*args)
                except Exception as error:
                    if needed or self.compiles > before or isinstance(error, FtrainError):
                        raise
                    self._parts[name] = fn  # an optimizer that reads values on the host, say
                    return fn(*args)

            self._parts[name] = run
        return self._parts[name]  # type: ignore[no-any-return]  # what was stored above

    def _backend(self, whole: bool, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if whole and not self._foreign and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            raise _Foreign("the step reads tensors with a gradient that are not in the state")
        if whole and checkpoints(graph):
            # 2.11 drops the recomputation silently, 2.13 refuses random operations in it (SDPA counts as one).
            raise Refused("the model uses activation checkpointing, which one graph would not recompute")
        # AOTAutograd cannot differentiate oneDNN's LSTM, whose backward wants a workspace that tracing does not make ("got None
        # ... for argument 'workspace'", 2.13); without oneDNN an LSTM is traced as the matrix products that it is.
        recurrent = any(getattr(node.target, "__name__", "") == "lstm" for node in graph.graph.nodes)
        # None leaves the other flags alone: their defaults are not what they are (2.13 warns of TF32).
        flags = functools.partial(torch.backends.mkldnn.flags, deterministic=None, allow_tf32=None, fp32_precision=None)
        # By its context: where torch's flags are frozen (importing torch.testing._internal does that) they cannot be assigned to.
        without = flags(enabled=False) if recurrent and torch._C._get_mkldnn_enabled() else nullcontext()
        with without:
            compiled: Callable[..., Any] = self._compiler(graph, inputs)
        self.compiles += 1
        self._compiled_now = True
        return compiled

    def _forget(self) -> None:
        """A rung failed: nothing of it stays."""
        self.compiles = 0
        self._programs, self._parts, self._whole_fn = [], {}, None


# -- what is traced ---------------------------------------------------------------------------------------------------------
# These two are templates: `_fresh` gives each compiled step a copy with a code object and globals of its own, since dynamo counts
# its limit of recompilations per code object, and all steps of a session would share one.


def _program(state: TrainState, batch: Batch) -> tuple[Any, Any]:
    out = _step_(state, batch)  # type: ignore[name-defined]  # noqa: F821 - a global of the copy
    if not _is_step_result(out):
        return None, out
    new, metrics = out
    old_leaves, new_leaves = tree.leaves(state), tree.leaves(new)
    if not (tree.same_structure(state, new) and all(_alike(a, b) for a, b in zip(old_leaves, new_leaves, strict=True))):
        raise StructureError("the step returned a state that is not like the one it was given.")
    named = _pack(normalise(metrics, None, "the metrics that the step returned"))
    if not _donate_:  # type: ignore[name-defined]  # noqa: F821
        return new_leaves, named
    # All new values stand before the first is written: a new leaf may be, or may look into, another old one.
    values = [n if n is o else n.clone() for o, n in zip(old_leaves, new_leaves, strict=True)]
    with torch.no_grad():
        for o, value in zip(old_leaves, values, strict=True):
            if value is not o:
                _row(o).copy_(_row(value))  # mutates: donation, the new state takes over the memory of the old one
    return (), named


def _row(leaf: Tensor) -> Tensor:
    """A 0-d tensor as a vector: AOTAutograd (2.13) loses what is written into a 0-d float64 input on a CPU, but not through a view."""
    return leaf.unsqueeze(0) if leaf.ndim == 0 else leaf


def _pack(named: dict[str, Metric]) -> Any:
    """The metrics as names, kinds and one vector where all their fields are scalars of one dtype; else as they are."""
    found = tree.leaves(named)
    plain = all(isinstance(one, Tensor) and one.ndim == 0 and one.dtype == found[0].dtype for one in found)
    if not found or not plain or any(isinstance(metric, Collect) for metric in named.values()):
        return named
    flat = [getattr(metric, name) for metric in named.values() for name in tree.fields(type(metric))]
    return (*named,), (*[type(metric) for metric in named.values()],), torch.stack(flat)


def _backend_of(owner: Any, whole: bool, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The backend of a compiled step. Bound weakly: dynamo keeps each backend that it has seen for ever."""
    found: Callable[..., Any] = owner()._backend(whole, graph, inputs)
    return found


@contextmanager
def _tracing() -> Iterator[None]:
    """What a trace needs, for the time of a compilation."""
    with warnings.catch_warnings(), torch._dynamo.config.patch(trace_autograd_ops=True, allow_rnn=True):
        # dynamo (2.13) makes an instance of each autograd.Function that it traces, and so warns of itself.
        warnings.filterwarnings("ignore", message=".*should not be instantiated", category=DeprecationWarning)
        yield


def _region(*args: Any) -> Any:
    return _fn_(*args)  # type: ignore[name-defined]  # noqa: F821 - a global of the copy


def _fresh(template: Any, **globals_: Any) -> types.FunctionType:
    code = template.__code__.replace(co_name=f"{template.__name__}_{next(_serial)}")
    return types.FunctionType(code, {**globals(), **globals_})


def _is_step_result(out: Any) -> bool:
    return isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)


def _alike(a: Any, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _check_step_result(state: TrainState, out: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
    new, metrics = out
    # What the step handed on as it was is not looked at: the memory of hooks, say, of which most steps know nothing.
    if new is not state and not (
        tree.same_structure(state, new)
        and all(a is b or _alike(a, b) for a, b in zip(tree.leaves(state), tree.leaves(new), strict=True))
    ):
        tree.check_same(
            state,
            new,
            root="state",
            what="the step returned a state that is not like the one it was given.",
            fix="state.replace(params=...)   # with leaves of the same structure, shape, dtype and device",
        )
    return new, normalise(metrics, None, "the metrics that the step returned")


# torch before 2.13 cannot make the leaves of a gradient inside a graph ("Unsupported Tensor.requires_grad_() call"): there they come
# in from outside, at a microsecond for each parameter and call.
_LEAVES_OUTSIDE = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13)


def _as_leaves(state: TrainState) -> TrainState:
    if not isinstance(state, TrainState) or "params" not in state.__dict__:
        return state
    return state.replace(params={name: p.detach().requires_grad_() for name, p in state.params.items()})


# -- what it would be cut into ----------------------------------------------------------------------------------------------


def pieces(step: Callable[[TrainState, Batch], Any], state: TrainState, batch: Batch) -> list[torch.fx.GraphModule]:
    """Run a step with the graphs that `torch.compile` makes of it where it may break off; give them, with why each one ended.

    (`torch._dynamo.explain` tells the same, but throws away whatever else is compiled in the process.)

    >>> import torch, ftrain as ft
    >>> from ftrain.steps.compile import pieces
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).mean(), tx)
    >>> len(pieces(step, ft.init(model, tx), torch.ones(4, 2)))
    1
    """
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    # Each call is a program more for the user's functions in which it breaks off: no reason to stop tracing them.
    with _tracing(), torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10000):
        torch.compile(_fresh(_region, _fn_=step), backend=keep)(state, batch)
    return found
