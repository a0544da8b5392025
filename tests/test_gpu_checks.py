"""The checks that wait for a GPU (tests/bench/around.py), on a CPU: that they run, and that they can fail."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ftrain as ft

BENCH = Path(__file__).parent / "bench"
SCRIPTS = ("around", "cases", "children", "gpu", "rounds", "syncs")
NAMES = (
    "hooks_wait_for_nothing",
    "hook_that_waits_is_seen",
    "hooks_are_resumed",
    "batch_size_is_found",
    "micro_batches_are_found",
    "peak_is_estimated",
    "profile_is_written",
    "deterministic_is_bitwise",
    "replay_is_bitwise",
    "predictions_are_right",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    import around
    import gpu

    yield {"around": around, "gpu": gpu}
    for name in SCRIPTS:  # scripts, whose names are nobody's
        sys.modules.pop(name, None)


def test_all_are_listed(bench: Any) -> None:
    assert tuple(check.__name__ for check in bench["around"].AROUND) == NAMES
    assert "around" in bench["gpu"].PARTS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::ftrain.errors.ProfileWarning")
def test_a_check_holds_on_a_cpu(bench: Any, name: str) -> None:
    found = getattr(bench["around"], name)("cpu")
    assert isinstance(found, str), "what gpu.py shows"
    assert found


def halved(old: Any) -> Any:
    """`ft.check` that tells half of the memory."""

    def check(*args: Any, **options: Any) -> Any:
        found = old(*args, **options)
        return dataclasses.replace(found, memory=found.memory._replace(peak=found.memory.peak // 2))

    return check


def another(old: Any) -> Any:
    """`ft.replay` whose state is off by the last bit of one number."""

    def replay(*args: Any, **options: Any) -> Any:
        found = old(*args, **options)
        state = found.state_after
        name, leaf = next(iter(state.params.items()))
        bits = leaf.detach().reshape(-1).view(torch.int32).clone()
        bits[0] ^= 1
        params = {**state.params, name: bits.view(torch.float32).reshape(leaf.shape)}
        return dataclasses.replace(found, state_after=state.replace(params=params))

    return replay


def smaller(old: Any) -> Any:
    """`ft.find_batch_size` that stops too early."""

    def find(*args: Any, **options: Any) -> Any:
        found = old(*args, **options)
        return dataclasses.replace(found, largest=found.largest - options["multiple"])

    return find


def shuffled(old: Any) -> Any:
    """`ft.write_predictions` with ids that are not those of the rows."""

    def write(*args: Any, **options: Any) -> Any:
        return old(*args, **{**options, "ids": lambda batch: batch["key"].flip(0)})

    return write


def forgetful(old: Any) -> Any:
    """`ft.once` that does not remember."""
    return lambda at, hook, *, name: ft.on(at, ft.Hook(name, lambda state: {}, lambda s, m, e: (hook(s, e), m)))


def one_more(old: Any) -> Any:
    """`ft.auto_accumulate` with more parts than it says."""

    def auto(make: Any) -> Any:
        return old(lambda k: make(8 if k == 4 else k))

    return auto


@pytest.mark.parametrize(
    "case",
    [
        ("peak_is_estimated", "check", halved, "update bound"),
        ("replay_is_bitwise", "replay", another, "step 3: 1 leaves differ: "),
        ("batch_size_is_found", "find_batch_size", smaller, "does not"),
        ("predictions_are_right", "write_predictions", shuffled, "rows stand beside the ids of others"),
        ("hooks_are_resumed", "once", forgetful, "called after the steps|leaves differ"),
        ("micro_batches_are_found", "auto_accumulate", one_more, "leaves differ"),
    ],
    ids=lambda case: case[0],
)
def test_a_check_fails_where_ftrain_does(
    bench: Any, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, Any, str]
) -> None:
    name, public, worse, says = case
    monkeypatch.setattr(ft, public, worse(getattr(ft, public)))
    with pytest.raises(AssertionError, match=says):
        getattr(bench["around"], name)("cpu")


def test_a_check_that_fails_is_said_and_the_next_one_runs(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(device: str) -> str:
        """One that fails."""
        raise AssertionError("off by one")

    def breaks(device: str) -> str:
        """One that breaks."""
        raise RuntimeError("no such kernel")

    def holds(device: str) -> str:
        """One that holds."""
        return f"on {device}"

    rows = [bench["gpu"]._verdict(check, "cpu") for check in (fails, breaks, holds)]
    assert rows == [
        ["One that fails", "FAIL", "off by one"],
        ["One that breaks", "ERROR", "RuntimeError: no such kernel"],
        ["One that holds", "PASS", "on cpu"],
    ]
    said = capsys.readouterr().err
    for text in ("check: One that fails\n  FAIL: off by one\n", "check: One that holds\n  PASS: on cpu\n"):
        assert text in said


def test_an_error_of_cuda_about_waiting_is_found_below_others(bench: Any) -> None:
    from syncs import raise_waits  # type: ignore[import-not-found]  # of tests/bench

    try:
        try:
            raise RuntimeError("called a synchronizing CUDA operation")
        except RuntimeError as error:
            raise ValueError("a hook failed") from error
    except ValueError as error:
        with pytest.raises(AssertionError, match="called a synchronizing CUDA operation"):
            raise_waits(error)
    raise_waits(RuntimeError("a shape is wrong"))
