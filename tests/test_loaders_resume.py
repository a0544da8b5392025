"""Every loader with a state of its own, under `fit`: cut by a limit, a signal or an error, also at the last batch of an epoch."""

import os
import signal

import pytest
import torch

import ftrain as ft

from .test_loaders import STATEFUL
from .test_resume import Memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 on torch 2.13
    pytest.mark.filterwarnings("ignore::ftrain.errors.DataWarning"),
]

MODEL, TX = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)


def run(make, how=None, at=None, found=None):
    """What a run of three epochs reads; one that is cut gives its snapshot, too."""
    seen = []

    def step(state, batch):
        leaves = ft.tree.leaves(batch)
        seen.append([torch.as_tensor(leaf).clone() for leaf in leaves])
        return state.advance(len(leaves[0])), {}

    def hook(state, event):
        if event.step == at and how == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        if event.step == at and how == "error":
            raise OSError("cut")
        return state

    saver = Memory(ft.every(epochs=99), found)
    limits = {"steps": at} if how == "limit" else {"epochs": 3}
    options = {"progress": False, "compile": False, "checkpoint": saver, "hooks": [ft.on("step", hook)]}
    try:
        ft.fit(ft.init(MODEL, TX, seed=7), step, make(), resume="auto", **limits, **options)
    except OSError:
        assert how == "error"
    return seen, saver.shots[-1] if saver.shots else None


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_loader_is_read_on_where_it_was_left(kind):
    make = STATEFUL[kind]
    whole, _ = run(make)
    epoch = len(whole) // 3
    # Each way of ending once, all of them at the end of the epoch, which only an open loader can tell from its start.
    for how, at in (("limit", epoch), ("signal", epoch), ("error", epoch), ("limit", 1)):
        first, shot = run(make, how, at)
        rest, _ = run(make, found=shot)
        assert len(first) + len(rest) == len(whole), (how, at)
        for one, two in zip([*first, *rest], whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), (how, at)


@pytest.mark.parametrize(
    "give",
    [list, iter, lambda batches: ft.data.source({"x": torch.cat(batches)}).batch(2)],
    ids=["list", "iter", "source"],
)
def test_a_place_is_the_same_whether_or_not_one_looked_ahead(give) -> None:
    model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)

    def step(state, batch):
        return state.advance(2), {}

    batches = [torch.full((2, 1), float(i)) for i in range(4)]
    for tick in ft.loop(ft.init(model, tx), step, lambda epoch: give(batches)):
        place = tick.position().data
        tick.last()
        assert tick.position().data == place == {"batch": tick.batch + 1}
