"""A run that goes on elsewhere compiles in the order in which the first process did (law 6 for compiled steps)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftrain as ft

from .test_resume import Memory, assert_same

X, Y = torch.randn(69, 32, generator=torch.Generator().manual_seed(0)), torch.arange(69) % 5


def make():
    """A new step each time, so that nothing is compiled for it yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 33), nn.LayerNorm(33), nn.GELU(), nn.Dropout(0.1), nn.Linear(33, 5))
    tx = ft.optim.adamw(1e-2)
    step = ft.train_step(model, lambda m, batch: F.cross_entropy(m(batch["x"]), batch["y"]), tx)
    return ft.init(model, tx, seed=1), ft.compile(step, backend=make.backend)


def go(saver=None, data=None, **options):
    state, step = make()
    arguments = {"data": {"x": X, "y": Y}, "batch_size": 16} if data is None else {"data": data}
    result = ft.fit(
        state, step, arguments.pop("data"), epochs=2, progress=False, checkpoint=saver, **arguments, **options
    )
    return result, step


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_going_on_right_before_the_short_batch(backend):
    make.backend = backend
    saver = Memory(ft.every(steps=1))
    whole, step = go(saver)
    assert [rows[0][1][0] for rows in step.shapes()] == [16, 5]
    before_the_short_one = saver.shots[3]
    assert before_the_short_one.position.data == {"batch": 4}
    again, fresh = go(Memory(ft.every(epochs=9), before_the_short_one), resume="auto")
    assert_same(again, whole)
    assert fresh.shapes() == step.shapes()
    assert fresh.compiles == step.compiles


def test_windows_of_different_sizes_are_rehearsed_too():
    make.backend = "aot_eager"
    batches = [{"x": X[i : i + 16], "y": Y[i : i + 16]} for i in range(0, 64, 16)]
    data = ft.data.window(batches, 3)
    saver = Memory(ft.every(steps=1) | ft.every(epochs=1))
    whole, step = go(saver, data)
    assert [len(rows) for rows in step.shapes()] == [6, 2]
    again, fresh = go(Memory(ft.every(epochs=9), saver.shots[0]), data, resume="auto")
    assert_same(again, whole)
    assert fresh.shapes() == step.shapes()


def test_nothing_is_rehearsed_where_the_first_batch_is_the_same():
    make.backend = "aot_eager"
    saver = Memory(ft.every(steps=1))
    whole, _ = go(saver)
    again, fresh = go(Memory(ft.every(epochs=9), saver.shots[1]), resume="auto")
    assert_same(again, whole)
    assert fresh.compiles == 2
