"""`ft.find_batch_size`: the size that it finds fits, the next does not, and nothing of the caller's is touched."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain import tree
from ftrain.tune.batch_sizes import _search
from ftrain.tune.peak import peak

WIDE = 256


class Square(torch.autograd.Function):
    """Keeps nothing but its input, so that what a step takes can be counted by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x * 2


def made(rows=None, said="CUDA out of memory. Tried to allocate 2 GiB", **given):
    torch.manual_seed(0)
    model, tx = nn.Linear(WIDE, 1), ft.optim.sgd(0.01)

    def loss_fn(model, batch):
        if rows is not None and len(batch) > rows:
            raise torch.OutOfMemoryError(said)
        return model(batch).square().mean()

    return ft.init(model, tx, seed=1), ft.train_step(model, loss_fn, tx, **given)


def needed(state, step, n):
    """Bytes, measured here and not by the search."""

    def run():
        batch = torch.ones(1, WIDE).index_select(0, torch.zeros(n, dtype=torch.int64))
        one, fast = state.copy(), ft.compile(step, rung="eager")
        for _ in range(3):
            one, _ = fast(one, batch)

    return peak(run, torch.device("cpu"))


def find(state, step, data=None, **given):
    given = {"start": 1, "memory": 1 << 30, "limit": 1 << 12, "compile": False} | given
    return ft.find_batch_size(state, step, torch.ones(1, WIDE) if data is None else data, **given)


# ------------------------------------------------------------------------------------------------- what the memory allows


@pytest.mark.parametrize("memory", [100_000, 250_000, 1_000_003])
def test_the_exact_boundary(memory):
    state, step = made()
    found = find(state, step, memory=memory, mode="bisect")
    assert found.limited == "memory"
    assert needed(state, step, found.size) <= memory < needed(state, step, found.size + 1)
    fits = {trial.size: trial.fits for trial in found.trials}
    assert fits[found.size]
    assert not fits[found.size + 1]


def test_a_model_whose_memory_is_known():
    # A sample costs its row in the batch, and little else: 4 * WIDE bytes. The boundary is where n rows fill the memory.
    state, step = made()
    sizes = [needed(state, step, n) for n in (1000, 2000, 3000)]
    per_row = (sizes[1] - sizes[0]) / 1000
    assert per_row == (sizes[2] - sizes[1]) / 1000
    assert 4 * WIDE <= per_row <= 4 * WIDE + 64
    memory = int(sizes[0] + 500 * per_row)
    assert find(state, step, memory=memory, mode="bisect").size == 1500


def test_powers_of_two():
    state, step = made()
    found = find(state, step, memory=1_000_000)
    assert [trial.size for trial in found.trials] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert (found.size, found.largest) == (512, 512)
    peaks = [trial.peak for trial in found.trials]
    assert all(a < b for a, b in itertools.pairwise(peaks))
    assert [trial.fits for trial in found.trials] == [one <= 1_000_000 for one in peaks]
    assert find(state, step, memory=1_000_000, start=3).size == 768


def test_batch_norm_can_be_tried():
    model, tx = nn.Sequential(nn.Linear(WIDE, 4), nn.BatchNorm1d(4)), ft.optim.sgd(0.01)
    step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    found = ft.find_batch_size(ft.init(model, tx), step, torch.ones(1, WIDE), memory=1 << 20, limit=16, compile=False)
    assert [trial.size for trial in found.trials] == [2, 4, 8, 16]


def test_a_start_that_is_too_large():
    state, step = made()
    powers = find(state, step, memory=200_000, start=1024)
    assert (powers.size, powers.trials[0].size) == (128, 1024)
    assert (
        find(state, step, memory=200_000, start=1024, mode="bisect").size
        == find(state, step, memory=200_000, mode="bisect").size
    )


def test_the_limit_the_margin_and_multiples():
    state, step = made()
    found = find(state, step, limit=100)
    assert (found.size, found.limited, found.trials[-1].size) == (100, "limit", 100)
    assert find(state, step, limit=100, margin=0.1).size == 90
    found = find(state, step, limit=100, multiple=8, margin=0.1)
    assert (found.size, found.largest) == (80, 96)
    assert all(trial.size % 8 == 0 for trial in found.trials)
    assert find(state, step, limit=1, margin=0.9).size == 1


@pytest.mark.parametrize("boundary", [1, 2, 3, 7, 8, 9, 100, 127, 128, 4096])
@pytest.mark.parametrize("first", [1, 3, 64, 4096])
def test_the_search_finds_any_boundary(boundary, first):
    tried = []

    def fits(n):
        tried.append(n)
        return n <= boundary

    assert _search(fits, first, 5000, 1, "bisect") == (boundary, "memory")
    assert len(tried) == len(set(tried)) < 30
    size, _ = _search(fits, first, 5000, 1, "power")
    assert boundary / 2 <= size <= boundary
    assert _search(lambda n: False, first, 5000, 1, "bisect") == (None, "memory")
    assert _search(lambda n: False, first, 5000, 1, "power") == (None, "memory")
    size, _ = _search(fits, 4, 5000, 4, "bisect")
    assert size == (boundary // 4 * 4 or None)


# ------------------------------------------------------------------------------------------------------ when it runs out


@pytest.mark.parametrize("mode", ["power", "bisect"])
def test_real_errors_of_memory_are_caught(mode):
    state, step = made(rows=100)
    found = find(state, step, mode=mode)
    assert found.size == (64 if mode == "power" else 100)
    last = next(trial for trial in found.trials if not trial.fits)
    assert (last.size, last.peak, last.error) == (128, None, "CUDA out of memory. Tried to allocate 2 GiB")


def test_an_allocation_that_the_system_refuses():
    state, step = made()

    def make(n):
        torch.empty((1 << 60) if n > 4 else n, dtype=torch.uint8)  # more than any address space holds
        return torch.ones(n, WIDE)

    found = find(state, step, make)
    assert found.size == 4
    assert "can't allocate memory" in found.trials[-1].error


def test_what_a_trial_took_is_given_back():
    alive = []

    class Batch(torch.Tensor):
        pass

    def make(n):
        batch = torch.ones(n, WIDE)
        alive.append(__import__("weakref").ref(batch))
        assert sum(one() is not None for one in alive) == 1
        return batch

    state, step = made(rows=20)
    assert find(state, step, make, mode="bisect").size == 20
    assert sum(one() is not None for one in alive) == 0


def test_other_errors_come_through():
    def loss_fn(model, batch):
        raise RuntimeError("a shape is wrong")

    model, tx = nn.Linear(WIDE, 1), ft.optim.sgd(0.1)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        find(ft.init(model, tx), ft.train_step(model, loss_fn, tx))


def test_nothing_fits():
    state, step = made()
    with pytest.raises(ft.errors.BatchError, match=r"not even the smallest batch fits[\s\S]*at most 100 bytes"):
        find(state, step, memory=100)
    with pytest.raises(ft.errors.BatchError, match=r"not even the smallest batch[\s\S]*CUDA out of memory"):
        find(*made(rows=0))


# ------------------------------------------------------------------------------------------------- what is left as it was


def test_nothing_of_the_callers_is_touched(rng_guard):
    state, step = made()
    before = [leaf.clone() for leaf in tree.leaves(state)]

    def make(n):
        random.random(), np.random.rand(), torch.rand(1)
        return torch.ones(n, WIDE)

    with rng_guard():
        find(state, step, make, limit=64)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(state), strict=True))
    assert state.counters().step == 0
    assert not torch._C._autograd._profiler_enabled()


def test_a_compiled_step_is_not_compiled_again_by_the_trials():
    state, step = made()
    fast = ft.compile(step, backend="eager")
    found = find(state, fast, limit=4, steps=2)
    assert found.size == 4
    assert (fast.compiles, fast.rung) == (0, None)
    ft.fit(state, fast, torch.ones(8, WIDE), batch_size=4, progress=False)
    assert (fast.compiles, fast.recompiles) == (1, [])


def test_arrays_are_repeated_and_functions_are_asked():
    seen = []

    def loss_fn(model, batch):
        seen.append(batch["x"][:, 0].tolist())
        return model(batch["x"]).square().mean()

    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.0)
    step = ft.train_step(model, loss_fn, tx)
    data = {"x": np.arange(3, dtype=np.float32)[:, None]}
    find(ft.init(model, tx), step, data, limit=4, steps=1)
    assert seen == [[0.0], [0.0, 1.0], [0.0, 1.0, 2.0, 0.0]]
    find(ft.init(model, tx), step, lambda n: {"x": np.ones((n, 1), dtype=np.float32)}, limit=2, steps=2)
    assert [len(one) for one in seen[3:]] == [1, 1, 2, 2]


def test_accumulation_wants_multiples():
    state, step = made(accumulate=4)
    found = find(state, step, multiple=4, memory=300_000, mode="bisect")
    assert found.size % 4 == 0
    with pytest.raises(ft.errors.BatchError) as caught:
        find(state, step)
    assert "multiple=4" in caught.value.__notes__[-1]


def test_the_table():
    found = find(*made(rows=2), limit=4)
    lines = repr(found).splitlines()
    assert lines[0] == "BatchSizeFound(size=2, largest=2, limited by memory)"
    assert [line.split()[:2] for line in lines[2:]] == [["1", "yes"], ["2", "yes"], ["4", "no"]]
    assert "ran out" in lines[-1]


def normed():
    torch.manual_seed(0)
    model, tx = nn.Sequential(nn.Linear(WIDE, 8), nn.BatchNorm1d(8)), ft.optim.sgd(0.01)
    return ft.init(model, tx, seed=1), ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)


@pytest.mark.parametrize(("start", "mode"), [(8, "power"), (8, "bisect"), (2, "power")])
def test_a_batch_norm_that_wants_two_samples_does_not_hide_that_memory_is_short(start, mode):
    with pytest.raises(ft.errors.BatchError) as caught:
        find(*normed(), start=start, mode=mode, memory=20_000)
    text = str(caught.value)
    assert text.startswith("ft.find_batch_size: not even the smallest batch fits into memory.\n  where:    2 samples")
    assert "expected: at most 20000 bytes (19.5 KiB)" in text
    took = int(text.partition("got:")[2].split()[0])
    assert took == needed(*normed(), 2)
    assert "cause:    the step works with no smaller one: ValueError: Expected more than 1 value per channel" in text
    assert 'remat="blocks.*"' in text
    assert f"or memory={took}, and more" in text
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_the_step_comes_through_where_memory_is_not_short():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        find(*normed(), start=1)
    assert "in ft.find_batch_size, by the trial of 1 sample" in caught.value.__notes__[-1]
    state, _ = made()

    def step(state, batch):
        if len(batch) == 3:
            raise ValueError("three")
        return made(rows=3)[1](state, batch)

    with pytest.raises(ValueError, match="three") as caught:  # 2 fits, so that is not what hides a shortage
        find(state, step, mode="bisect")
    assert "by the trial of 3 samples" in caught.value.__notes__[-1]


# --------------------------------------------------------------------------------------------------------------- the peak


def test_the_peak_is_exact():
    def run():
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(2000, dtype=torch.uint8)
        del a
        c = torch.empty(500, dtype=torch.uint8)
        return b, c

    assert peak(run, torch.device("cpu")) == 3000


def test_the_peak_of_a_gradient():
    x = torch.randn(1000, requires_grad=True)
    # y, its square, the sum; then the gradients: of the square (expanded), times x, times 2
    taken = peak(lambda: torch.autograd.grad(Square.apply(x * 1.0).sum(), x), torch.device("cpu"))
    assert 8000 <= taken <= 20000


def test_the_peak_within_a_profiler_is_an_error():
    with (
        torch.autograd.profiler.profile(use_kineto=False),
        pytest.raises(ft.errors.LimitError, match="a profiler runs"),
    ):
        peak(lambda: None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"memory": None}, ft.errors.ArgumentError, "needs to know how much memory it may take on cpu"),
        ({"memory": 0}, ft.errors.LimitError, r"memory=0 makes no sense[\s\S]*got: +0[\s\S]*fix: +memory=4"),
        ({"memory": 1.5}, ft.errors.ArgumentError, "memory=1.5 makes no sense"),
        (
            {"start": 0},
            ft.errors.LimitError,
            r"start=0 makes no sense[\s\S]*integer >= 1[\s\S]*got: +0\n +fix: +start=2",
        ),
        ({"start": 2.0}, ft.errors.ArgumentError, r"start=2.0 makes no sense[\s\S]*fix: +start=2"),
        ({"steps": 0}, ft.errors.LimitError, r"steps=0 makes no sense[\s\S]*fix: +steps=3"),
        ({"limit": 0}, ft.errors.LimitError, r"limit=0 makes no sense[\s\S]*fix: +limit="),
        (
            {"mode": "binsearch"},
            ft.errors.LimitError,
            r"no mode='binsearch'[\s\S]*expected: 'power', 'bisect'[\s\S]*fix: +ft.find_batch_size\(..., mode='bisect'\)",
        ),
        ({"margin": 1.0}, ft.errors.LimitError, "margin=1.0 makes no sense"),
        ({"start": 8, "limit": 4}, ft.errors.LimitError, "there is no size to try"),
        ({"multiple": 8, "limit": 4}, ft.errors.LimitError, "there is no size to try"),
    ],
)
def test_arguments_that_make_no_sense(given, error, text):
    with pytest.raises(error, match=text):
        find(*made(), **given)


def test_data_that_makes_no_sense():
    state, step = made()
    with pytest.raises(ft.errors.BatchError, match="another number of samples than was asked for"):
        find(state, step, lambda n: torch.ones(3, WIDE))
    with pytest.raises(ft.errors.BatchError, match="the arrays are empty"):
        find(state, step, torch.ones(0, WIDE))
    with pytest.raises(ft.errors.DataError, match="a leaf of the data is no array"):
        find(state, step, {"x": "text"})
    with pytest.raises(ft.errors.StateError, match="a module stands where a step is needed"):
        find(state, nn.Linear(1, 1))
