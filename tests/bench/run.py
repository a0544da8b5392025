"""The benchmark: `nox -s bench`, or `python tests/bench/run.py [--quick] [--parts ...] [--no-lightning] [--write [FOLDER]]`.

It prints tables and bars and always ends with status 0; what the figures mean for a change is for people to judge. Its parts:

- small: what a trainer adds to a step of a small MLP;
- large: what donation does to the memory of an MLP of 24 M parameters;
- recipe: the same MLP with clipping, averages and mixed precision (optimization.py);
- parts: one update from eight micro-batches;
- gpt: what it costs to compile the step of a GPT of 12 layers, cold and warm (first_call.py);
- data: the device feed, seeking, and what the loop and `fit` take beside the step (data.py);
- checkpoints: saving and restoring beside torch.save, torch.distributed.checkpoint and safetensors (checkpoints.py);
- hooks: what happens around the steps: hooks, evaluation, metrics, skipping bad batches (hooks.py).

`--write` with some of the parts renews those in the files, and leaves the others as they are.

The contenders of a part run in one process, round by round (see rounds.py). Peak memory and compile times come from processes of
their own (memory.py, first_call.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "benchmarks"
PARTS = ("small", "large", "recipe", "parts", "gpt", "data", "checkpoints", "hooks")


def main() -> None:
    args = _arguments()
    began = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    os.environ["JAX_PLATFORMS"] = "cpu"  # JAX comes with Orbax
    os.environ["TERM"], os.environ["COLUMNS"] = (
        "xterm-256color",
        "120",
    )  # of the terminals that cases.Nowhere stands for
    if importlib.util.find_spec("ftrain") is None:
        sys.path.insert(0, str(ROOT))  # not installed: the source tree
    with _cold_cache(args.quick), tempfile.TemporaryDirectory(prefix="ftrain-bench-") as root:
        _run(args, root, began)


class Bench:
    """The parts of the benchmark, each of which adds its tables, bars and samples."""

    def __init__(self, args: argparse.Namespace, root: str) -> None:
        import torch

        torch.set_num_threads(1)
        import report

        self.quick = args.quick
        self.rounds = args.rounds or (5 if args.quick else 50)
        self.folder = root
        self.root: str | None = root  # Lightning's
        if args.no_lightning or importlib.util.find_spec("lightning") is None:
            why = "--no-lightning" if args.no_lightning else "it is not installed; `pip install lightning==2.6.6`"
            print(f"Lightning is left out: {why}\n")
            self.root = None
        self.about = report.machine(
            ["ftrain", "torch", "lightning", "numpy", "optree", "orbax-checkpoint", "safetensors"], threads="1"
        )
        self.tell = _teller()
        self.report: Any = report
        self.tables: list[Any] = []
        self.bars: list[Any] = []
        self.samples: dict[str, Any] = {}

    def part(self, name: str) -> Any:
        """Run one part."""
        self.tables, self.bars, self.samples = [], [], {}
        getattr(self, name)()
        return self.report.Part(self.about, self.tables, self.bars, self.samples)

    def small(self) -> None:
        """What a trainer adds to a step that is nearly all overhead."""
        import cases
        import rounds

        contenders = cases.small_contenders(cases.small(), self.root, scale=2 if self.quick else 1)
        found = rounds.measure(contenders, self.rounds, tell=self.tell, ready=lambda: cases.agree(contenders))
        self.samples["small"] = self.report.samples(found)
        note = (
            "32-32-32-10, ReLU, batch 16, AdamW, float32, one thread, ready batches from a list. `x yardstick`: times the first row, in the "
            "same round. `on CPU`: processor time over wall time; below 100% somebody else had the core. `set-up`: a run of one step; "
            "their times per step are without it. `first call`: until the first step is done, with whatever is compiled for it (from an empty "
            "compile cache, but for --quick). The graph called by hand goes through torch.compile's own entry and guards."
        )
        self.tables.append(self.report.times("Small MLP", note, found, "hand_eager"))
        self._bar(found, "ft.compile'd step / hand-written eager, fused", 0.40, "ft_donated", "hand_eager")
        self._bar(found, "ft.compile'd step / the same graph called by hand", 1.15, "ft_donated", "hand_graph")
        self._bar(found, "ft.fit in a terminal / ft.compile'd step", 1.25, "ft_fit", "ft_donated")
        self._bar(found, "ft.fit, plain lines / ft.compile'd step", 1.25, "ft_fit_lines", "ft_donated")
        self._bar(found, "ftrain eager step / hand-written eager, fused", 3.00, "ft_eager", "hand_eager")
        self._bar(found, "Lightning default / ft.fit in a terminal", 4.00, "lightning", "ft_fit", at_least=True)

    def large(self) -> None:
        """What donation does to memory."""
        import cases
        import memory
        import rounds

        problem = cases.large()
        if not self.quick:
            heavy = cases.large_contenders(problem)
            found = rounds.measure(
                heavy, max(self.rounds // 4, 3), tell=self.tell, ready=lambda: cases.agree(heavy), warm=1
            )
            self.samples["large"] = self.report.samples(found)
            note = f"{problem.parameters() / 1e6:.1f} M parameters, batch {problem.batch}, AdamW, float32, one thread."
            self.tables.append(self.report.times("24 M MLP, time", note, found, "hand_eager", unit="ms"))
        kinds = ("hand", "donated") if self.quick else memory.KINDS
        self._memory("24 M MLP, peak memory", kinds)
        self._memory_bar("24 M MLP: peak memory donated / hand-written", 0.85, "donated", "hand")

    def recipe(self) -> None:
        """Clipping, averages and mixed precision in one step."""
        import cases
        import memory
        import optimization
        import rounds

        problem = cases.large()
        heavy = optimization.recipe_contenders(problem)
        apart = ""

        def ready() -> None:
            nonlocal apart
            apart = optimization.agree(heavy, problem, "bf16-mixed")

        found = rounds.measure(heavy, self._few(), tell=self.tell, ready=ready, warm=1)
        self.samples["recipe"] = self.report.samples(found)
        note = (
            f"{problem.parameters() / 1e6:.1f} M parameters, batch {problem.batch}, AdamW, clip_by_global_norm(1.0), an exponential moving "
            "average (0.999) and bf16-mixed, one thread. By hand: torch.autocast, clip_grad_norm_, AdamW(fused=True), AveragedModel "
            f"with get_ema_multi_avg_fn. Parameters and averages agree {apart}."
        )
        self.tables.append(self.report.times("Recipe on the 24 M MLP, time", note, found, "hand", unit="ms"))
        self._bar(found, "24 M MLP, clip + EMA + bf16-mixed: ft.compile / hand-written", 1.10, "ft_donated", "hand")
        self._memory("Recipe on the 24 M MLP, peak memory", memory.RECIPE)
        what = "24 M MLP, clip + EMA + bf16-mixed: peak memory ft.compile / hand-written"
        self._memory_bar(what, 1.00, "recipe_donated", "recipe_hand")

    def parts(self) -> None:
        """One update from eight micro-batches."""
        import memory
        import optimization
        import rounds

        rows = [(optimization.parts_small(), 50, "us", self.rounds // 2, "small MLP")]
        if not self.quick:
            rows.insert(0, (optimization.parts_large(), 1, "ms", self._few(), "24 M MLP"))
        for problem, steps, unit, number, name in rows:
            heavy = optimization.parts_contenders(problem, steps)
            ready = functools.partial(optimization.agree, heavy, problem)
            found = rounds.measure(heavy, max(number, 3), tell=self.tell, ready=ready, warm=1)
            self.samples[f"parts, {name}"] = self.report.samples(found)
            note = (
                f"{problem.parameters() / 1e6:.3g} M parameters, eight micro-batches of {problem.batch // optimization.PARTS}, AdamW, "
                "float32, one thread. By hand: eight times forward and backward, which add up in .grad, then one fused step."
            )
            title = f"Accumulation x 8 on the {name}, time"
            self.tables.append(self.report.times(title, note, found, "hand", unit=unit))
            what = f"{name}, accumulation x 8: one compiled call / eight micro-batches by hand"
            self._bar(found, what, 1.05, "ft_donated", "hand")
        if not self.quick:
            self._memory("Accumulation x 8 on the 24 M MLP, peak memory", memory.PARTS)

    def gpt(self) -> None:
        """What compiling a whole step costs."""
        import first_call

        if self.quick:
            return
        found = first_call.measure(self.tell)
        self.samples["gpt"] = found
        self.tables.append(first_call.table(self.report, found))

    def data(self) -> None:
        """What data costs on the host."""
        import data

        tables, bars, self.samples = data.run(self.rounds, self.quick, self.folder, self.tell)
        self.tables += tables
        self.bars += bars

    def checkpoints(self) -> None:
        """Saving and restoring."""
        import checkpoints

        rounds = 3 if self.quick else max(self.rounds // 5, 3)
        tables, bars, self.samples = checkpoints.run(rounds, self.quick, self.folder, self.tell)
        self.tables += tables
        self.bars += bars

    def hooks(self) -> None:
        """What happens around the steps."""
        import hooks

        tables, bars, self.samples = hooks.run(self.rounds, self.quick, self.folder, self.tell)
        self.tables += tables
        self.bars += bars

    def _few(self) -> int:
        return max(self.rounds // 3, 3)

    def _bar(self, found: Any, text: str, bound: float, over: str, under: str, *, at_least: bool = False) -> None:
        import rounds

        if over not in found or under not in found:
            self.bars.append(self.report.Bar(text, bound, None, at_least=at_least))
            return
        a, b = found[over], found[under]
        wall, cpu = rounds.ratio(a.step, b.step), rounds.ratio(a.cpu, b.cpu)
        self.bars.append(self.report.Bar(text, bound, wall, cpu, at_least=at_least))

    def _memory(self, title: str, kinds: Sequence[str]) -> None:
        """Peaks of some kinds of memory.py, the first of which is the yardstick."""
        import children
        import memory

        peaks = self.samples.setdefault("memory", {})
        # Quick: all at once. Their times are not measured.
        early = [memory.start(kind) for kind in kinds] if self.quick else []
        for i, kind in enumerate(kinds):
            self.tell(f"peak memory: {kind}")
            peaks[kind] = children.finish(early[i] if early else memory.start(kind))
        self.tables.append(
            self.report.Table(
                title,
                "Resident memory of steady steps above that of the process without parameters, in MB; how, says tests/bench/memory.py.",
                ["", "peak", "between steps", "x hand-written", "baseline"],
                [
                    [
                        memory.LABELS[kind],
                        f"{peaks[kind]['peak_mb']:.0f}",
                        f"{peaks[kind]['between_steps_mb']:.0f}",
                        f"{peaks[kind]['peak_mb'] / peaks[kinds[0]]['peak_mb']:.2f}",
                        f"{peaks[kind]['baseline_mb']:.0f}",
                    ]
                    for kind in kinds
                ],
            )
        )

    def _memory_bar(self, text: str, bound: float, over: str, under: str) -> None:
        import rounds

        value = self.samples["memory"][over]["peak_mb"] / self.samples["memory"][under]["peak_mb"]
        self.bars.append(self.report.Bar(text, bound, rounds.Spread(value, value, value)))


def _run(args: argparse.Namespace, root: str, began: float) -> None:
    bench = Bench(args, root)
    about, report = bench.about, bench.report
    target = None if args.write is None else Path(args.write) / "cpu"
    if target is not None:
        try:
            report.read(target)  # a file of another form is found before the work, not after
        except ValueError as error:
            sys.exit(f"run.py: {error}")
    parts = {}
    for name in args.parts.split(","):
        parts[name] = bench.part(name)
        gc.collect()
    bench.tell("")
    about["load"] += f", {os.getloadavg()[0]:.1f} when it ended"
    about["took"] = f"{time.perf_counter() - began:.0f} s, {bench.rounds} rounds"
    bars = [bar for part in parts.values() for bar in part.bars]
    tables = [table for part in parts.values() for table in part.tables]
    print(report.text(about, [*tables, *([report.bars(bars)] if bars else [])]))
    if target is not None:
        for path in report.write(target, "Speed and memory on a CPU", parts, PARTS):
            print(f"\nwrote {path}", end="")
        print()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time ftrain beside hand-written loops and Lightning.")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few short rounds, warm compile cache")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--no-lightning", action="store_true", help="leave Lightning out")
    parser.add_argument(
        "--rounds", type=int, help="rounds on the small MLP (default: 50, quick: 5); a third of that on large ones"
    )
    parser.add_argument(
        "--write",
        nargs="?",
        const=str(FOLDER),
        metavar="FOLDER",
        help="write these parts into cpu.md and cpu.json (default: docs/benchmarks)",
    )
    args = parser.parse_args()
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: no such part: {', '.join(sorted(unknown))}")
    return args


@contextlib.contextmanager
def _cold_cache(quick: bool) -> Iterator[None]:
    """First calls are timed with an empty compile cache, so that they tell what a new program costs."""
    if quick:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="ftrain-inductor-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def _teller() -> Any:
    began = time.perf_counter()
    if not sys.stderr.isatty():
        return lambda text: text and print(f"{time.perf_counter() - began:5.0f} s  {text}", file=sys.stderr)
    return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
