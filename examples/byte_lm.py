"""Train a byte-level GPT on the source of Python's own standard library, and compare it with gzip.

    python examples/byte_lm.py --steps 300
    python examples/byte_lm.py --steps 3000

Every tenth file is held out. Bits per byte say how well its bytes are predicted: 8 for pure guessing; `gzip -9` on the
same bytes is the yardstick (and, unlike the model, it starts from nothing). The first command, a minute or two on two
cores, shows the loss falling; the second, about ten minutes, gets below gzip.
"""

import argparse
import gzip
import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import ftrain as ft


def load(held_out_bytes: int = 1 << 16) -> tuple[bytes, bytes]:
    """The text for training, and the first 64 KiB of the held-out files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    train = b"".join(file.read_bytes() for i, file in enumerate(files) if i % 10 != 5)
    return train, b"".join(file.read_bytes() for file in files[5::10])[: held_out_bytes + 1]


class Block(nn.Module):
    """Attention to the past, then a perceptron, each added to what came in."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        # (batch, time, 3 width) -> three times (batch, 4 heads, time, width / 4)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """(batch, time) bytes -> (batch, time, 256) logits of the byte after each."""

    def __init__(self, layers: int, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.byte, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(nn.Dropout(dropout), *(Block(width, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for embedding in (self.byte, self.place):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.byte(x) + self.place(places))))


def loss_fn(model, batch):
    """`batch`: (n, context + 1) bytes; each is predicted from those before it in its row."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def metric_fn(model, batch):
    loss = loss_fn(model, batch)
    return {"loss": loss, "bits_per_byte": loss / math.log(2)}


def windows(text: torch.Tensor, context: int, batch_size: int, seed: int):
    """Data as a function `epoch -> batches`: windows at random places that depend on (seed, epoch) and on nothing else."""

    def epoch(number: int):
        key = ft.rng.fold_in(ft.rng.key(seed), number)
        count = len(text) // (context * batch_size)  # an epoch has as many bytes as the text
        starts = ft.rng.randint(key, 0, len(text) - context, (count, batch_size, 1))
        return (text[rows + torch.arange(context + 1)].long() for rows in starts)

    return epoch


@torch.no_grad()
def sample(model: GPT, prompt: bytes, length: int, seed: int, temperature: float = 0.8) -> str:
    generator = torch.Generator().manual_seed(seed)
    found = torch.tensor([list(prompt)])
    for _ in range(length):
        logits = model(found[:, -model.context :])[:, -1]
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        found = torch.cat([found, new], dim=1)
    text = bytes(found[0].tolist()).decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in text)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"steps": 300, "layers": 4, "width": 128, "context": 128, "batch-size": 16}.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help="%(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="the peak of the learning rate, %(default)s")
    parser.add_argument("--dropout", type=float, default=0.1, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights, the batches, dropout and the sample")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the step")
    args = parser.parse_args()

    train, held_out = load()
    rows = torch.frombuffer(bytearray(held_out), dtype=torch.uint8).unfold(0, args.context + 1, args.context).long()
    yardstick = 8 * len(gzip.compress(held_out, compresslevel=9)) / len(held_out)
    print(f"{len(train):,} bytes to train on, {len(held_out):,} held out; gzip -9: {yardstick:.3f} bits per byte")

    torch.manual_seed(args.seed)  # for the first weights
    model = GPT(args.layers, args.width, args.context, args.dropout)
    schedule = ft.schedules.warmup_cosine(args.lr, args.steps // 10, args.steps, end=args.lr / 10)
    decay = ft.optim.adamw(schedule, b2=0.99, weight_decay=0.1, mask=lambda path, p: p.ndim >= 2)  # no biases, no norms
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), decay)
    state = ft.init(model, tx, seed=args.seed)
    when = ft.at(0) | ft.every(steps=max(args.steps // 5, 1)) | ft.at(args.steps)
    text = torch.frombuffer(bytearray(train), dtype=torch.uint8)

    result = ft.fit(
        state,
        ft.train_step(model, loss_fn, tx),
        windows(text, args.context, args.batch_size, args.seed),
        steps=args.steps,
        evals={"val": ft.Evaluator(ft.eval_step(model, metric_fn), rows, batch_size=64, every=when)},
        compile="auto" if args.compile else False,
    )

    print(f"\n{'step':>8}  {'val loss':>8}  {'bits per byte':>13}")
    for record in result.history:
        if record.split == "val":
            print(f"{record.step:>8}  {record.metrics['loss']:>8.4f}  {record.metrics['bits_per_byte']:>13.3f}")
    print(f"{'gzip -9':>8}  {'':>8}  {yardstick:>13.3f}\n")
    print(sample(ft.to_module(model, result.state).eval(), b"def ", 400, args.seed))


if __name__ == "__main__":
    main()
