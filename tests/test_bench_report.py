"""Files of the benchmark: a part that was run is renewed, the others stay as they were."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench"
ORDER = ("first", "second")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    import report

    yield report
    for name in ("report", "rounds"):  # scripts, whose names are nobody's
        sys.modules.pop(name, None)


def part(report: Any, name: str, value: float, date: str) -> Any:
    spread = report.Spread(value, value - 0.125, value + 0.125)
    table = report.Table(f"Times of {name}", "In seconds.", ["", "s"], [["ours", f"{value:.2f}"]])
    return report.Part({"date": date}, [table], [report.Bar(f"bar of {name}", 1.0, spread)], {"samples": [value]})


def test_renewing_a_part_leaves_the_others_as_they_were(report: Any, tmp_path: Path) -> None:
    path = tmp_path / "cpu"
    both = {name: part(report, name, 0.5, "monday") for name in reversed(ORDER)}
    report.write(path, "Speed", both, ORDER)
    before, page = json.loads(path.with_suffix(".json").read_text()), path.with_suffix(".md").read_text()
    assert page.count("monday") == 1, "parts of one run share its head"

    report.write(path, "Speed", {"second": part(report, "second", 1.5, "tuesday")}, ORDER)
    after, renewed = json.loads(path.with_suffix(".json").read_text()), path.with_suffix(".md").read_text()
    assert list(after["parts"]) == list(ORDER)
    assert after["parts"]["first"] == before["parts"]["first"]
    assert after["parts"]["second"]["data"] == {"samples": [1.5]}
    assert [bar["verdict"] for one in after["parts"].values() for bar in one["bars"]] == ["PASS", "FAIL"]
    assert "**Times of first**\n\n- date: monday" in renewed
    assert "**Times of second**\n\n- date: tuesday" in renewed
    assert "| bar of first | <= 1.00 | 0.50 | 0.38 .. 0.62 | - | PASS |" in renewed
    assert "| bar of second | <= 1.00 | 1.50 | 1.38 .. 1.62 | - | FAIL |" in renewed
    assert renewed.count("## Times of second") == 1
    assert "| ours | 0.50 |\n\n## Times of second" in renewed

    report.write(path, "Speed", both, ORDER)
    assert path.with_suffix(".md").read_text() == page


def test_the_published_page_is_that_of_its_json(report: Any) -> None:
    path = BENCH.parents[1] / "docs" / "benchmarks" / "cpu"
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert report._markdown(found["title"], found["parts"]) == path.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ['{"about": {}, "bars": []}', "[1]", '{"parts": []}'])
def test_a_file_of_another_form_is_refused(report: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"cpu\.json is of an older form, or another program's"):
        report.write(tmp_path / "cpu", "Speed", {"first": part(report, "first", 0.5, "monday")}, ORDER)
    assert (tmp_path / "cpu.json").read_text() == text
    assert not (tmp_path / "cpu.md").exists()
