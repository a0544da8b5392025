"""Train a GAN on scikit-learn's handwritten digits: two groups of parameters, two optimizers, one hand-written step.

    python examples/gan.py
    python examples/gan.py --simultaneous --epochs 300 --compile

One module holds generator and discriminator; `partition` gives each its own optimizer, learning rate and clipping. The step
is a function that calls two updates, one after the other or both from the same state; clipping, accumulation, precision,
averaging and compilation (of the whole step, in one graph) are those of any other step.

How good the samples are says the Frechet distance between the pixels of real and drawn images (mean and covariance; 0 is
best). The first command takes about 20 seconds on two cores. Compiling takes a minute or more, and pays off in longer runs.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import ftrain as ft

LATENT = 16


class Gan(nn.Module):
    """No forward of its own: the losses call the two parts."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.gen = nn.Sequential(
            nn.Linear(LATENT, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64), nn.Sigmoid()
        )
        self.dis = nn.Sequential(
            nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )


def dis_loss(model, batch, rng):
    """Real images up, drawn ones down, and flat where images are real (the penalty of Mescheder et al., ICML 2018).

    `rng` is this update's key: the noise is a function of (seed, step, group).
    """
    real = batch.detach().requires_grad_()
    score = model.dis(real)
    (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    fake = model.gen(ft.rng.normal(rng, (len(batch), LATENT)))
    loss = (F.softplus(-score) + F.softplus(model.dis(fake))).mean()
    return loss + slope.square().sum(1).mean() / 2, {"slope": slope.norm(dim=1).mean()}


def gen_loss(model, batch, rng):
    """The non-saturating loss of Goodfellow et al., NeurIPS 2014; its update differentiates the generator alone."""
    fake = model.gen(ft.rng.normal(rng, (len(batch), LATENT)))
    return F.softplus(-model.dis(fake)).mean()


def make_step(model: Gan, tx: ft.optim.Partition, *, simultaneous: bool, precision: str, accumulate: int):
    def update(loss_fn, group):
        loss = ft.with_precision(ft.bind(model, loss_fn), precision)
        return ft.make_update(ft.with_accumulation(ft.value_and_grad(loss), accumulate), tx, only=group)

    dis, gen = update(dis_loss, "dis"), update(gen_loss, "gen")

    def named(of_dis, of_gen):  # the losses alone need names: learning rates and norms bear that of their group
        return {**of_dis, **of_gen, "loss": of_dis["loss"], "loss/gen": of_gen["loss"]}

    def alternating(state, batch):
        state, of_dis = dis(state, batch)
        state, of_gen = gen(state, batch)  # sees the new discriminator
        return state, named(of_dis, of_gen)

    def at_once(state, batch):
        after, of_dis = dis(state, batch)
        other, of_gen = gen(state, batch)  # sees the old discriminator
        params = tx.merge(after.params, tx.select(other.params)["gen"])
        return after.replace(params=params, opt={**after.opt, "gen": other.opt["gen"]}), named(of_dis, of_gen)

    step = ft.as_step(at_once if simultaneous else alternating, uses=[dis, gen])
    return ft.with_ema(step, 0.995, warmup=True)


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Frechet distance of two normal distributions with the means and covariances of these rows."""
    a, b = a.double(), b.double()
    s, t = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt().sum()  # tr (s t)^(1/2)
    return float((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * root)


@torch.no_grad()
def draw(model: Gan, n: int) -> torch.Tensor:
    return model.gen(ft.rng.normal(ft.rng.key(12345), (n, LATENT)))


def picture(images: torch.Tensor) -> str:
    """Some images side by side, two characters for each pixel."""
    lines = images.reshape(-1, 8, 8).transpose(0, 1).flatten(1)  # (8, images x 8)
    return "\n".join("".join(" .:-=+*#%@"[int(9.99 * pixel)] * 2 for pixel in line) for line in lines.tolist())


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=60, help="%(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first weights, the order of the data, and the noise"
    )
    parser.add_argument("--simultaneous", action="store_true", help="update both from the same state")
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed", help="%(default)s")
    parser.add_argument("--accumulate", type=positive, default=2, help="micro-batches for each update, %(default)s")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the step")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)  # the models are so small that a second thread costs more than it gives

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16  # (1797, 64); pixels run from 0 to 16
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    train, test = images[:1280], images[1280:]
    torch.manual_seed(args.seed)  # for the first weights
    model = Gan()
    optimizers = {
        "gen": ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adam(1e-3, b1=0.5)),
        "dis": ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adam(1e-3, b1=0.5)),
    }
    tx = ft.optim.partition({"gen.*": "gen", "dis.*": "dis"}, optimizers)
    step = make_step(model, tx, simultaneous=args.simultaneous, precision=args.precision, accumulate=args.accumulate)
    state = ft.init(model, tx, seed=args.seed)

    before = frechet(draw(model, 1024), test)
    result = ft.fit(state, step, train, batch_size=64, epochs=args.epochs, compile="auto" if args.compile else False)
    last, mean = (draw(ft.to_module(model, result.state, params=p), 1024) for p in (None, "ema"))

    print(picture(draw(ft.to_module(model, result.state, params="ema"), 6)))
    print(f"\nFrechet distance to {len(test)} images never seen")
    rows = {"untrained": before, "trained": frechet(last, test), "averaged": frechet(mean, test)}
    for name, value in {**rows, "real": frechet(train, test)}.items():
        print(f"{name:>10}  {value:7.3f}")
    print(f"{time.perf_counter() - began:.1f} s in all")


if __name__ == "__main__":
    main()
