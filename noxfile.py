"""Sessions: `nox --list` names them, `nox -s tests -- -k loop` hands what follows `--` to the tool.

Every session needs only Python and pip: it installs the package itself with the extra it needs, at the exact versions
of `tests/constraints.txt`, into an environment of its own.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "tests" / "constraints.txt"

nox.options.default_venv_backend = "venv"  # the standard library's; nothing beyond Python and pip is asked for
nox.options.reuse_venv = "yes"  # pip still brings a reused environment up to date, and installs the package anew
nox.options.sessions = ["tests", "lint", "types"]


def install(session: nox.Session, *requirements: str) -> None:
    # pip builds the package in an environment of its own, which sees constraints only through these variables.
    session.env["PIP_CONSTRAINT"] = session.env["PIP_BUILD_CONSTRAINT"] = CONSTRAINTS.as_uri()
    session.env["JAX_PLATFORMS"] = "cpu"  # JAX comes with Orbax and must not take an accelerator from torch
    session.install("-c", str(CONSTRAINTS), *requirements)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train a small CNN on scikit-learn's digits; prints a table and saves a plot."""
    install(session, ".[examples]")
    session.run("python", "examples/digits.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite on two workers, against the installed package."""
    install(session, ".[test]")
    session.run("pytest", "-n", "2", "--dist", "worksteal", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    # Only the linter: it reads source, so torch and the rest need not be installed.
    install(session, *nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["lint"])
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of ftrain/ strictly."""
    install(session, ".[types]")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Execute every code block of README.md and docs/, and every docstring's example."""
    install(session, ".[test]")
    session.run("pytest", "-n", "2", "tests/test_docs.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example in short form; arguments go to the language model."""
    install(session, ".[examples]")
    scripts = ROOT / "examples"
    with session.chdir(session.create_tmp()):  # plots land there
        session.run("python", str(scripts / "digits.py"))
        session.run("python", str(scripts / "byte_lm.py"), *(session.posargs or ("--steps", "60")))
        short = {
            "gan": ("--epochs", "30"),
            "finetune": (),
            "gradient_penalty": ("--steps", "600"),
            "maml": ("--steps", "800"),
            "sweep": (),
        }
        for name, arguments in short.items():  # uncompiled, some ten seconds each
            session.run("python", str(scripts / f"{name}.py"), *arguments)


@nox.session
def crash(session: nox.Session) -> None:
    """Kill a run with `kill -9` 100 times, also in the middle of saves: it must end as one that was never killed."""
    install(session, ".[test]")
    session.run("python", "-m", "tests.crash", *(session.posargs or ("--kills", "100")))


@nox.session
def bench(session: nox.Session) -> None:
    """Time ftrain beside hand-written loops and Lightning; prints ratios."""
    install(session, ".[bench]")
    session.run("python", "tests/bench/run.py", *session.posargs)
