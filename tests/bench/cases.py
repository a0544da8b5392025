"""The contenders: the same model, batches and AdamW, trained in different ways.

Each takes the batches in turn from one list, and goes on where it stood in the round before.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rounds import Contender
from torch import Tensor, nn

import ftrain as ft

LR, B1, B2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2

Batch = dict[str, Tensor]


class Problem(NamedTuple):
    """What is trained."""

    name: str
    sizes: tuple[int, ...]
    batch: int
    batches: list[Batch]
    device: str

    @classmethod
    def make(cls, name: str, sizes: tuple[int, ...], batch: int, count: int, device: str = "cpu") -> Problem:
        draw = torch.Generator().manual_seed(0)
        batches = [
            {
                "x": torch.randn(batch, sizes[0], generator=draw).to(device),
                "y": torch.randint(0, sizes[-1], (batch,), generator=draw).to(device),
            }
            for _ in range(count)
        ]
        return cls(name, sizes, batch, batches, device)

    def model(self, dropout: float = 0.0) -> nn.Sequential:
        """An MLP with ReLU between its layers; the same numbers each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for i, o in itertools.pairwise(self.sizes):
                layers += [nn.Linear(i, o), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
            while not isinstance(layers[-1], nn.Linear):
                layers.pop()
            return nn.Sequential(*layers).to(self.device)

    def parameters(self) -> int:
        return sum(i * o + o for i, o in itertools.pairwise(self.sizes))

    def forever(self) -> Iterator[Batch]:
        return itertools.cycle(self.batches)


def small(device: str = "cpu") -> Problem:
    """The small MLP of DESIGN.md, where a step is nearly all overhead."""
    return Problem.make("small MLP", (32, 32, 32, 10), batch=16, count=500, device=device)


def large(device: str = "cpu") -> Problem:
    """An MLP of 24 M parameters, where a step is nearly all arithmetic and memory."""
    return Problem.make("24 M MLP", (1536, 2048, 2048, 2048, 2048, 2048, 2048, 10), batch=32, count=4, device=device)


# ---------------------------------------------------------------------------------------------------- written by hand


def hand_eager(problem: Problem, *, compiled: bool = False) -> Callable[[int], object]:
    """The loop that everybody writes, with the fastest optimizer that torch has."""
    module = problem.model()
    model = torch.compile(module) if compiled else module
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=(B1, B2), eps=EPS, weight_decay=DECAY, fused=True)
    batches = problem.forever()

    def run(steps: int) -> None:
        for batch in itertools.islice(batches, steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
            loss.backward()
            optimizer.step()

    run.params = lambda: list(module.parameters())  # type: ignore[attr-defined]
    return run


def hand_graph(problem: Problem) -> Callable[[int], object]:
    """What `ft.compile` makes, without ftrain: one compiled function of lists of tensors, each overwritten by its new value."""
    model = problem.model()
    names = [name for name, _ in model.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in model.parameters()]  # torch 2.11 wants leaves made outside
    mu = [torch.zeros_like(p, requires_grad=False) for p in params]
    nu = [torch.zeros_like(p, requires_grad=False) for p in params]
    count, step, samples = (torch.zeros((), dtype=torch.int64, device=problem.device) for _ in range(3))
    skeleton = problem.model().to("meta")

    def whole(params: list[Tensor], mu: list[Tensor], nu: list[Tensor], counts: list[Tensor], batch: Batch) -> Tensor:
        x, y = batch["x"], batch["y"]
        loss = F.cross_entropy(torch.func.functional_call(skeleton, dict(zip(names, params, strict=True)), (x,)), y)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            count, step, samples = counts
            t = (count + 1).to(torch.float64)
            root2 = (1.0 - B2**t).sqrt()
            size, small = LR * root2 / (1.0 - B1**t), EPS * root2
            new_mu = [torch.lerp(m, g, 1.0 - B1) for m, g in zip(mu, grads, strict=True)]
            new_nu = [torch.lerp(v, g * g, 1.0 - B2) for v, g in zip(nu, grads, strict=True)]
            new = [
                p + (m / (v.sqrt() + small) * -size - p * (LR * DECAY))
                for p, m, v in zip(params, new_mu, new_nu, strict=True)
            ]
            fresh = [*new, *new_mu, *new_nu, count + 1, step + 1, samples + len(x)]
            for old, value in zip([*params, *mu, *nu, *counts], fresh, strict=True):
                old.copy_(value)
            weight = torch.full((), float(len(x)), device=x.device)
            return torch.stack([loss.detach() * weight, weight])

    fn = torch.compile(whole, fullgraph=True)
    batches, counts, traced = problem.forever(), [count, step, samples], False

    def run(steps: int) -> None:
        nonlocal traced
        if not traced:
            traced, steps = True, steps - 1
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                batch = next(batches)
                fn(params, mu, nu, counts, batch)
        for batch in itertools.islice(batches, steps):
            fn(params, mu, nu, counts, batch)

    run.params = lambda: params  # type: ignore[attr-defined]
    return run


# ------------------------------------------------------------------------------------------------------------- ftrain


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def ft_adamw() -> ft.Transform:
    return ft.optim.adamw(LR, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)


def ft_parts(problem: Problem, dropout: float = 0.0) -> tuple[ft.TrainState, Any]:
    """A state and the eager step for it."""
    model, tx = problem.model(dropout), ft_adamw()
    return ft.init(model, tx, seed=0), ft.train_step(model, loss_fn, tx)


def ft_bare(problem: Problem, *, compiled: bool = True, donate: bool = True, **options: Any) -> Callable[[int], object]:
    """A step in a loop of one line."""
    state, step = ft_parts(problem)
    if compiled:
        step = ft.compile(step, donate=donate, **options)
    batches = problem.forever()

    def run(steps: int) -> None:
        nonlocal state
        now = state
        for batch in itertools.islice(batches, steps):
            now, _metrics = step(now, batch)
        state = now

    run.params = lambda: list(state.params.values())  # type: ignore[attr-defined]
    run.step = step  # type: ignore[attr-defined]  # its rung is reported
    return run


def ft_loop(problem: Problem) -> Callable[[int], object]:
    """`ft.loop` with a consumer that does nothing."""
    state, step = ft_parts(problem)
    step = ft.compile(step)

    def run(steps: int) -> None:
        for _tick in ft.loop(state.copy(), step, problem.batches, steps=steps):
            pass

    return run


def ft_fit(
    problem: Problem, step: Any, state: ft.TrainState, stream: Any, progress: bool = True
) -> Callable[[int], object]:
    """`ft.fit` as in the README; its console is `stream`. A terminal gets the live line, anything else a line per record."""

    def run(steps: int) -> None:
        with contextlib.redirect_stdout(stream):
            result = ft.fit(state, step, problem.batches, steps=steps, progress=progress)
        assert len(result.history) >= steps // 50, "the history is on"

    return run


class Nowhere:
    """A stream like a terminal, or like a file, whose writes go to the kernel and no further."""

    encoding = "utf-8"

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the benchmark
        self.written = 0

    def write(self, text: str) -> int:
        self.written += len(text)
        return self._file.write(text)

    def flush(self) -> None:
        self._file.flush()

    def isatty(self) -> bool:
        return self._terminal

    def fileno(self) -> int:
        return self._file.fileno()

    def writable(self) -> bool:
        return True


# ---------------------------------------------------------------------------------------------------------- Lightning


class Ready:
    """An iterable of known length; Lightning takes a plain list for a list of loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def lightning_fit(
    problem: Problem, root: str, stream: Any, *, logs: bool = False, tqdm: bool = False, **options: Any
) -> Callable[[int], object]:
    """`Trainer.fit` on the batches, writing under `root`; `logs=True` logs the loss, which `ft.fit` always does."""
    import lightning
    from lightning.pytorch.callbacks import TQDMProgressBar

    for name in ("lightning.pytorch", "lightning.fabric"):  # hints at each run; their handlers hold the real stderr
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = problem.model()

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch["x"]), batch["y"])
            if logs:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(
                self.model.parameters(), lr=LR, betas=(B1, B2), eps=EPS, weight_decay=DECAY, fused=True
            )

    module, ready = Module(), Ready(problem.batches)
    accelerator = "gpu" if problem.device == "cuda" else "cpu"

    def run(steps: int) -> None:
        callbacks = [TQDMProgressBar()] if tqdm else None
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            trainer = lightning.Trainer(
                max_steps=steps,
                accelerator=accelerator,
                devices=1,
                default_root_dir=root,
                callbacks=callbacks,
                **options,
            )
            trainer.fit(module, ready)
        assert trainer.global_step == steps, "Lightning took another number of steps"

    return run


def small_contenders(problem: Problem, root: str | None, scale: int = 1) -> list[Contender]:
    """All of them on the small MLP; Lightning only with a directory to write to."""
    terminal, file = Nowhere(terminal=True), Nowhere(terminal=False)
    state, step = ft_parts(problem)  # one step for the forms of fit: it keeps its compiled form

    def fit(stream: Nowhere, progress: bool = True) -> Callable[[int], object]:
        return ft_fit(problem, step, state, stream, progress)

    # Slices of about a tenth of a second each.
    found = [
        Contender("hand_eager", "hand-written, eager, fused AdamW", hand_eager(problem), 500),
        Contender(
            "hand_compiled", "hand-written, compiled model, fused AdamW", hand_eager(problem, compiled=True), 400
        ),
        Contender("hand_graph", "the whole-step graph called by hand", hand_graph(problem), 1500),
        Contender("ft_donated", "ft.compile, donated, bare loop", ft_bare(problem), 2000),
        Contender("ft_kept", "ft.compile, not donated, bare loop", ft_bare(problem, donate=False), 1500),
        Contender("ft_eager", "ftrain eager step, bare loop", ft_bare(problem, compiled=False), 250),
        Contender("ft_loop", "ft.loop over the compiled step", ft_loop(problem), 3000, sets_up=True),
        Contender("ft_fit", "ft.fit, progress in a terminal, history", fit(terminal), 3000, sets_up=True),
        Contender("ft_fit_lines", "ft.fit, progress as lines, history", fit(file), 3000, sets_up=True),
        Contender("ft_fit_silent", "ft.fit, progress=False, history", fit(file, False), 3000, sets_up=True),
    ]
    if root is not None:

        def trainer(**options: Any) -> Callable[[int], object]:
            return lightning_fit(problem, root, terminal, **options)

        lean = trainer(tqdm=True, logger=False, enable_checkpointing=False)
        found += [
            Contender("lightning", "Lightning, default", trainer(), 500, sets_up=True),
            Contender("lightning_logs", "Lightning, default, and logs its loss", trainer(logs=True), 500, sets_up=True),
            Contender("lightning_lean", "Lightning, tqdm bar, no logger, no checkpoints", lean, 500, sets_up=True),
            Contender("lightning_bare", "Lightning, barebones=True", trainer(barebones=True), 500, sets_up=True),
        ]
    for one in found:
        one.steps //= scale
    return found


def large_contenders(problem: Problem, steps: int = 2) -> list[Contender]:
    return [
        Contender("hand_eager", "hand-written, eager, fused AdamW", hand_eager(problem), steps),
        Contender("ft_donated", "ft.compile, donated", ft_bare(problem), steps),
        Contender("ft_kept", "ft.compile, not donated", ft_bare(problem, donate=False), steps),
    ]


def agree(contenders: list[Contender]) -> None:
    """Raise unless those that go on from slice to slice have trained to the same parameters, as they have taken as many steps."""
    found = {one.key: one.run.params() for one in contenders if hasattr(one.run, "params")}
    (first, want), *others = found.items()
    moved = max(float(w.detach().abs().max()) for w in want)
    for key, got in others:
        off = max(float((g.detach() - w.detach()).abs().max()) for g, w in zip(got, want, strict=True))
        if not off <= 1e-3 * moved:
            raise RuntimeError(f"{key} trains otherwise than {first}: parameters differ by up to {off:.1e}")
