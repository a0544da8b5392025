"""`ft.auto_accumulate`: where memory runs out, the step is made in more parts, from the same state, with the same result."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain import tree
from ftrain.tune.out_of_memory import is_out_of_memory

LIMIT = {"rows": math.inf}  # how many samples "fit in memory"
CALLS: list[int] = []


@torch.library.custom_op("ftrain_test::needs_memory", mutates_args=())
def needs_memory(x: torch.Tensor) -> torch.Tensor:
    CALLS.append(len(x))
    if len(x) > LIMIT["rows"]:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried {len(x)} rows.")
    return x.clone()


needs_memory.register_fake(torch.empty_like)
needs_memory.register_autograd(lambda ctx, grad: grad)


@pytest.fixture(autouse=True)
def _memory():
    LIMIT["rows"] = math.inf
    CALLS.clear()
    yield
    LIMIT["rows"] = math.inf


def loss_fn(model, batch):
    hidden = needs_memory(model[0](batch["x"]))
    return (model[1](hidden.tanh()) - batch["y"]).square().mean(), {"first": batch["x"][:, 0].mean()}


def made(dtype=torch.float64, wrap=lambda step: step, **given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to(dtype)
    tx = ft.optim.sgd(0.05, momentum=0.9)
    state = ft.init(model, tx, seed=1)
    return state, ft.auto_accumulate(lambda k: wrap(ft.train_step(model, loss_fn, tx, accumulate=k)), **given)


def plain(k=1, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to(dtype)
    tx = ft.optim.sgd(0.05, momentum=0.9)
    return ft.init(model, tx, seed=1), ft.train_step(model, loss_fn, tx, accumulate=k)


def arrays(n=64, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, generator=generator, dtype=dtype)
    return {"x": x, "y": x.sum(1, keepdim=True)}


def fitted(state, step, data=None, **given):
    given = {"batch_size": 16, "epochs": 2, "progress": False, "compile": False} | given
    return ft.fit(state, step, arrays() if data is None else data, **given)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a.params), tree.leaves(b.params), strict=True))


WAYS = [
    {"compile": False},
    {"compile": True, "backend": "eager"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.get("backend", "not compiled")))
def test_a_run_is_that_of_the_number_of_parts_that_was_found(way):
    state, step = made()
    before = [leaf.clone() for leaf in tree.leaves(state)]
    LIMIT["rows"] = 5
    with pytest.warns(ft.errors.MemoryWarning, match="16 samples in 1 part, so it is now cut into 4 of 4") as caught:
        found = fitted(state, step, **way)
    assert len(caught) == 1
    assert (step.k, step.rows, int(found.state.extra["auto_accumulate"]["rows"])) == (4, 4, 4)
    assert found.state.counters().step == 8
    assert same(found.state, fitted(*plain(4), **way).state)
    LIMIT["rows"] = math.inf
    one = fitted(*plain(1), **way).state
    assert not same(one, state)
    for name, leaf in one.params.items():
        torch.testing.assert_close(found.state.params[name], leaf, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(state), strict=True))
    assert found.history["first"] == pytest.approx(fitted(*plain(1), **way).history["first"])


def test_with_memory_enough_it_is_the_step_itself():
    state, step = made()
    found = fitted(state, step)
    assert (step.k, step.rows) == (1, None)
    assert same(found.state, fitted(*plain(1)).state)
    assert int(found.state.extra["auto_accumulate"]["rows"]) == 0


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.get("backend", "not compiled")))
def test_a_short_last_batch_is_cut_into_parts_that_are_no_larger(way):
    LIMIT["rows"] = 4
    state, step = made()
    with pytest.warns(ft.errors.MemoryWarning):
        found = fitted(state, step, arrays(38), **way)  # 16, 16, 6
    assert step.k == 2  # 6 = 2 x 3
    LIMIT["rows"] = math.inf
    whole = fitted(*plain(1), arrays(38), **way).state
    for name, leaf in whole.params.items():
        torch.testing.assert_close(found.state.params[name], leaf, rtol=1e-10, atol=1e-12)


def test_each_number_of_parts_is_tried_once_and_then_kept():
    LIMIT["rows"] = 4
    state, step = made()
    with pytest.warns(ft.errors.MemoryWarning):
        fitted(state, step, epochs=1)
    assert CALLS == [16, 8, 4, 4, 4, 4] + [4] * 12


def test_it_is_said_once_for_all_runs():
    LIMIT["rows"] = 4
    state, step = made()
    with pytest.warns(ft.errors.MemoryWarning):
        first = fitted(state, step)
    second = fitted(state, step)  # warnings are errors
    assert same(first.state, second.state)
    assert CALLS.count(16) == 2  # each run finds out for itself, so that none depends on another


def test_the_state_is_valid_after_a_compiled_donated_step_ran_out():
    LIMIT["rows"] = 4
    state, step = made()
    fast = ft.compile(step, backend="eager")
    batch = {name: leaf[:16] for name, leaf in arrays().items()}
    with pytest.warns(ft.errors.MemoryWarning):
        new, _ = fast(fast.init(state.copy()), batch)
    assert (fast.rung, fast.reason, fast.donate) == ("step", None, True)
    expected, _ = ft.compile(plain(4)[1], backend="eager")(state.copy(), batch)
    assert same(new, expected)
    assert new.counters() == expected.counters()
    again, _ = fast(new, batch)
    assert again.counters().step == 2
    with pytest.raises(ft.errors.DonatedStateError):
        _ = new.params  # donation goes on as ever


def test_running_out_later_with_a_state_that_was_given_away_is_an_error_that_says_so():
    state, step = made()
    fast = ft.compile(step, backend="eager")
    batch = {name: leaf[:16] for name, leaf in arrays().items()}
    state, _ = fast(fast.init(state), batch)
    LIMIT["rows"] = 4
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fast(state, batch)
    assert "cannot try again: the step had worked in 1 part(s)" in "\n".join(caught.value.__notes__)
    assert "start=2" in "\n".join(caught.value.__notes__)


def test_running_out_later_without_donation_is_tried_again():
    for way in ({"compile": False}, {"compile": False, "donate": True}):
        state, step = made()
        LIMIT["rows"] = math.inf

        def less(state, event):
            LIMIT["rows"] = 8
            return state

        with pytest.warns(ft.errors.MemoryWarning, match="cut into 2 of 8"):
            found = fitted(state, step, hooks=[ft.on(ft.at(3), less)], **way)
        assert (step.k, found.state.counters().step) == (2, 8)
    state, step = made()
    LIMIT["rows"] = math.inf
    slow = ft.compile(step, backend="eager", donate=False)
    batch = {name: leaf[:16] for name, leaf in arrays().items()}
    state, _ = slow(slow.init(state), batch)
    LIMIT["rows"] = 8
    with pytest.warns(ft.errors.MemoryWarning):
        new, _ = slow(state, batch)
    assert (new.counters().step, state.counters().step) == (2, 1)


def test_a_larger_batch_later_is_looked_at_again():
    state, step = made()
    fast = ft.compile(step, backend="eager")
    data = arrays()
    LIMIT["rows"] = 16
    state, _ = fast(fast.init(state), {name: leaf[:16] for name, leaf in data.items()})
    assert step.k == 1
    with pytest.warns(ft.errors.MemoryWarning, match="32 samples in 1 part, so it is now cut into 2 of 16"):
        state, _ = fast(state, {name: leaf[:32] for name, leaf in data.items()})
    state, _ = fast(state, data)
    assert (step.k, state.counters().step) == (4, 3)


@pytest.mark.parametrize("way", WAYS[:2], ids=["not compiled", "eager"])
def test_a_run_that_goes_on_elsewhere_goes_on_with_what_was_found(way, tmp_path):
    # Memory is short only for one long batch in the middle; after it, nothing but the state can tell.
    data = [{name: leaf[:n] for name, leaf in arrays().items()} for n in (16, 16, 32, 16, 16, 16)]
    LIMIT["rows"] = 16

    def run(folder, steps, step, state):
        ckpt = ft.Checkpoints(tmp_path / folder, every=ft.every(steps=1), keep=None)
        return fitted(state, step, data, batch_size=None, epochs=1, steps=steps, checkpoint=ckpt, resume="auto", **way)

    with pytest.warns(ft.errors.MemoryWarning):
        whole = run("whole", 6, *reversed(made(start=1)))
    with pytest.warns(ft.errors.MemoryWarning):
        run("parts", 4, *reversed(made()))
    state, step = made()
    CALLS.clear()
    found = run("parts", 6, step, state)  # warnings are errors: it does not run out again
    assert step.rows == 16
    assert same(whole.state, found.state)
    assert set(CALLS) == {16}


def test_windows_are_cut_within_their_batches():
    LIMIT["rows"] = 4
    state, step = made()
    data = [{name: leaf[i : i + 8] for name, leaf in arrays().items()} for i in range(0, 64, 8)]
    with pytest.warns(ft.errors.MemoryWarning, match="8 samples in 1 part, so it is now cut into 2 of 4"):
        found = fitted(state, step, ft.data.window(data, 2), batch_size=None, epochs=1)
    assert found.state.counters() == (4, 1, 64, 1)
    LIMIT["rows"] = math.inf
    whole = fitted(*plain(1), ft.data.window(data, 2), batch_size=None, epochs=1).state
    for name, leaf in whole.params.items():
        torch.testing.assert_close(found.state.params[name], leaf, rtol=1e-10, atol=1e-12)


def test_wrappers_stand_inside():
    LIMIT["rows"] = 8
    state, step = made(wrap=lambda step: ft.with_ema(step, 0.9))
    with pytest.warns(ft.errors.MemoryWarning):
        found = fitted(state, step)
    state, inner = plain(2)
    expected = fitted(state, ft.with_ema(inner, 0.9)).state
    ema = [found.state.extra["ema"].params, expected.extra["ema"].params]
    assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, ema), strict=True))


def test_dropout_is_that_of_the_number_of_parts_that_was_found():
    def dropped(model, batch):
        return torch.nn.functional.dropout(needs_memory(model(batch["x"])), 0.5).square().mean()

    torch.manual_seed(0)
    model, tx = nn.Linear(3, 4).double(), ft.optim.sgd(0.1)
    state = ft.init(model, tx, seed=1)
    LIMIT["rows"] = 8
    with pytest.warns(ft.errors.MemoryWarning):
        found = fitted(state, ft.auto_accumulate(lambda k: ft.train_step(model, dropped, tx, accumulate=k)))
    assert same(found.state, fitted(state, ft.train_step(model, dropped, tx, accumulate=2)).state)


def test_the_global_generators_stay_as_they_were(rng_guard):
    LIMIT["rows"] = 8
    state, step = made()
    with rng_guard(), pytest.warns(ft.errors.MemoryWarning):
        fitted(state, step)


def test_nothing_small_enough():
    LIMIT["rows"] = 0
    state, step = made()
    before = [leaf.clone() for leaf in tree.leaves(state)]
    with pytest.raises(torch.OutOfMemoryError, match="Tried 1 rows"):
        fitted(state, step)
    assert CALLS == [16, 8, 4, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(state), strict=True))
    CALLS.clear()
    with pytest.raises(torch.OutOfMemoryError, match="Tried 4 rows"):
        fitted(state, made(limit=5)[1])
    assert CALLS == [16, 8, 4]


def test_other_errors_come_through_at_once():
    def wrong(model, batch):
        CALLS.append(len(batch["x"]))
        raise RuntimeError("a shape is wrong")

    model, tx = nn.Linear(3, 1).double(), ft.optim.sgd(0.1)
    step = ft.auto_accumulate(lambda k: ft.train_step(model, wrong, tx, accumulate=k))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        fitted(ft.init(model, tx), step)
    assert CALLS == [16]


def test_what_the_memory_of_a_failed_attempt_held_is_free():
    alive = []

    class Big:
        pass

    def hungry(model, batch):
        big = Big()
        alive.append(__import__("weakref").ref(big))
        if len(batch["x"]) > 4:
            assert sum(one() is not None for one in alive) == 1  # that of the attempt before is gone
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return model(batch["x"]).square().mean()

    model, tx = nn.Linear(3, 1).double(), ft.optim.sgd(0.1)
    step = ft.auto_accumulate(lambda k: ft.train_step(model, hungry, tx, accumulate=k))
    with pytest.warns(ft.errors.MemoryWarning):
        fitted(ft.init(model, tx), step)


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            True,
        ),
        (MemoryError("Unable to allocate 2 GiB"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (ValueError("out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_means_out_of_memory(error, yes):
    assert is_out_of_memory(error) == yes
    outer = ft.errors.CompileError("the step does not compile")
    outer.__cause__ = error
    assert is_out_of_memory(outer) == yes


def test_a_real_failure_of_the_allocator_of_the_cpu_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space: nothing is allocated
    assert is_out_of_memory(caught.value)


def test_bad_input():
    step = plain()[1]
    with pytest.raises(ft.errors.ArgumentError, match="wants a function that makes the step"):
        ft.auto_accumulate(step)
    with pytest.raises(ft.errors.ArgumentError, match=r"make_step gave no step[\s\S]*make_step\(1\)"):
        ft.auto_accumulate(lambda k: None)
    with pytest.raises(ft.errors.LimitError, match=r"start=0 makes no sense[\s\S]*fix: +ft.auto_accumulate"):
        ft.auto_accumulate(lambda k: step, start=0)
    with pytest.raises(ft.errors.LimitError, match="start <= limit"):
        ft.auto_accumulate(lambda k: step, start=4, limit=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ft.errors.CompileWarning)
        state, auto = made()
        outer = ft.with_ema(auto)
        with pytest.raises(
            ft.errors.CompileError, match=r"stands inside a step that is compiled as a whole|does not compile"
        ):
            ft.compile(outer, rung="step", backend="eager")(outer.init(state), {k: v[:16] for k, v in arrays().items()})


def test_a_compiled_step_in_parts_takes_a_batch_of_another_size():
    # dynamo (2.13) has no divmod of a number that differs from batch to batch: the second size ran eagerly.
    state, step = plain(2)
    fast = ft.compile(step, backend="eager")
    for rows in (16, 6, 10):
        state, _ = fast(state, {name: leaf[:rows] for name, leaf in arrays().items()})
    assert (fast.compiles, fast.rung, state.counters().samples) == (2, "step", 32)
