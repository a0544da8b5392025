"""What it costs to compile a whole step: `python tests/bench/first_call.py` runs one process of the measurement.

The step: a GPT of 12 layers, AdamW with clipping by global norm, forward, backward and update in one graph. Cold is a process that
finds an empty compile cache, warm another one that finds what the first has left there (`TORCHINDUCTOR_CACHE_DIR`). A process
prints the seconds of its first call (tracing, compiling, and one step), the milliseconds of a compiled and of an eager step.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import children

LAYERS, WIDTH, HEADS, VOCAB, TIME, BATCH = 12, 256, 4, 1024, 128, 4
WHAT = f"GPT, {LAYERS} layers, width {WIDTH}, {HEADS} heads, {VOCAB} tokens, sequences of {TIME}, batch {BATCH}"


def measure(tell: Callable[[str], object] = lambda text: None) -> dict[str, dict[str, Any]]:
    """Cold, then warm."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="ftrain-inductor-", ignore_cleanup_errors=True) as folder:
        for kind in ("cold", "warm"):
            tell(f"compile time: {kind}")
            found[kind] = children.finish(children.start(__file__, TORCHINDUCTOR_CACHE_DIR=folder))
    return found


def table(report: Any, found: dict[str, dict[str, Any]]) -> Any:
    rows = [
        [
            {"cold": "empty compile cache", "warm": "another process, the same cache"}[kind],
            f"{one['first_call_s']:.1f}",
            f"{one['compiled_ms']:.0f}",
            f"{one['eager_ms']:.0f}",
        ]
        for kind, one in found.items()
    ]
    parameters = next(iter(found.values()))["parameters"] / 1e6
    note = (
        f"{WHAT}: {parameters:.1f} M parameters; AdamW, clipping by global norm, float32, one thread; one graph. `first call` is in "
        "seconds: tracing, compiling and one step, in a fresh process; a step in ms is the median of ten."
    )
    return report.Table("12-layer GPT, compile time", note, ["", "first call s", "compiled step", "eager step"], rows)


def gpt(layers: int = LAYERS) -> Any:
    """The module; imports torch, so that its import is not timed."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (a.unflatten(-1, (HEADS, -1)).transpose(1, 2) for a in self.qkv(self.norm1(x)).chunk(3, dim=-1))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(TIME, WIDTH)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.token(ids) + self.place.weight
            return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]  # nn.Module gives Any

    torch.manual_seed(0)
    return Gpt()


def main() -> None:
    import torch
    import torch.nn.functional as F

    import ftrain as ft

    torch.set_num_threads(1)

    def loss_fn(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    model = gpt()
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(3e-4))
    step = ft.train_step(model, loss_fn, tx)
    state = ft.init(model, tx, seed=0)
    ids = torch.randint(0, VOCAB, (BATCH, TIME + 1), generator=torch.Generator().manual_seed(0))
    batch = {"x": ids[:, :-1].contiguous(), "y": ids[:, 1:].contiguous()}
    fast = ft.compile(step)

    def timed(one: Any, now: Any) -> tuple[float, Any]:
        spent = []
        for _ in range(10):
            began = time.perf_counter()
            now, _ = one(now, batch)
            spent.append(time.perf_counter() - began)
        return statistics.median(spent) * 1e3, now

    eager_ms, _ = timed(step, state)
    began = time.perf_counter()
    state, _ = fast(state, batch)
    first = time.perf_counter() - began
    compiled_ms, _ = timed(fast, state)
    assert fast.rung == "step", f"rung {fast.rung}: {fast.reason}"
    assert fast.compiles == 1, f"{fast.compiles} compilations"
    print(
        json.dumps(
            {
                "first_call_s": round(first, 2),
                "compiled_ms": round(compiled_ms, 2),
                "eager_ms": round(eager_ms, 2),
                "parameters": sum(p.numel() for p in model.parameters()),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
