"""Learn to learn: first weights from which one step on ten points fits a sine wave never seen (MAML).

    python examples/maml.py
    python examples/maml.py --steps 10000 --inner-steps 2 --compile

The experiment of Finn, Abbeel & Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017,
section 5.1: amplitude in [0.1, 5], phase in [0, pi], x in [-5, 5]. A step of ftrain is a function, so it can be differentiated:
the gradient below is taken with `torch.func.grad` through calls of the inner `ft.train_step`, for all tasks at once by
`torch.func.vmap`. It has the form of any other gradient function, so accumulation (here over tasks), clipping and compilation
of the whole step go around it as usual. Beside it stands training on all waves at once, which learns their mean.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

import ftrain as ft


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def loss_fn(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"])


class Learner:
    """The inner problem: `adapt(params, points)` are the parameters after some steps from `params`."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        tx = ft.optim.sgd(lr)
        self.steps, self.start = steps, ft.init(model, tx)
        self.step = ft.train_step(model, loss_fn, tx)
        self.loss = ft.bind(model, loss_fn)

    def adapt(self, params, points):
        state = self.start.replace(params=params)
        for _ in range(self.steps):
            state, _ = self.step(state, points)
        return state.params

    def meta_grad(self, params, buffers, batch, rng):
        """A grad-level function: `batch` holds tasks, and the loss is that on the query points after adapting to the support."""

        def losses(params):
            def one(support, query):
                return self.loss(self.adapt(params, support), buffers, query, rng)[0].compute()

            found = torch.func.vmap(one)(batch["support"], batch["query"])
            return found.mean(), found

        grads, (_, found) = torch.func.grad_and_value(losses, has_aux=True)(params)
        return grads, ft.metrics.Mean.of(found), ({}, buffers)


def tasks(key: torch.Tensor, count: int, shots: int = 10) -> dict:
    """`count` sine waves, as a function of the key: for each, points to adapt to and points to be judged by, (count, shots, 1)."""
    keys = ft.rng.split(key, 4)
    height = ft.rng.uniform(keys[0], (count, 1, 1)) * 4.9 + 0.1
    phase = ft.rng.uniform(keys[1], (count, 1, 1)) * torch.pi
    places = [ft.rng.uniform(k, (count, shots, 1)) * 10 - 5 for k in keys[2:]]
    return {
        name: {"x": x, "y": height * torch.sin(x - phase)} for name, x in zip(("support", "query"), places, strict=True)
    }


def stream(count: int, seed: int):
    """Data as a function `epoch -> batches`: new tasks in each batch."""

    def epoch(number: int):
        key = ft.rng.fold_in(ft.rng.key(seed), number)
        return (tasks(ft.rng.fold_in(key, i), count) for i in range(100))

    return epoch


def curve(model: nn.Module, params: dict, batch: dict, lr: float, steps: int) -> list[float]:
    """Mean loss on the query points after 0, 1, ... steps on the support points, over many new tasks."""
    found = []
    for n in range(steps + 1):
        learner = Learner(model, lr, n)
        found.append(float(learner.meta_grad(params, {}, batch, ft.rng.key(0))[1].compute()))
    return found


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=1500, help="outer steps, %(default)s")
    parser.add_argument("--inner-steps", type=positive, default=1, help="steps of adapting in training, %(default)s")
    parser.add_argument("--inner-lr", type=float, default=0.02, help="%(default)s")
    parser.add_argument("--tasks", type=positive, default=24, help="in each outer step, %(default)s")
    parser.add_argument("--accumulate", type=positive, default=2, help="parts into which they are cut, %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the tasks")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the outer step"
    )
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it gives

    torch.manual_seed(args.seed)  # for the first weights
    model = make_model()
    schedule = ft.schedules.warmup_cosine(3e-3, args.steps // 20, args.steps)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(10.0), ft.optim.adam(schedule))
    state = ft.init(model, tx, seed=args.seed)

    def train(inner_steps: int) -> dict:
        grad = Learner(model, args.inner_lr, inner_steps).meta_grad
        step = ft.make_step(ft.with_accumulation(grad, args.accumulate), tx)
        how = "auto" if args.compile else False
        every = ft.every(steps=max(args.steps // 5, 1))
        return ft.fit(state, step, stream(args.tasks, args.seed), steps=args.steps, log=every, compile=how).state.params

    found = {"untrained": state.params, "all at once": train(0), "MAML": train(args.inner_steps)}
    new = tasks(ft.rng.key(12345), 600)
    print("\nloss on sine waves never seen, after so many steps on ten points of each")
    print(f"{'steps':>12}" + "".join(f"{n:>8}" for n in range(6)))
    for name, params in found.items():
        print(f"{name:>12}" + "".join(f"{loss:8.3f}" for loss in curve(model, params, new, args.inner_lr, 5)))
    print(f"{time.perf_counter() - began:.1f} s in all")


if __name__ == "__main__":
    main()
