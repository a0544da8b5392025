"""Train a small CNN on scikit-learn's handwritten digits: at least 98% test accuracy in under a minute on two cores.

    python examples/digits.py
    python examples/digits.py --epochs 20 --seed 1 --plot curves.png

Nothing is downloaded: the 1797 images of 8 x 8 pixels come with scikit-learn. Most of the time goes into compiling the
step, which pays off in longer runs than this one; with --no-compile it takes a few seconds.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import ftrain as ft


def load() -> tuple[dict, dict, dict]:
    """Training, validation and test set (1200, 199 and 398 images) as dicts of arrays, the same for every seed."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16  # pixels run from 0 to 16
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, val, test = order[:1200], order[1200:1399], order[1399:]
    return {"x": x[train], "y": y[train]}, {"x": x[val], "y": y[val]}, {"x": x[test], "y": y[test]}


def make_model() -> nn.Module:
    """Two convolutions, batch norm, dropout: an ordinary module."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )


def loss_fn(model, batch):
    """Ordinary PyTorch. `model` holds the tensors of the state while the step runs."""
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": ft.metrics.accuracy(logits, batch["y"])}


def metric_fn(model, batch):
    """What an evaluation reports. The model is in evaluation mode: no dropout, batch norm by its statistics."""
    loss, metrics = loss_fn(model, batch)
    return {"loss": loss, **metrics}


def table(history: ft.History) -> str:
    """One line for each epoch: the records of training and validation at its end, side by side."""
    lines = [f"{'epoch':>5}  {'loss':>7}  {'accuracy':>8}  {'val loss':>8}  {'val accuracy':>12}  {'seconds':>7}"]
    train = [record for record in history if record.split == "train"]
    val = [record for record in history if record.split == "val"]
    for t, v in zip(train, val, strict=True):
        lines.append(
            f"{t.epoch:>5}  {t.metrics['loss']:>7.4f}  {t.metrics['accuracy']:>8.2%}  "
            f"{v.metrics['loss']:>8.4f}  {v.metrics['accuracy']:>12.2%}  {t.seconds:>7.1f}"
        )
    return "\n".join(lines)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=15, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights, the order of the data, and dropout")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the step")
    parser.add_argument("--plot", metavar="PATH", default="digits.png", help="where the curves go (%(default)s)")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it gives

    train, val, test = load()
    torch.manual_seed(args.seed)  # for the first weights; all else is a function of the state's seed
    model = make_model()

    steps = args.epochs * len(train["y"]) // 50
    tx = ft.optim.adamw(ft.schedules.warmup_cosine(5e-3, steps // 10, steps), weight_decay=1e-2)
    state = ft.init(model, tx, seed=args.seed)
    step = ft.train_step(model, loss_fn, tx)
    eval_step = ft.eval_step(model, metric_fn)
    how = "auto" if args.compile else False

    result = ft.fit(
        state,
        step,
        train,
        batch_size=50,
        epochs=args.epochs,
        log=ft.every(epochs=1),
        evals={"val": ft.Evaluator(eval_step, val, batch_size=199, every=ft.every(epochs=1))},
        compile=how,
    )
    final = ft.evaluate(result.state, eval_step, test, batch_size=199, compile=how)

    print(f"\n{table(result.history)}\n")
    print(f"test accuracy {final['accuracy']:.2%}, loss {final['loss']:.4f}, on {len(test['y'])} digits never seen")
    result.history.plot(path=args.plot)
    print(f"curves in {args.plot}; {time.perf_counter() - began:.1f} s in all")


if __name__ == "__main__":
    main()
