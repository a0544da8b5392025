"""Tables, bars and the files under docs/benchmarks/."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rounds import Samples, Spread, ratio

ROOT = Path(__file__).parents[2]


class Bar(NamedTuple):
    """A bound that an issue sets, and what was measured. It is printed, never asserted: machines differ."""

    text: str
    bound: float
    measured: Spread | None
    cpu: Spread | None = None  # the same by processor time
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """UNSURE where wall and processor time lie on two sides of the bound: then others had the core, more or less evenly."""
        if self.measured is None:
            return "not measured"
        sides = {self._holds(one.median) for one in (self.measured, self.cpu) if one is not None}
        return "UNSURE" if len(sides) == 2 else "PASS" if sides == {True} else "FAIL"

    def _holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def row(self) -> list[str]:
        bound = f"{'>=' if self.at_least else '<='} {self.bound:.2f}"
        if self.measured is None:
            return [self.text, bound, "-", "-", "-", self.verdict]
        found = self.measured
        spread = "-" if found.low == found.high else f"{found.low:.2f} .. {found.high:.2f}"
        cpu = "-" if self.cpu is None else f"{self.cpu.median:.2f}"
        return [self.text, bound, f"{found.median:.2f}", spread, cpu, self.verdict]


class Table(NamedTuple):
    """A heading, a sentence or two, and rows; the first `text` columns are text, the others are numbers."""

    heading: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    text: int = 1

    def plain(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

        def line(cells: list[str]) -> str:
            padded = [
                cell.ljust(width) if i < self.text else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        note = textwrap.fill(self.note, 120)
        return "\n".join([self.heading, note, "", line(self.columns), rule, *map(line, self.rows)])

    def markdown(self) -> str:
        def line(cells: list[str]) -> str:
            return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

        rule = line([*["---"] * self.text, *["---:"] * (len(self.columns) - self.text)])
        return "\n".join([f"## {self.heading}", "", self.note, "", line(self.columns), rule, *map(line, self.rows)])


def times(heading: str, note: str, found: dict[str, Samples], yardstick: str, unit: str = "us") -> Table:
    """One row for each contender."""
    scale = {"us": 1.0, "ms": 1e-3}[unit]
    digits = 1 if unit == "ms" else 0
    rows = []
    for samples in found.values():
        step, over = Spread.of(samples.step), ratio(samples.step, found[yardstick].step)
        busy = ratio(samples.cpu, samples.step).median
        rows.append(
            [
                samples.label,
                f"{step.median * scale:.{digits}f}",
                f"{step.low * scale:.{digits}f} .. {step.high * scale:.{digits}f}",
                f"{over.median:.2f}",
                f"{over.low:.2f} .. {over.high:.2f}",
                f"{min(busy, 1):.0%}",
                f"{Spread.of(samples.set_up).median:.1f}" if samples.set_up else "-",
                f"{samples.first_call:.1f}",
            ]
        )
    columns = [
        "",
        f"{unit}/step",
        "quartiles",
        "x yardstick",
        "quartiles",
        "on CPU",
        "set-up ms",
        "first call s",
    ]
    return Table(heading, note, columns, rows)


def bars(found: Sequence[Bar]) -> Table:
    note = (
        "Medians over the rounds of the ratio (or difference) within a round, with its quartiles. `by CPU` is the same of processor times, "
        "which says more where the table above shows that others had the core; where the two disagree about a bar it says UNSURE."
    )
    return Table("Bars", note, ["", "bound", "median", "quartiles", "by CPU", ""], [bar.row() for bar in found])


def machine(packages: Sequence[str], **more: object) -> dict[str, Any]:
    """Where and with what this was measured."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "cpu": f"{model}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f} when it began",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name in packages if (version := _version(name))),
        **more,
    }


def _version(package: str) -> str | None:
    if package == "ftrain":  # may run from the source tree
        import ftrain

        return ftrain.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--", "ftrain") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def text(about: dict[str, Any], tables: Sequence[Table]) -> str:
    head = "\n".join(f"{name:<9} {value}" for name, value in about.items())
    return "\n\n".join([head, *(table.plain() for table in tables)])


class Part(NamedTuple):
    """What one part of a benchmark found, and where and when."""

    about: dict[str, Any]
    tables: list[Table]
    bars: list[Bar]
    data: dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """The parts in `path.json`, none where there is no such file.

    Raises:
        ValueError: it is a file of another form.
    """
    numbers = path.with_suffix(".json")
    if not numbers.exists():
        return {}
    found = json.loads(numbers.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("parts"), dict):
        raise ValueError(f"{numbers} is of an older form, or another program's: write to another folder, or delete it")
    parts: dict[str, Any] = found["parts"]
    return parts


def write(path: Path, title: str, parts: dict[str, Part], order: Sequence[str]) -> list[Path]:
    """Write `path.md` and `path.json`; the JSON has every sample. Parts that were written before and are not among `parts` stay."""
    new = {name: _json(part) for name, part in parts.items()}
    every = {**read(path), **new}
    every = {
        name: every[name] for name in sorted(every, key=lambda name: (name not in order, [*order, name].index(name)))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    markdown, numbers = path.with_suffix(".md"), path.with_suffix(".json")
    markdown.write_text(_markdown(title, every), encoding="utf-8")
    numbers.write_text(json.dumps({"title": title, "parts": every}, indent=1) + "\n", encoding="utf-8")
    return [markdown, numbers]


def _json(part: Part) -> dict[str, Any]:
    verdicts = [{**bar._asdict(), "verdict": bar.verdict} for bar in part.bars]
    tables = [table._asdict() for table in part.tables]
    found: dict[str, Any] = _rounded({"about": part.about, "bars": verdicts, "tables": tables, "data": part.data})
    return found


def _markdown(title: str, parts: dict[str, Any]) -> str:
    """The page of the parts as they are in the JSON. Those of one run share its head."""
    runs: list[tuple[dict[str, Any], list[str]]] = []
    for name, part in parts.items():
        same = [names for about, names in runs if about == part["about"]]
        if same:
            same[0].append(name)
        else:
            runs.append((part["about"], [name]))
    blocks = [f"# {title}"]
    for about, names in runs:
        headings = [table["heading"] for name in names for table in parts[name]["tables"]]
        blocks += [f"**{'; '.join(headings)}**"] if len(runs) > 1 else []
        blocks.append(
            "\n".join(f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in about.items())
        )
    blocks += [Table(**table).markdown() for part in parts.values() for table in part["tables"]]
    judged = [_bar(bar) for part in parts.values() for bar in part["bars"]]
    blocks += [bars(judged).markdown()] if judged else []
    return "\n\n".join(blocks) + "\n"


def _bar(found: dict[str, Any]) -> Bar:
    measured, cpu = (None if found[one] is None else Spread(**found[one]) for one in ("measured", "cpu"))
    return Bar(found["text"], found["bound"], measured, cpu, found["at_least"])


def samples(found: dict[str, Samples]) -> dict[str, Any]:
    return {key: asdict(one) for key, one in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Spread):
        return _rounded(value._asdict())
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value
