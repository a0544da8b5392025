"""The guard that other tests rely on sees each of the global generators."""

import random

import numpy as np
import pytest
import torch


@pytest.mark.parametrize(
    ("name", "draw"),
    [("random", random.random), ("numpy.random", np.random.random), ("torch", lambda: torch.rand(()))],
)
def test_rng_guard_names_the_generator_that_changed(rng_guard, name, draw):
    with pytest.raises(AssertionError, match=rf"global generator of {name}\n"), rng_guard():
        draw()


def test_rng_guard_accepts_draws_from_private_generators(rng_guard):
    with rng_guard():
        torch.rand((), generator=torch.Generator().manual_seed(1))
        np.random.default_rng(1).random()
        random.Random(1).random()


def test_one_thread():
    assert torch.get_num_threads() == 1
