"""What every test runs under: one thread, seeded generators, no accelerator for JAX, no display, no network."""

import os

# Before torch, JAX, matplotlib or wandb is imported, here and in the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # two workers share two cores; also the thread count that the published figures state

hypothesis.settings.register_profile("dev", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("dev"), max_examples=20)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same global generators, in whatever order and on whichever worker it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _global_generators() -> dict[str, object]:
    """A snapshot of every global generator, in forms that `==` compares."""
    name, keys, *rest = np.random.get_state()
    states: dict[str, object] = {
        "random": random.getstate(),
        "numpy.random": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_initialized():
        states["torch.cuda"] = [state.tolist() for state in torch.cuda.get_rng_state_all()]
    return states


@contextmanager
def _generators_unchanged() -> Iterator[None]:
    before = _global_generators()
    yield
    after = _global_generators()
    changed = [name for name, state in before.items() if after[name] != state]
    assert not changed, f"the block changed the global generator of {', '.join(changed)}"


@pytest.fixture
def rng_guard() -> Callable[[], AbstractContextManager[None]]:
    """`with rng_guard(): ...` fails if the block left a global generator of torch, numpy or random changed (law 8)."""
    return _generators_unchanged
