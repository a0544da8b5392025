"""`docs/coming-from-lightning.md` answers every line of the checklist, and what it calls an answer is code that is run.

tests/test_docs.py runs the page. Here it is read: each row of its tables says what is not there and why, or has a piece of code
under a comment with its ID, in which all that the row spells occurs.
"""

from __future__ import annotations

import re

import pytest

from .test_docs import ROOT, python_blocks

PAGE = ROOT / "docs" / "coming-from-lightning.md"

# The lines of the project's checklist of what Lightning does: sections 2a to 2e, 3, 6, 9c and 11 (whose rows have no numbers there).
NUMBERS = {
    "TR": [*range(1, 44), *range(50, 69)],
    "ST": range(1, 16),
    "TU": range(1, 5),
    "PF": range(1, 6),
    "HK": range(1, 14),
    "CB": range(1, 19),
    "LP": range(1, 27),
    "EX": range(1, 12),
    "UT": range(30, 49),
}
IDS = [f"{letters}-{number:02}" for letters, numbers in NUMBERS.items() for number in numbers]

NAMED = r"[A-Z]{2}-\d\d"
# What is said where there is no spelling, and that it has a reason.
ABSENT = re.compile(r"not (?:built yet|done|copied|needed)\b", flags=re.IGNORECASE)
REASON = re.compile(ABSENT.pattern + r": \S+ \S+", flags=re.IGNORECASE)


def rows(text: str) -> dict[str, str]:
    """What the page answers, by ID. A row may answer several."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and re.fullmatch(rf"{NAMED}(, {NAMED})*", cells[0]):
            for one in cells[0].split(", "):
                assert one not in found, f"{one} has two rows"
                assert cells[1], f"the row of {one} does not say what Lightning does"
                found[one] = cells[2]
    return found


def code(text: str) -> dict[str, str]:
    """The code under the comments with IDs, by ID; only of blocks that are run."""
    found: dict[str, str] = {}
    for block in python_blocks(text):
        if block.info != "python":
            assert not re.search(NAMED, block.code), f"line {block.line}: an ID in a block that is not run"
            continue
        current: list[str] = []
        for line in block.code.splitlines():
            if re.match(rf"# {NAMED}", line):
                current = re.findall(NAMED, line)
                continue
            for one in current:
                found[one] = found.get(one, "") + line + "\n"
    return found


def spelled(cell: str) -> set[str]:
    """What a cell spells in ftrain's words: `ft.` names, and `name=` arguments."""
    spans = " ".join(re.findall(r"`([^`]*)`", cell))
    return {*re.findall(r"\bft\.[a-zA-Z_.]*[a-zA-Z_]", spans), *re.findall(r"\b[a-z_]+=(?!=)", spans)}


def answered(one: str, cell: str, code: dict[str, str]) -> None:
    """Fail unless this is an answer."""
    if one not in code:
        assert REASON.match(cell), f"{one}: no code has it in a comment, and it does not begin with a reason: {cell}"
        return
    lines = [line for line in code[one].splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert lines, f"{one}: there is no code under its comment"
    absent = {name for name in spelled(cell) if name not in code[one] and f'"{name[:-1]}":' not in code[one]}
    assert not absent, f"{one}: spelled, and not in the code under its comment: {sorted(absent)}"


TEXT = PAGE.read_text()
ROWS, CODE = rows(TEXT), code(TEXT)


@pytest.mark.parametrize("one", IDS)
def test_every_line_of_the_checklist_is_answered(one: str) -> None:
    assert one in ROWS, f"{one} has no row"
    answered(one, ROWS[one], CODE)


def test_there_are_no_other_lines() -> None:
    assert set(ROWS) == set(IDS)
    assert set(CODE) <= set(IDS)


@pytest.mark.parametrize("one", [one for one, cell in ROWS.items() if ABSENT.search(cell)])
def test_what_is_not_there_has_a_reason(one: str) -> None:
    for part in ABSENT.finditer(ROWS[one]):
        assert REASON.match(ROWS[one], part.start()), f"{one}: {part[0]}, and why?"


BROKEN = [
    ("| TR-01 | `x=` | `ft.fit(steps=3)` |", "no code has it in a comment"),
    ("| TR-01 | `x=` | `ft.fit(steps=3)` |\n\n```python\n# TR-01\n\n# TR-02\nft.fit(steps=3)\n```", "there is no code"),
    ("| TR-01 | `x=` | `ft.fit(steps=3)` |\n\n```python\n# TR-01\nft.fit(epochs=3)\n```", r"\['steps='\]"),
    ("| TR-01 | `x=` | `ft.until()` |\n\n```python\n# TR-01\nft.after(epochs=3)\n```", r"\['ft.until'\]"),
    ("| TR-01 | `x=` | not done |", "does not begin with a reason"),
    ("| TR-01 | `x=` | not copied: no |", "does not begin with a reason"),
    (
        "| TR-01 | `x=` | `ft.fit` |\n\n```python no-run: slow\n# TR-01\nft.fit()\n```",
        "an ID in a block that is not run",
    ),
    ("| TR-01 | `x=` | not done: too slow |\n| TR-01 | `x=` | not done: too slow |", "two rows"),
    ("| TR-01 | | not done: too slow |", "does not say what Lightning does"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_what_is_no_answer_fails(text: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        answered("TR-01", rows(text)["TR-01"], code(text))
