"""Fine-tune a small network layer by layer: it knows scikit-learn's digits, and is shown a few of them in negative.

    python examples/finetune.py
    python examples/finetune.py --shots 3 --seed 1

Each group of layers has an optimizer of its own: a smaller learning rate nearer to the input, and a step from which it is
updated at all (gradual unfreezing with discriminative learning rates, Howard & Ruder, ACL 2018). Which layers move is a
function of the step's number on the device, so the compiled step is one program for the whole schedule. Beside it stand training
from scratch, training the last layer alone, and training all layers at once from the pre-trained ones.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import ftrain as ft

GROUPS = {"head.*": "head", "late.*": "late", "early.*": "early"}


class Net(nn.Module):
    """Three layers; their names are the groups."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.early, self.late, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(F.relu(self.late(F.relu(self.early(x)))))


def loss_fn(model, batch):
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": ft.metrics.accuracy(logits, batch["y"])}


def metric_fn(model, batch):
    return loss_fn(model, batch)[1]


def load(shots: int, seed: int) -> tuple[dict, dict, dict]:
    """900 digits as they are; of the others, in negative: `shots` of each class to learn from, and all that are left."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(pixels, dtype=torch.float32)[order] / 16  # pixels run from 0 to 16
    y = torch.tensor(labels, dtype=torch.int64)[order]
    old, x, y = {"x": x[:900], "y": y[:900]}, 1 - x[900:], y[900:]
    few = torch.cat([(y == digit).nonzero()[:shots, 0] for digit in range(10)])
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[few] = False
    return old, {"x": x[few], "y": y[few]}, {"x": x[rest], "y": y[rest]}


def group(lr: float, begin: int, end: int) -> ft.Transform:
    """The optimizer of one group. It rests until step `begin`, from where it counts its own updates."""
    schedule = ft.schedules.warmup_cosine(lr, (end - begin) // 10, end - begin)
    own = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(schedule, weight_decay=1e-2))
    return ft.optim.conditionally_mask(own, lambda step: step >= begin)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=200, help="of fine-tuning, %(default)s")
    parser.add_argument("--shots", type=positive, default=5, help="negatives of each digit to learn from, %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights, the order of the data, and the choice of it"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the steps")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it gives

    old, few, rest = load(args.shots, args.seed)
    torch.manual_seed(args.seed)  # for the first weights
    model = Net()
    how = "auto" if args.compile else False

    def train(tx: ft.Transform, data: dict, steps: int, begin: dict | None = None) -> ft.Result:
        state = ft.init(model, tx, seed=args.seed)
        state = state if begin is None else state.replace(params=begin)
        step = ft.train_step(model, loss_fn, tx, precision="bf16-mixed", accumulate=5)
        return ft.fit(
            state, step, data, batch_size=50, steps=steps, log=ft.every(steps=10), compile=how, progress=False
        )

    def accuracy(result: ft.Result, data: dict) -> float:
        return ft.evaluate(result.state, ft.eval_step(model, metric_fn), data, batch_size=256, compile=how)["accuracy"]

    first = train(group(3e-3, 0, 300), old, 300)
    known = first.state.params
    print(
        f"pre-trained: {accuracy(first, old):.2%} on what it was trained with, {accuracy(first, rest):.2%} on negatives"
    )

    end = args.steps
    everything = group(3e-3, 0, end)
    head_alone = {"head": group(3e-3, 0, end), "late": ft.optim.set_to_zero(), "early": ft.optim.set_to_zero()}
    thawing = {"head": group(3e-3, 0, end), "late": group(1e-3, end // 4, end), "early": group(3e-4, end // 2, end)}
    found = {
        "from scratch": train(everything, few, end),
        "head alone": train(ft.optim.partition(GROUPS, head_alone), few, end, known),
        "all at once": train(everything, few, end, known),
        "thawing": train(ft.optim.partition(GROUPS, thawing), few, end, known),
    }
    print(f"\nafter {end} steps on {args.shots} negatives of each digit: accuracy on {len(rest['y'])} others")
    for name, result in found.items():
        print(f"{name:>14}  {accuracy(result, rest):7.2%}")

    print(f"\nlearning rates while thawing\n{'step':>14}  {'head':>7}  {'late':>7}  {'early':>7}")
    records = [record for record in found["thawing"].history if record.split == "train"]
    for record in records[:: max(len(records) // 8, 1)]:
        print(f"{record.step:>14}  " + "  ".join(f"{record.metrics[f'lr/{name}']:7.1e}" for name in thawing))
    print(f"{time.perf_counter() - began:.1f} s in all")


if __name__ == "__main__":
    main()
