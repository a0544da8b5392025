"""The crash harness: a run that is killed at random moments, and goes on until it is done, ends as one that was never killed.

    python -m tests.crash --kills 100          what `nox -s crash` does
    python -m tests.crash --child FOLDER OUT   one process of the run

The run has everything that a resume can get wrong: shuffling, dropout, batch norm, accumulation over windows that are carried from
epoch to epoch, loss scaling with planted infinities, an average of the parameters, clipping, a schedule, a hook with memory that
stops early, draws from numpy and random, evaluation, records with unequal intervals, and checkpoints in the background.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def child(folder, out, backend):
    """Train, or go on training; write what came of it as JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"

    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    import ftrain as ft

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(203, 1, 8, 8, generator=generator), torch.arange(203) % 4
    boost = torch.ones(203)
    boost[[17, 90]] = float("inf")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.2)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))

    torch.manual_seed(0)
    model = Net()

    def loss_fn(model, batch):
        logits = model(batch["x"])
        loss = F.cross_entropy(logits, batch["y"]) * batch["boost"].mean()
        return loss, {"accuracy": ft.metrics.accuracy(logits, batch["y"])}

    schedule = ft.schedules.warmup_cosine(3e-3, 10, 400)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(schedule))
    grad = ft.with_loss_scale(
        ft.with_accumulation(ft.value_and_grad(ft.bind(model, loss_fn)), 2, uneven="split"), growth_interval=20
    )
    step = ft.with_ema(ft.make_step(grad, tx), 0.95)
    evaluate = ft.eval_step(model, lambda m, batch: {"loss": F.cross_entropy(m(batch["x"]), batch["y"])}, params="ema")

    def init(state):
        return {"best": torch.tensor(float("inf")), "bad": torch.zeros((), dtype=torch.int64)}

    def update(state, memory, event):
        loss = torch.tensor(event.metrics["val/loss"])
        better = loss < memory["best"]
        memory = {"best": torch.minimum(loss, memory["best"]), "bad": torch.where(better, 0, memory["bad"] + 1)}
        stop = "no better for 500 evaluations" if int(memory["bad"]) >= 500 else None
        return ft.Outcome(
            state, {"drawn": np.random.rand() + random.random(), "bad": float(memory["bad"])}, stop
        ), memory

    def scribble(state, event):  # draws at every step
        np.random.rand()
        torch.rand(1)
        return state

    source = ft.data.source({"x": x, "y": y, "boost": boost}, batch_size=8, shuffle=True)
    result = ft.fit(
        ft.init(model, tx, seed=7),
        step,
        ft.data.window(source, 3, short="carry"),
        epochs=24,
        evals={"val": ft.Evaluator(evaluate, {"x": x[:40], "y": y[:40]}, ft.every(steps=11) | ft.every(epochs=1), 16)},
        hooks=[ft.on("evaluation", ft.Hook("patience", init, update)), ft.on("step", scribble)],
        log=ft.every(steps=5),
        progress=False,
        compile=bool(backend),
        backend=backend or "eager",
        checkpoint=ft.Checkpoints(
            folder,
            every=ft.every(steps=4) | ft.every(epochs=1),
            keep=ft.keep(latest=2) | ft.keep(best=1, by="val/loss"),
        ),
        resume="auto",
        sinks=[lambda record: print(record.step, flush=True)],
    )
    digest = hashlib.sha256()
    for path, leaf in ft.tree.items(result.state, "state"):
        digest.update(f"{path} {leaf.dtype} {tuple(leaf.shape)} ".encode())
        digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    rows = [
        [r.step, r.epoch, r.samples, r.split, {name: value.hex() for name, value in r.metrics.items()}]
        for r in result.history
    ]
    found = {
        "state": digest.hexdigest(),
        "reason": result.reason,
        "rows": rows,
        "skipped": int(result.state.extra["loss_scale"].skipped),
    }
    Path(out).write_text(json.dumps(found))


def start(folder, out, backend, errors):
    """A process of the run."""
    command = [sys.executable, "-m", "tests.crash", "--child", str(folder), str(out), "--backend", backend]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root, env=environment)


def saving(folder):
    """Whether a checkpoint is being written now."""
    return any(folder.glob("*.orbax-checkpoint-tmp*"))


def kill_once(folder, out, backend, rng, errors):
    """Start a process and kill it at a random moment of its training; gives when, or None if it was done before."""
    process = start(folder, out, backend, errors)
    assert process.stdout is not None
    try:
        if rng.random() < 0.2:  # while it starts, restores, cuts its records
            time.sleep(rng.uniform(1.0, 4.0))
            process.send_signal(signal.SIGKILL)
            return None if process.wait() == 0 else "while it started"
        if not process.stdout.readline():  # its first record: it trains
            return None if process.wait() == 0 else f"failed with {process.returncode}"
        middle = rng.random() < 0.6
        time.sleep(rng.uniform(0.0, 0.4))
        deadline = time.monotonic() + 2.0
        while middle and not saving(folder) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if middle:
            time.sleep(rng.uniform(0.0, 0.05))
        caught = saving(folder)
        process.send_signal(signal.SIGKILL)
        return None if process.wait() == 0 else ("in a save" if caught else "between saves")
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def crash(folder, kills, *, backend="", seed=0, say=lambda text: None):
    """Run once undisturbed and once killed so many times; gives both results and the moments of the kills."""
    folder = Path(folder)
    rng = random.Random(seed)
    with open(folder / "errors.txt", "w+") as errors:

        def finish(name):
            process = start(folder / name, folder / f"{name}.json", backend, errors)
            process.communicate()
            errors.seek(0)
            assert process.returncode == 0, errors.read()
            return outcome(folder, name)

        whole = finish("whole")
        moments = []
        rounds = 0
        while len(moments) < kills:
            name = f"killed{rounds}"
            moment = kill_once(folder / name, folder / f"{name}.json", backend, rng, errors)
            if moment is None:  # it was done: compare, and begin another one
                assert outcome(folder, name) == whole
                shutil.rmtree(folder / name)
                rounds += 1
                continue
            errors.seek(0)
            assert not moment.startswith("failed"), errors.read()
            moments.append(moment)
            say(f"kill {len(moments)}: {moment}, run {rounds}, newest checkpoint {newest(folder / name)}")
        return whole, finish(f"killed{rounds}"), moments


def outcome(folder, name):
    """What a run came to, with what is in its journal but for the clocks; both are the same in every process."""
    found = json.loads((folder / f"{name}.json").read_text())
    rows = [json.loads(line) for line in (folder / name / "history.jsonl").read_text().splitlines()]
    found["journal"] = [{key: row[key] for key in row if key not in ("seconds", "waited", "spent")} for row in rows]
    return found


def newest(folder):
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "OUT"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="", help="compile with this backend of torch.compile")
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child, arguments.backend)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, moments = crash(
            folder, arguments.kills, backend=arguments.backend, seed=arguments.seed, say=print
        )
    assert killed == whole, "the run that was killed is not the one that was not"
    middle = moments.count("in a save")
    print(f"{len(moments)} kills, {middle} of them in a save: state and {len(whole['rows'])} records bitwise equal")


if __name__ == "__main__":
    main()
