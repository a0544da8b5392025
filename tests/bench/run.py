"""The benchmark: `nox -s bench`, or `python tests/bench/run.py [--quick] [--no-lightning] [--write [FOLDER]]`.

It prints tables and bars and always ends with status 0; what the figures mean for a change is for people to judge. The small MLP
shows what a trainer adds to a step, the large one what donation does to memory. Everything runs in one process, round by round
(see rounds.py), except peak memory, which each way of training shows in a process of its own (memory.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "benchmarks"


def main() -> None:
    args = _arguments()
    began = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    os.environ["TERM"], os.environ["COLUMNS"] = (
        "xterm-256color",
        "120",
    )  # of the terminals that cases.Nowhere stands for
    if importlib.util.find_spec("ftrain") is None:
        sys.path.insert(0, str(ROOT))  # not installed: the source tree
    with _cold_cache(args.quick), tempfile.TemporaryDirectory(prefix="ftrain-bench-") as root:
        _run(args, root, began)


def _run(args: argparse.Namespace, root: str, began: float) -> None:
    import torch

    torch.set_num_threads(1)
    import cases
    import memory
    import report
    import rounds
    from report import Bar

    lightning = not args.no_lightning and importlib.util.find_spec("lightning") is not None
    if not lightning:
        why = "--no-lightning" if args.no_lightning else "it is not installed; `pip install lightning==2.6.6`"
        print(f"Lightning is left out: {why}\n")
    about = report.machine(["ftrain", "torch", "lightning", "numpy", "optree"], threads="1")

    tell = _teller()
    # Quick: the two processes run beside the timing, which then has the other core.
    kinds = ("hand", "donated") if args.quick else memory.KINDS
    peaks: dict[str, dict[str, Any]] = {}
    early = [memory.start(kind) for kind in kinds] if args.quick else []

    small = cases.small()
    contenders = cases.small_contenders(small, root if lightning else None, scale=2 if args.quick else 1)
    number = args.rounds or (5 if args.quick else 50)
    found = rounds.measure(contenders, number, tell=tell, ready=lambda: cases.agree(contenders))

    big: dict[str, rounds.Samples] = {}
    large = cases.large()
    if not args.quick:
        heavy = cases.large_contenders(large)
        big = rounds.measure(heavy, max(number // 4, 3), tell=tell, ready=lambda: cases.agree(heavy), warm=1)
    for i, kind in enumerate(kinds):
        tell(f"peak memory: {kind}")
        peaks[kind] = memory.finish(early[i] if early else memory.start(kind))
    tell("")

    def bar(text: str, bound: float, over: str, under: str, at_least: bool = False) -> Bar:
        if over not in found or under not in found:
            return Bar(text, bound, None, at_least=at_least)
        a, b = found[over], found[under]
        return Bar(text, bound, rounds.ratio(a.step, b.step), rounds.ratio(a.cpu, b.cpu), at_least=at_least)

    memory_ratio = peaks["donated"]["peak_mb"] / peaks["hand"]["peak_mb"]
    met = [
        bar("ft.compile'd step / hand-written eager, fused", 0.40, "ft_donated", "hand_eager"),
        bar("ft.compile'd step / the same graph called by hand", 1.15, "ft_donated", "hand_graph"),
        bar("ft.fit in a terminal / ft.compile'd step", 1.25, "ft_fit", "ft_donated"),
        bar("ft.fit, plain lines / ft.compile'd step", 1.25, "ft_fit_lines", "ft_donated"),
        bar("ftrain eager step / hand-written eager, fused", 3.00, "ft_eager", "hand_eager"),
        bar("Lightning default / ft.fit in a terminal", 4.00, "lightning", "ft_fit", at_least=True),
        Bar(
            "24 M MLP: peak memory donated / hand-written",
            0.85,
            rounds.Spread(memory_ratio, memory_ratio, memory_ratio),
        ),
    ]
    about["load"] += f", {os.getloadavg()[0]:.1f} when it ended"
    about["took"] = f"{time.perf_counter() - began:.0f} s, {number} rounds"
    tables = [
        report.times(
            "Small MLP",
            "32-32-32-10, ReLU, batch 16, AdamW, float32, one thread, ready batches from a list. `x yardstick`: times the first row, in the "
            "same round. `on CPU`: processor time over wall time; below 100% somebody else had the core. `set-up`: a run of one step; "
            "their times per step are without it. `first call`: until the first step is done, with whatever is compiled for it (from an empty compile "
            "cache, but for --quick). The graph called by hand goes through torch.compile's own entry and guards.",
            found,
            "hand_eager",
        ),
        *([_large(report, rounds, big, peaks, large)] if big else []),
        report.Table(
            "24 M MLP, peak memory",
            "Resident memory of steady steps above that of the process without parameters, in MB; how, says tests/bench/memory.py.",
            ["", "peak", "between steps", "x hand-written", "baseline"],
            [
                [
                    {
                        "hand": "hand-written, fused AdamW",
                        "donated": "ft.compile, donated",
                        "kept": "ft.compile, not donated",
                    }[kind],
                    f"{one['peak_mb']:.0f}",
                    f"{one['between_steps_mb']:.0f}",
                    f"{one['peak_mb'] / peaks['hand']['peak_mb']:.2f}",
                    f"{one['baseline_mb']:.0f}",
                ]
                for kind, one in peaks.items()
            ],
        ),
        report.bars(met),
    ]
    print(report.text(about, tables))
    if args.write:
        data = {"small": report.samples(found), "large": report.samples(big), "memory": peaks}
        for path in report.write(
            Path(args.write) / "cpu", "Speed and memory on a CPU", about, tables, bars=met, data=data
        ):
            print(f"\nwrote {path}", end="")
        print()


def _large(report: Any, rounds: Any, big: Any, peaks: Any, problem: Any) -> Any:
    note = f"{problem.parameters() / 1e6:.1f} M parameters, batch {problem.batch}, AdamW, float32, one thread."
    return report.times("24 M MLP, time", note, big, "hand_eager", unit="ms")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time ftrain beside hand-written loops and Lightning.")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few short rounds, warm compile cache")
    parser.add_argument("--no-lightning", action="store_true", help="leave Lightning out")
    parser.add_argument("--rounds", type=int, help="rounds on the small MLP (default: 50, quick: 5)")
    parser.add_argument(
        "--write",
        nargs="?",
        const=str(FOLDER),
        metavar="FOLDER",
        help="write cpu.md and cpu.json (default: docs/benchmarks)",
    )
    return parser.parse_args()


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
