"""The tables of docs/optimization.md are those of the code, and the tests they name exist and speak of what they prove."""

from __future__ import annotations

import ast
import re

import pytest

from . import tables

ROWS = [(name, value) for rows in tables.sections().values() for name, value in rows.items()]


def test_the_page_is_what_the_code_says() -> None:
    assert tables.PAGE.read_text() == tables.page(), "python -m tests.tables --write"


@pytest.mark.parametrize(("name", "value"), ROWS, ids=[name for name, _ in ROWS])
def test_each_row_names_a_test_that_speaks_of_it(name: str, value: object) -> None:
    file, _, test = tables.proof(name).partition("::")
    text = (tables.ROOT / "tests" / file).read_text()
    names = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert test in names, f"{file} has no {test}"
    assert re.search(rf"(?<![\w-]){re.escape(name.rpartition('.')[2])}(?![\w-])", text), f"{file} never names {name}"
    assert tables.summary(value), f"{name} has no docstring"


def test_no_proof_is_of_something_that_is_not_there() -> None:
    assert set(tables.PROOFS) <= {name for name, _ in ROWS}


def test_the_sections_are_full() -> None:
    sizes = {heading: len(rows) for heading, rows in tables.sections().items()}
    assert sizes["Optimizers"] >= 16
    assert sizes["Schedules"] >= 15
    assert sizes["Wrappers"] >= 8
    assert sizes["Precisions"] == 7
