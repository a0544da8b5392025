"""k-fold cross-validation, an ensemble of seeds and a sweep over learning rates: plain loops over `fit`, on scikit-learn's digits.

    python examples/sweep.py
    python examples/sweep.py --epochs 20 --folds 10 --members 8

`fit` is a function: it holds nothing between two calls, and the state that it is given stays as it was. So what would elsewhere need
support by the trainer is a loop here. The learning rate is a leaf of the state, so that all runs share one step.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ftrain as ft

Data = dict[str, Tensor]


def load() -> tuple[Data, Data]:
    """1400 digits to train on and 397 to test with, the same for every seed."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32) / 16  # pixels run from 0 to 16
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return {"x": x[order[:1400]], "y": y[order[:1400]]}, {"x": x[order[1400:]], "y": y[order[1400:]]}


def make_model(seed: int) -> nn.Module:
    """A perceptron with one hidden layer, whose first weights are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))


def loss_fn(model, batch):
    """Ordinary PyTorch. `model` holds the tensors of the state while the step runs."""
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": ft.metrics.accuracy(logits, batch["y"])}


def metric_fn(model, batch):
    loss, metrics = loss_fn(model, batch)
    return {"loss": loss, **metrics}


MODEL = make_model(0)  # its code serves all runs; their numbers are in their states
TX = ft.optim.inject(ft.optim.adamw)(lr=3e-3)
STEP = ft.train_step(MODEL, loss_fn, TX)
SCORE = ft.eval_step(MODEL, metric_fn)
PREDICT = ft.predict_step(MODEL, lambda model, batch: model(batch["x"]))


def start(seed: int, lr: float | None = None) -> ft.TrainState:
    """A first state: weights, order of the data and dropout by the seed, and a learning rate other than the default."""
    state = ft.init(make_model(seed), TX, seed=seed)
    if lr is None:
        return state
    hyper = {**state.opt.hyper, "lr": torch.full_like(state.opt.hyper["lr"], lr)}
    return state.replace(opt=state.opt._replace(hyper=hyper))


def train(state: ft.TrainState, data: Data, epochs: int) -> ft.TrainState:
    return ft.fit(state, STEP, data, batch_size=50, epochs=epochs, compile=False, progress=False).state


def score(state: ft.TrainState, data: Data) -> dict[str, float]:
    return ft.evaluate(state, SCORE, data, batch_size=200, compile=False)


def folds(data: Data, k: int) -> list[tuple[Data, Data]]:
    """The k ways to keep one k-th of the data back."""
    parts = torch.arange(len(data["y"])).chunk(k)
    split = []
    for part in parts:
        rest = torch.ones(len(data["y"]), dtype=torch.bool)
        rest[part] = False
        split.append(({name: t[rest] for name, t in data.items()}, {name: t[part] for name, t in data.items()}))
    return split


def cross_validation(data: Data, k: int, epochs: int) -> list[float]:
    """The accuracy on each fold, of a run on all others; every run begins with the same state."""
    state = start(0)
    return [score(train(state, others, epochs), fold)["accuracy"] for others, fold in folds(data, k)]


def ensemble(data: Data, test: Data, members: int, epochs: int) -> tuple[list[float], float]:
    """The test accuracy of each of some runs that differ by their seed, and that of their mean prediction."""
    states = [train(start(seed), data, epochs) for seed in range(members)]
    alone = [score(state, test)["accuracy"] for state in states]
    logits = [torch.cat(list(ft.predict(s, PREDICT, test, batch_size=200, compile=False))) for s in states]
    together = torch.stack([one.softmax(dim=1) for one in logits]).mean(dim=0)
    return alone, float((together.argmax(dim=1) == test["y"]).double().mean())


def sweep(data: Data, rates: list[float], epochs: int) -> dict[float, float]:
    """The validation loss for each learning rate, on a fifth of the data that is kept back."""
    rest, kept = folds(data, 5)[0]
    return {lr: score(train(start(0, lr), rest, epochs), kept)["loss"] for lr in rates}


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def several(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not several")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=8, help="of each run (%(default)s)")
    parser.add_argument("--folds", type=several, default=5, help="of the cross-validation (%(default)s)")
    parser.add_argument("--members", type=several, default=5, help="of the ensemble (%(default)s)")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it gives
    data, test = load()

    print(f"{args.folds}-fold cross-validation\n\n{'fold':>12}  {'accuracy':>8}")
    found = cross_validation(data, args.folds, args.epochs)
    for number, accuracy in enumerate(found, start=1):
        print(f"{number:>12}  {accuracy:>8.2%}")
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in found) / (len(found) - 1))
    print(f"{'mean':>12}  {mean:>8.2%}\n{'deviation':>12}  {deviation:>8.2%}")

    print(f"\nensemble of {args.members} seeds, on {len(test['y'])} digits never seen\n\n{'seed':>12}  {'accuracy':>8}")
    alone, together = ensemble(data, test, args.members, args.epochs)
    for seed, accuracy in enumerate(alone):
        print(f"{seed:>12}  {accuracy:>8.2%}")
    print(f"{'alone':>12}  {sum(alone) / len(alone):>8.2%}\n{'together':>12}  {together:>8.2%}")

    print(f"\nlearning rates\n\n{'rate':>12}  {'val loss':>8}")
    losses = sweep(data, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1], args.epochs)
    for lr, loss in losses.items():
        print(f"{lr:>12.0e}  {loss:>8.4f}")
    print(f"{'best':>12}  {min(losses, key=losses.__getitem__):>8.0e}")
    runs = args.folds + args.members + len(losses)
    print(f"\n{runs} runs in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
