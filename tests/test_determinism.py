"""`ft.deterministic`: sets every switch, and puts each back however it is left."""

import os
import warnings

import pytest
import torch

import ftrain as ft
from ftrain.errors import ArgumentError, DeterminismWarning
from ftrain.inspect import determinism

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
NAMES = ("algorithms", "warn_only", "cudnn", "benchmark", "fill", "cublas")
ON = (True, False, True, False, True, ":4096:8")


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch._C._get_cudnn_deterministic(),
        torch._C._get_cudnn_benchmark(),
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(CUBLAS),
    )


def put(*switches):
    algorithms, warn_only, cudnn, benchmark, fill, cublas = switches
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
    torch._C._set_cudnn_deterministic(cudnn)
    torch._C._set_cudnn_benchmark(benchmark)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    os.environ.pop(CUBLAS, None)
    if cublas is not None:
        os.environ[CUBLAS] = cublas


@pytest.fixture(autouse=True)
def as_before():
    before = switches()
    yield
    put(*before)


START = {
    "all off": (False, False, False, False, False, None),
    "benchmark": (False, False, False, True, True, None),
    "warned": (True, True, False, True, False, ":0:0"),
    "on": (True, False, True, False, True, ":16:8"),
}


@pytest.mark.parametrize("start", START.values(), ids=START)
@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.parametrize("leave", ["end", "exception", "decorated"])
def test_every_switch_is_set_and_put_back(start, warn_only, leave):
    put(*start)
    seen = []

    def look():
        seen.append(switches())

    def fail():
        look()
        raise ZeroDivisionError

    if leave == "end":
        with ft.deterministic(warn_only=warn_only):
            look()
    elif leave == "exception":
        with pytest.raises(ZeroDivisionError), ft.deterministic(warn_only=warn_only):
            fail()
    else:
        ft.deterministic(warn_only=warn_only)(look)()
    cublas = start[-1] if start[-1] == ":16:8" else ":4096:8"  # a value that is good already stays
    assert seen == [(True, warn_only, True, False, True, cublas)]
    assert switches() == start


def test_nested_and_entered_again():
    put(*START["benchmark"])
    context = ft.deterministic()
    with context:
        with ft.deterministic(warn_only=True):
            assert switches() == (True, True, *ON[2:])
            with context:  # the same value, inside itself
                assert switches() == ON
            assert switches() == (True, True, *ON[2:])
        assert switches() == ON
    assert switches() == START["benchmark"]
    with context:
        assert switches() == ON
    assert switches() == START["benchmark"]


def test_a_decorated_function_may_call_itself():
    @ft.deterministic()
    def down(n):
        assert switches() == ON
        return n if n == 0 else down(n - 1)

    put(*START["all off"])
    assert down(3) == 0
    assert switches() == START["all off"]


def test_what_has_no_deterministic_algorithm_is_refused_inside_only():
    def put_():
        return torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))

    put_()
    with ft.deterministic():
        assert torch.empty(4).isnan().all()  # memory that nobody filled has a known value
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            put_()
    with ft.deterministic(warn_only=True), pytest.warns(UserWarning, match="put_ does not have a deterministic"):
        put_()
    put_()


def test_a_run_inside_gives_what_it_gives_outside():
    model, tx = torch.nn.Linear(3, 1), ft.optim.adam(0.1)
    step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    state, data = ft.init(model, tx, seed=0), [torch.ones(4, 3)] * 3
    plain = ft.fit(state, step, data, progress=False, compile=False)
    with ft.deterministic():
        inside = ft.fit(state, step, data, progress=False, compile=False)
    for a, b in zip(ft.tree.leaves(plain.state), ft.tree.leaves(inside.state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("found", [None, ":0:0"])
def test_cublas_set_too_late_is_said(monkeypatch, found):
    put(*START["all off"][:-1], found)
    monkeypatch.setattr(determinism, "_cuda_in_use", lambda: True)
    before = switches()
    with pytest.warns(DeterminismWarning, match=f"{CUBLAS} is set too late to count: CUDA is in use already"):  # noqa: SIM117
        with ft.deterministic():
            assert os.environ[CUBLAS] == ":4096:8"
    assert switches() == before
    with warnings.catch_warnings():  # the warning as an error: nothing was set yet
        warnings.simplefilter("error")
        with pytest.raises(DeterminismWarning, match=r"before the first use of CUDA"), ft.deterministic():
            raise AssertionError("not reached")
    assert switches() == before


def test_cublas_set_in_time_is_not_mentioned(monkeypatch):
    monkeypatch.setattr(determinism, "_cuda_in_use", lambda: True)
    put(*START["on"])
    with ft.deterministic():  # warnings are errors here
        assert os.environ[CUBLAS] == ":16:8"


def test_bad_input():
    with pytest.raises(ArgumentError, match=r"(?s)warn_only= is a bool.*got:\s+'yes'") as caught:
        ft.deterministic(warn_only="yes")
    assert "ft.deterministic(warn_only=True)" in str(caught.value)
