"""How far apart are the threes and the eights? A critic with a gradient penalty says it, and exact transport checks it.

    python examples/gradient_penalty.py
    python examples/gradient_penalty.py --pairs 17 49 56 --steps 3000 --compile

The Wasserstein distance of two sets is the largest difference of means that a function of slope at most 1 can show between
them. The critic is that function; its slope is held at 1 by a penalty on its gradient with respect to the input (Gulrajani
et al., "Improved training of Wasserstein GANs", NeurIPS 2017). That penalty is ordinary PyTorch in the loss function: a
gradient inside of the loss, of which the step takes the gradient, with accumulation, precision, clipping and compilation as
for any other loss. The sets are images of scikit-learn's digits, as four principal components; there the distance can be
computed exactly, by matching the images in pairs.
"""

import argparse
import time

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import nn

import ftrain as ft


class Critic(nn.Module):
    """(n, 4) -> (n,), smooth."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, width), nn.Softplus(), nn.Linear(width, width), nn.Softplus(), nn.Linear(width, 1)
        )

    def forward(self, x):
        return self.body(x).squeeze(1)


def slopes(model, x):
    """The norm of the gradient at each row, itself differentiable."""
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return found.norm(dim=1)


def loss_with(penalty: float):
    def loss_fn(model, batch, rng):
        """`batch`: rows of both sets; the penalty is taken at points between them, drawn with this step's key."""
        between = torch.lerp(batch["a"], batch["b"], ft.rng.uniform(rng, (len(batch["a"]), 1)))
        slope = slopes(model, between)
        distance = (model(batch["a"]) - model(batch["b"])).float().mean()
        return penalty * (slope - 1).square().mean() - distance, {"distance": distance, "slope": slope.mean()}

    return loss_fn


def components(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of all digits, (1797, count), and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float64) / 16  # pixels run from 0 to 16
    x = x - x.mean(0)
    axes = torch.linalg.svd(x, full_matrices=False).Vh[:count]
    return (x @ axes.T).float(), torch.tensor(labels)


def exact(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Wasserstein-1 distance of two sets of equal size: the mean distance in the best matching of pairs."""
    costs = torch.cdist(a.double(), b.double()).numpy()
    return float(costs[linear_sum_assignment(costs)].mean())


def pairs(a: torch.Tensor, b: torch.Tensor, batch_size: int, seed: int):
    """Data as a function `epoch -> batches`: rows of both sets, drawn independently."""

    def epoch(number: int):
        keys = ft.rng.split(ft.rng.fold_in(ft.rng.key(seed), number), 2)
        rows = [ft.rng.randint(key, 0, len(a), (100, batch_size)) for key in keys]
        return ({"a": a[i], "b": b[j]} for i, j in zip(*rows, strict=True))

    return epoch


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", default=["38", "01"], help="pairs of digits, 38 01")
    parser.add_argument("--steps", type=positive, default=1000, help="for each pair, %(default)s")
    parser.add_argument("--penalty", type=float, default=100.0, help="its weight, %(default)s")
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed", help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights, the batches, and the points between")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the steps")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it gives

    x, labels = components(4)
    torch.manual_seed(args.seed)  # for the first weights
    model = Critic()
    schedule = ft.schedules.warmup_cosine(3e-3, args.steps // 20, args.steps)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(10.0), ft.optim.adam(schedule, b2=0.99))
    step = ft.train_step(model, loss_with(args.penalty), tx, precision=args.precision, accumulate=2)
    fast = ft.compile(step) if args.compile else step  # one program for all pairs

    print(f"{'digits':>8}  {'critic':>7}  {'exact':>7}  {'slope':>7}")
    for pair in args.pairs:
        a, b = (x[labels == int(digit)][:170] for digit in pair)
        state = ft.init(model, tx, seed=args.seed)
        data = pairs(a, b, 64, args.seed)
        result = ft.fit(state, fast, data, steps=args.steps, compile=False, progress=False)
        critic = ft.to_module(model, result.state)
        found = float((critic(a).mean() - critic(b).mean()).detach())
        slope = float(slopes(critic, (a + b) / 2).mean().detach())
        print(f"{pair[0]:>4} {pair[1]:>3}  {found:7.3f}  {exact(a, b):7.3f}  {slope:7.3f}")
    print(f"{time.perf_counter() - began:.1f} s in all")


if __name__ == "__main__":
    main()
