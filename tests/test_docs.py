"""What the documentation shows is what happens.

* Every ```` ```python ```` block of README.md and docs/**/*.md is run: the blocks of a file in order, in one namespace, in an
  empty working directory. Afterwards each function `test_*()` that a block defines is called. A block that starts with
  `>>>` is a doctest. One that cannot be run here is opened with ```` ```python no-run: REASON ````.
* Every example in a docstring of ftrain is run. It finds `ft` and `torch` imported, and nothing else.
* Every public name has an example.
"""

import ast
import doctest
import importlib
import importlib.util
import io
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ftrain

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ftrain.__file__).parent

# Public names without an example, each with its reason. Modules need none: their members have their own.
NO_EXAMPLE = {
    "__version__": "a string",
}

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@contextmanager
def scratch_module(name: str) -> Iterator[types.ModuleType]:
    """A new importable module to run code in: dataclasses and Dynamo look a function's module up by its name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    try:
        yield module
    finally:
        del sys.modules[name]


# ----------------------------------------------------------------------------------------------------- Markdown blocks


class Block(NamedTuple):
    """One fenced block: the words after ```` ``` ````, the line of its first line of code, and the code."""

    info: str
    line: int
    code: str


def python_blocks(text: str) -> list[Block]:
    """The blocks of `text` that are marked as Python, dedented."""
    blocks = []
    for match in re.finditer(r"^( *)```(python\b.*)\n((?:.*\n)*?) *```[ ]*$", text, flags=re.MULTILINE):
        indent, info, code = match.groups()
        line = text.count("\n", 0, match.start(3)) + 1
        blocks.append(Block(info.strip(), line, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)))
    return blocks


def run_doctest(test: doctest.DocTest, namespace: dict[str, object]) -> None:
    """Run the examples in `namespace` itself, not in a copy; fail with doctest's own report."""
    test.globs = namespace
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    results = runner.run(test, out=report.write, clear_globs=False)
    assert not results.failed, report.getvalue()


def run_blocks(path: Path) -> int:
    """Run the blocks of the file in order in one namespace; how many there were."""
    blocks = python_blocks(path.read_text())
    with scratch_module(f"executed_{path.stem}".replace("-", "_")) as module:
        namespace = vars(module)
        for block in blocks:
            if block.info != "python":
                assert re.fullmatch(r"python no-run: \S.*", block.info), (
                    f"{path.name}:{block.line}: ```{block.info}: expected ```python or ```python no-run: REASON"
                )
                continue
            if block.code.lstrip().startswith(">>>"):
                parsed = doctest.DocTestParser().get_doctest(block.code, {}, path.name, str(path), block.line - 1)
                run_doctest(parsed, namespace)
                continue
            before = dict(namespace)
            # The empty lines make tracebacks, and inspect.getsource, point into the file itself.
            exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
            for name, value in list(namespace.items()):
                if name.startswith("test_") and value is not before.get(name):
                    value()
    return len(blocks)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = run_blocks(path)
    assert count or path.name != "README.md", "README.md shows no code"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```python\ndef test_it():\n    raise KeyError\n```\n", KeyError),
        ("```python\n>>> 1 + 1\n3\n```\n", AssertionError),
        ("```python no-run\nx = 1\n```\n", AssertionError),
        ("1. In a list:\n\n   ```python\n   1 / 0\n   ```\n", ZeroDivisionError),
    ],
    ids=["second block", "raises", "test function", "doctest", "no reason", "indented"],
)
def test_a_broken_block_fails(tmp_path, text, error):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(error):
        run_blocks(path)


def test_blocks_share_a_namespace_and_may_be_left_out(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "```python\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n```\n"
        "```sh\nfalse\n```\n"
        "```python no-run: needs eight GPUs\n1 / 0\n```\n"
        "```python\n>>> A()\nA(x=1)\n```\n"
        "```python\ndef test_a():\n    assert A().x == 1\n```\n"
    )
    assert run_blocks(path) == 4


# ---------------------------------------------------------------------------------------------------------- docstrings


def module_names() -> list[str]:
    """Every module of the package, found by file so that collecting the tests imports nothing more."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        if not test.examples:
            continue
        torch.manual_seed(0)
        with scratch_module("docstring_example") as module:
            module.ft, module.torch = ftrain, torch
            run_doctest(test, vars(module))


def test_a_broken_example_fails():
    parsed = doctest.DocTestParser().get_doctest(">>> torch.ones(2).sum()\ntensor(3.)\n", {}, "planted", None, 0)
    with pytest.raises(AssertionError, match=r"Got:\n +tensor\(2\.\)"):
        run_doctest(parsed, {"torch": torch})


# --------------------------------------------------------------------------------------------------------- public names


def public_names() -> list[str]:
    """The names that the door re-exports, read from its stub."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.asname or alias.name for node in imports for alias in node.names]


@pytest.mark.parametrize("name", public_names())
def test_public_name_has_an_example(name):
    value = getattr(ftrain, name)
    if name in NO_EXAMPLE:
        return
    doc = getattr(value, "__doc__", None) or ""
    assert doc.strip(), f"ft.{name} has no docstring"
    if not isinstance(value, types.ModuleType):
        assert ">>>" in doc, f"the docstring of ft.{name} shows no example"


def test_exceptions_name_public_things():
    assert set(NO_EXAMPLE) <= set(public_names())
