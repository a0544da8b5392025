"""The rules of DESIGN.md that can be read off the source: who imports whom, who compiles, who syncs, who mutates.

Each rule is a function from source text to complaints. Two tests belong to it: no file of ftrain breaks it, and planted
sources do. Every import counts: inside functions, under TYPE_CHECKING, in stubs, and by `importlib.import_module("...")`.

A rule may be broken where it must be, visibly: on that line a comment `# sync: why` or `# mutates: why`, and the file in
the list below.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A module imports from its own unit and from the layers below its own.
LAYERS = (
    ("types", "errors", "tree", "state", "rng", "metrics", "figure", "precision", "_version"),
    ("optim", "data", "sinks"),
    ("steps",),
    ("loops",),
    ("checkpoint", "parallel"),
    ("tune", "inspect", "bridges", "testing", "cli", "__main__"),
)
GROUND, EDGES = LAYERS[0], LAYERS[-1]  # these two import their peers as well, as long as no circle arises
LAYER_OF = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}

# Third-party packages that live in one place, so that they can be exchanged there.
CONFINED = {
    "orbax": "checkpoint/",
    "jax": "checkpoint/",
    "jaxlib": "checkpoint/",
    "wandb": "sinks/wandb.py",
    "torchao": "steps/float8.py",
}

# Imported inside the functions that use them, so that `import ftrain` is light.
NEVER_AT_TOP_LEVEL = {"rich", "matplotlib", "IPython", "torchao"}

COMPILERS = {"torch.compile", "torch.compiler.compile", "torch._dynamo.optimize"}
COMPILE_FILE = "steps/compile.py"

SYNC_METHODS = {"item", "tolist", "cpu", "numpy"}
SYNC_FREE = ("loops/", "sinks/", *(f"{unit}/" for unit in EDGES))  # at log points and at the edges, reading is the job
# Files of the other units with a marked sync, and what they read.
SYNC_FILES = {
    "checkpoint/exports.py": "what is written to a file, from host memory",
    "data/flat.py": "an array of tokens that the user gave, on the CPU",
    "data/packing.py": "documents, which are put together on the host",
    "state.py": "the counters, where the host has no copy of them yet",
    "optim/torch_adapter.py": "hyper-parameters of an optimizer of torch, on the CPU unless the user put them elsewhere",
    "optim/kept.py": "numbers that an optimizer of torch keeps, on the CPU",
    "checkpoint/dtypes.py": "the memory of a tensor on the CPU, as an array",
    "checkpoint/journal.py": "arrays among the metrics of a record, which lie on the host",
}

NOT_IN_PLACE = {"requires_grad_"}  # changes what is recorded, not the values
# Files other than steps/compile.py with a marked mutation, and what they write to.
MUTATES_FILES: dict[str, str] = {
    "checkpoint/imports.py": "tensors of its own, filled from a file",
    "data/failures.py": "a generator that is put back, to find the order of a loader again",
    "steps/donation.py": "donation outside of a graph: the eager rungs",
    "optim/rules/quasi_newton.py": "a copy of L-BFGS's history, made once for an update",
    "checkpoint/staging.py": "the copy in host memory from which a save is written",
    "checkpoint/reading.py": "fresh memory, laid out as the leaf that is restored",
}

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


# ------------------------------------------------------------------------------------------------------ reading sources


class Import(NamedTuple):
    """One import of `target` (absolute and dotted; for `from a import b` it is `a.b`)."""

    target: str
    line: int
    top_level: bool  # runs when the module is imported


def module_name(path: str) -> str:
    """`steps/__init__.py` -> `ftrain.steps`."""
    parts = path.rsplit(".", 1)[0].split("/")
    return ".".join(["ftrain", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(path: str, source: str) -> list[Import]:
    """Every import of the file, wherever it stands."""
    package = (
        module_name(path) if path.rsplit("/", 1)[-1].startswith("__init__.") else module_name(path).rpartition(".")[0]
    )
    found: list[Import] = []

    def visit(node: ast.AST, top_level: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, top_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(filter(None, [*parents[: len(parents) - node.level + 1], node.module]))
            found.extend(Import(f"{base}.{alias.name}", node.lineno, top_level) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = dotted(node.func, {}) or ""
            loads = called.rsplit(".", 1)[-1] in {"import_module", "__import__"} or called in {
                "lazy.load",
                "lazy_loader.load",
            }
            if loads and isinstance(node.args[0].value, str):
                # lazy_loader.load puts the import off until the first use.
                found.append(Import(node.args[0].value, node.lineno, top_level and not called.endswith(".load")))
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, top_level)
            return
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top_level and not inside)

    visit(ast.parse(source), path.endswith(".py"))
    return found


def aliases(path: str, source: str) -> dict[str, str]:
    """What each imported name stands for: `import torch as t` gives `{"t": "torch"}`."""
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """`a.b.c` for an expression that is only names, with imported names spelled out."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else None
    return None


def calls(source: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def marked_lines(mark: str, source: str) -> set[int]:
    """Lines that bear `# mark: reason`. Text in strings does not count, nor does a mark without a reason."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    pattern = re.compile(rf"#\s*{mark}:\s*\w.{{6,}}")
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT and pattern.search(token.string)}


def must_be_marked(
    path: str, source: str, mark: str, files: dict[str, str], found: list[tuple[ast.Call, str]]
) -> list[str]:
    """Complaints about those of the `found` calls that bear no mark, or stand in a file that is not listed."""
    lines = marked_lines(mark, source)
    complaints = []
    for call, what in found:
        span = range(call.func.end_lineno or call.lineno, (call.end_lineno or call.lineno) + 1)
        if not lines.intersection(span):
            complaints.append(f"{path}:{span[0]}: {what} needs a comment `# {mark}: why` on its line")
        if path not in files:
            complaints.append(f"{path}:{span[0]}: {what}: the file is not in {mark.upper()}_FILES of this test")
    return complaints


# ------------------------------------------------------------------------------------------------------------ the rules


def breaks_layers(path: str, source: str) -> list[str]:
    """Imports that do not go downward."""
    unit = module_name(path).split(".")[1]
    if unit not in LAYER_OF:
        return [f"{path}: '{unit}' stands in no layer; give it one in LAYERS"]
    complaints = []
    for target, line, _ in imports(path, source):
        package, *rest = target.split(".")
        if package != "ftrain":
            continue
        other = rest[0] if rest else ""
        if other not in LAYER_OF:
            complaints.append(
                f"{path}:{line}: imports {target} through the public door; import the module that defines it"
            )
        elif other != unit and LAYER_OF[other] >= LAYER_OF[unit]:
            peers = LAYER_OF[other] == LAYER_OF[unit]
            if not (peers and (unit in GROUND or unit in EDGES)):
                complaints.append(
                    f"{path}:{line}: {unit} imports {other}, which is {'beside' if peers else 'above'} it"
                )
    return complaints


def circles(sources: dict[str, str]) -> list[str]:
    """Circular imports between modules, one complaint for each circle that a depth-first walk closes."""
    modules = {module_name(path) for path in sources}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for path, source in sources.items():
        for target, *_ in imports(path, source):
            module = target if target in modules else target.rpartition(".")[0]  # `from a.b import name` imports a.b
            graph[module_name(path)] |= {module} & modules - {module_name(path)}
    complaints: list[str] = []
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            complaints.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())
    return complaints


def hides_imports(path: str, source: str) -> list[str]:
    """Lazy packages declare their names in a stub, where the rules above see them."""
    names = aliases(path, source)
    return [
        f"{path}:{call.lineno}: lazy_loader.attach hides its imports from this test; use attach_stub"
        for call in calls(source)
        if dotted(call.func, names) == "lazy_loader.attach"
    ]


def leaves_confinement(path: str, source: str) -> list[str]:
    """Third-party packages imported outside the one place that may."""
    complaints = []
    for target, line, _ in imports(path, source):
        home = CONFINED.get(target.split(".")[0])
        if home and not (path.startswith(home) if home.endswith("/") else path == home):
            complaints.append(f"{path}:{line}: imports {target}; only {home} may")
    return complaints


def imports_heavy_at_top(path: str, source: str) -> list[str]:
    """Packages that only a function needs, imported when the module is."""
    return [
        f"{path}:{line}: imports {target} at the top; import it inside the function that uses it"
        for target, line, top_level in imports(path, source)
        if top_level and target.split(".")[0] in NEVER_AT_TOP_LEVEL
    ]


def compiles(path: str, source: str) -> list[str]:
    """`torch.compile`, under whatever name, outside the compile boundary."""
    if path == COMPILE_FILE:
        return []
    names = aliases(path, source)
    found = [
        (node, dotted(node, names))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute | ast.Name)
    ]
    uses = {(node.lineno, name) for node, name in found if name in COMPILERS}
    uses |= {(line, target) for target, line, _ in imports(path, source) if target in COMPILERS}
    return [f"{path}:{line}: {name}; only {COMPILE_FILE} compiles" for line, name in sorted(uses)]


def syncs(path: str, source: str) -> list[str]:
    """Calls that wait for the device, unmarked. (`float(tensor)` cannot be told from `float(x)` here; law 10's test counts it.)"""
    if path.startswith(SYNC_FREE):
        return []
    found = [
        (call, f".{call.func.attr}()")
        for call in calls(source)
        if isinstance(call.func, ast.Attribute) and call.func.attr in SYNC_METHODS
    ]
    return must_be_marked(path, source, "sync", SYNC_FILES, found)


def mutates(path: str, source: str) -> list[str]:
    """In-place tensor methods (`x.add_()`, `torch._foreach_copy_()`) and `out=`, unmarked, outside the compile boundary."""
    if path == COMPILE_FILE:
        return []
    found = []
    names = aliases(path, source)
    for call in calls(source):
        name = (dotted(call.func, names) or "").rsplit(".", 1)[-1]
        if isinstance(call.func, ast.Attribute):
            name = call.func.attr
        if name.endswith("_") and not name.endswith("__") and name != "_" and name not in NOT_IN_PLACE:
            found.append((call, f"{name}()"))
        elif (dotted(call.func, names) or "").startswith("torch.") and any(word.arg == "out" for word in call.keywords):
            found.append((call, f"{name}(out=...)"))
    return must_be_marked(path, source, "mutates", MUTATES_FILES, found)


def loads_code(path: str, source: str) -> list[str]:
    """Ways in which a loaded file could run code (law 14)."""
    names = aliases(path, source)
    complaints = [
        f"{path}:{line}: imports {target}; what is loaded must not run code"
        for target, line, _ in imports(path, source)
        if target.split(".")[0] in PICKLES
    ]
    for call in calls(source):
        words = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        if (
            dotted(call.func, names) in {"torch.load", "torch.serialization.load"}
            and words.get("weights_only") is not True
        ):
            complaints.append(f"{path}:{call.lineno}: torch.load without weights_only=True")
        if words.get("allow_pickle"):
            complaints.append(f"{path}:{call.lineno}: allow_pickle=True")
    return complaints


# ---------------------------------------------------------------------------------------------- no file of ftrain breaks


def package_sources() -> dict[str, str]:
    """Every source and stub of the package by its path, but for the public door, which imports everything."""
    package = ROOT / "ftrain"
    paths = sorted(path for suffix in ("*.py", "*.pyi") for path in package.rglob(suffix))
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in paths}
    return {path: source for path, source in sources.items() if path not in {"__init__.py", "__init__.pyi"}}


SOURCES = package_sources()


def complaints_about_the_package(rule):
    return "\n".join(complaint for path, source in SOURCES.items() for complaint in rule(path, source))


def test_there_is_something_to_read():
    assert {"state.py", "steps/compile.py", "loops/fit.py"} <= SOURCES.keys()


def test_imports_go_downward():
    assert not complaints_about_the_package(breaks_layers)


def test_no_circular_imports():
    assert not circles(SOURCES)


def test_lazy_packages_use_stubs():
    assert not complaints_about_the_package(hides_imports)


def test_third_party_packages_stay_in_their_place():
    assert not complaints_about_the_package(leaves_confinement)


def test_heavy_packages_are_not_imported_at_the_top():
    assert not complaints_about_the_package(imports_heavy_at_top)


def test_one_file_compiles():
    assert not complaints_about_the_package(compiles)


def test_syncs_are_marked():
    assert not complaints_about_the_package(syncs)


def test_mutations_are_marked():
    assert not complaints_about_the_package(mutates)


def test_nothing_that_is_loaded_runs_code():
    assert not complaints_about_the_package(loads_code)


@pytest.mark.parametrize(("mark", "files"), [("sync", SYNC_FILES), ("mutates", MUTATES_FILES)])
def test_lists_are_not_stale(mark, files):
    for path in files:
        assert path in SOURCES, f"{path} is listed, but does not exist"
        assert marked_lines(mark, SOURCES[path]), f"{path} is listed, but has no `# {mark}:`"


# ---------------------------------------------------------------------------------------- each rule fires where it should

PLANTED = [
    (breaks_layers, "state.py", "from .optim import adam", "above"),
    (breaks_layers, "tree.py", "import ftrain.steps.grad", "above"),
    (breaks_layers, "optim/adam.py", "from ..steps.grad import value_and_grad", "above"),
    (breaks_layers, "optim/adam.py", "from ftrain.steps import grad", "above"),
    (breaks_layers, "optim/adam.py", "def f():\n    from ftrain import loops", "above"),
    (
        breaks_layers,
        "optim/adam.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..loops import fit",
        "above",
    ),
    (breaks_layers, "optim/__init__.pyi", "from ..loops.fit import fit as fit", "above"),
    (breaks_layers, "optim/adam.py", "import importlib\nimportlib.import_module('ftrain.cli')", "above"),
    (breaks_layers, "optim/adam.py", "import lazy_loader as lazy\nx = lazy.load('ftrain.cli')", "above"),
    (breaks_layers, "steps/train.py", "from ..loops.fit import fit", "above"),
    (breaks_layers, "loops/fit.py", "from ..checkpoint.store import save", "above"),
    (breaks_layers, "parallel/mesh.py", "from ..testing import check_step", "above"),
    (breaks_layers, "optim/adam.py", "from ..data import source", "beside"),
    (breaks_layers, "data/source.py", "from .. import sinks", "beside"),
    (breaks_layers, "sinks/console.py", "from ..optim import schedules", "beside"),
    (breaks_layers, "checkpoint/store.py", "from ..parallel import mesh", "beside"),
    (breaks_layers, "testing/laws.py", "import ftrain as ft", "public door"),
    (breaks_layers, "loops/fit.py", "from .. import init", "public door"),
    (breaks_layers, "shiny/new.py", "", "stands in no layer"),
    (hides_imports, "optim/__init__.py", "import lazy_loader as lazy\nlazy.attach(__name__, ['adam'])", "attach_stub"),
    (leaves_confinement, "loops/fit.py", "def f():\n    import orbax.checkpoint as ocp", "only checkpoint/ may"),
    (leaves_confinement, "bridges/jax.py", "from jax import numpy", "only checkpoint/ may"),
    (leaves_confinement, "sinks/console.py", "import wandb", "only sinks/wandb.py may"),
    (imports_heavy_at_top, "sinks/console.py", "from rich.live import Live", "at the top"),
    (
        imports_heavy_at_top,
        "sinks/plots.py",
        "try:\n    import matplotlib.pyplot as plt\nexcept ImportError:\n    plt = None",
        "at the top",
    ),
    (imports_heavy_at_top, "sinks/console.py", "class A:\n    from IPython import display", "at the top"),
    (compiles, "steps/train.py", "import torch\nf = torch.compile(g)", "torch.compile"),
    (compiles, "steps/train.py", "import torch\n@torch.compile\ndef f(): ...", "torch.compile"),
    (compiles, "steps/train.py", "import torch as t\nf = map(t.compile, fs)", "torch.compile"),
    (compiles, "parallel/fsdp.py", "def f():\n    from torch import compile as c\n    return c", "torch.compile"),
    (syncs, "steps/train.py", "loss.item()", "needs a comment"),
    (syncs, "optim/adam.py", "count.tolist()  # sync:", "needs a comment"),
    (syncs, "rng.py", "f(\n    x.cpu(),\n    y,  # sync: not the line of the call\n)", "needs a comment"),
    (syncs, "rng.py", "x.numpy()  # sync: a good reason, but the file is not listed", "SYNC_FILES"),
    (mutates, "optim/adam.py", "p.add_(g)", "needs a comment"),
    (mutates, "optim/adam.py", "import torch\ntorch._foreach_copy_(a, b)", "needs a comment"),
    (mutates, "optim/adam.py", "import torch\ntorch.add(a, b, out=c)", "out="),
    (mutates, "optim/adam.py", "from torch import relu_\nrelu_(x)", "needs a comment"),
    (mutates, "optim/adam.py", "s = '# mutates: this is a string'; p.copy_(s)", "needs a comment"),
    (mutates, "optim/adam.py", "p.copy_(q)  # mutates: a good reason, but the file is not listed", "MUTATES_FILES"),
    (loads_code, "checkpoint/store.py", "def f():\n    import pickle", "must not run code"),
    (loads_code, "checkpoint/store.py", "from cloudpickle import loads", "must not run code"),
    (loads_code, "checkpoint/store.py", "import torch\ntorch.load(path)", "weights_only"),
    (loads_code, "checkpoint/store.py", "from torch import load\nload(path, weights_only=False)", "weights_only"),
    (loads_code, "data/arrays.py", "import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle"),
]

ALLOWED = [
    (breaks_layers, "state.py", "from .tree import map_tree\nfrom . import rng"),
    (breaks_layers, "optim/adam.py", "from ..state import TrainState\nfrom .chain import chain\nimport ftrain.tree"),
    (breaks_layers, "cli/main.py", "from ..checkpoint import store\nfrom ..tune import lr_find"),
    (hides_imports, "optim/__init__.py", "import lazy_loader as lazy\nlazy.attach_stub(__name__, __file__)"),
    (leaves_confinement, "checkpoint/store.py", "import orbax.checkpoint as ocp\nimport jax"),
    (leaves_confinement, "sinks/wandb.py", "def f():\n    import wandb"),
    (leaves_confinement, "loops/fit.py", "from ..sinks.wandb import wandb"),
    (imports_heavy_at_top, "sinks/console.py", "def f():\n    from rich.live import Live"),
    (
        imports_heavy_at_top,
        "sinks/console.py",
        "import typing\nif typing.TYPE_CHECKING:\n    from rich.live import Live",
    ),
    (compiles, "steps/compile.py", "import torch\ntorch.compile(f)"),
    (compiles, "loops/fit.py", "import re\nfrom ..steps.compile import compile\nre.compile('x'), compile(f)"),
    (syncs, "loops/history.py", "x.tolist()"),
    (syncs, "testing/laws.py", "x.item()"),
    (syncs, "steps/train.py", "dict(a=1).items()\nx.numpy"),
    (mutates, "steps/compile.py", "p.copy_(q)"),
    (mutates, "steps/grad.py", "p.detach().requires_grad_()\nx.__init__()\n_(x)\nx._private()"),
    (loads_code, "checkpoint/store.py", "import torch\ntorch.load(path, weights_only=True)"),
]


def planted_id(value):
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("rule", "path", "source", "text"), PLANTED, ids=planted_id)
def test_rule_fires(rule, path, source, text):
    complaints = rule(path, source)
    assert any(text in complaint for complaint in complaints), complaints


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED, ids=planted_id)
def test_rule_allows(rule, path, source):
    assert rule(path, source) == []


@pytest.mark.parametrize(
    ("rule", "files", "source"),
    [
        (syncs, SYNC_FILES, "x.item()  # sync: once per epoch"),
        (mutates, MUTATES_FILES, "x.add_(\n    1\n)  # mutates: a private buffer"),
    ],
    ids=planted_id,
)
def test_marked_and_listed_is_allowed(monkeypatch, rule, files, source):
    monkeypatch.setitem(files, "steps/planted.py", "planted")
    assert rule("steps/planted.py", source) == []


def test_a_circle_is_found_through_lazy_imports():
    sources = {
        "optim/__init__.py": "from .a import x",
        "optim/a.py": "def f():\n    from .b import y",
        "optim/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x",
        "optim/c.py": "from . import b",
    }
    assert circles(sources) == ["ftrain.optim.a -> ftrain.optim.b -> ftrain.optim.a"]


def test_a_circle_is_found_through_a_package():
    sources = {"optim/__init__.pyi": "from .a import x as x", "optim/a.py": "from . import y"}
    assert circles(sources) == ["ftrain.optim -> ftrain.optim.a -> ftrain.optim"]
