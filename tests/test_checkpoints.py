"""`fit` with `ft.Checkpoints`: a run in pieces, in one folder; what is kept; what cannot go on, and what that says."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import ftrain as ft

from .test_interruption import interrupting
from .test_resume import BATCHES, DATA, EVAL, MODEL, STEP, TX, X, Y, assert_same, patience, run

pytestmark = pytest.mark.filterwarnings("ignore::ftrain.errors.DataWarning")


def checkpoints(path, **options):
    return ft.Checkpoints(path, **{"every": ft.every(epochs=1), "keep": None, **options})


@pytest.mark.parametrize("kind", DATA)
def test_a_run_in_pieces_is_the_whole_run(kind, tmp_path):
    whole = run(kind)
    steps = whole.state.counters().step
    ckpt = checkpoints(tmp_path / "ckpt", every=ft.every(steps=2), keep=ft.keep(latest=2))
    for limit in range(1, steps, 3):
        part = run(kind, ckpt, epochs=None, steps=limit, resume="auto")
        assert part.state.counters().step == limit
    assert_same(run(kind, ckpt, resume="auto"), whole)
    assert_same(run(kind, ckpt, resume="auto"), whole)  # complete: given back
    assert len(ckpt.entries()) == 2


def test_what_is_due_at_the_last_step_of_an_epoch_is_saved_after_its_evaluation(tmp_path):
    ckpt = checkpoints(tmp_path, every=ft.every(steps=7))
    result = run("list", ckpt)
    entries = ckpt.entries()
    assert [(entry.step, entry.epoch) for entry in entries] == [(7, 1), (14, 2), (21, 3)]
    losses = {r.step: r.metrics["loss"] for r in result.history if r.split == "val"}
    assert [entry.metrics["val/loss"] for entry in entries] == [losses[7], losses[14], losses[21]]


def test_the_same_with_data_that_does_not_know_its_length(tmp_path):
    ckpt = checkpoints(tmp_path, every=ft.every(steps=7) | ft.every(epochs=1))
    run("function", ckpt)
    assert [(entry.step, entry.epoch) for entry in ckpt.entries()] == [(7, 1), (14, 2), (21, 3)]


def test_the_best_and_the_latest_are_kept(tmp_path):
    ckpt = checkpoints(tmp_path, keep=ft.keep(latest=1) | ft.keep(best=2, by="val/loss"))
    result = run("arrays", ckpt, epochs=6)
    losses = {r.step: r.metrics["loss"] for r in result.history if r.split == "val" and r.step % 7 == 0}
    best = sorted(losses, key=losses.get)[:2]
    assert {entry.step for entry in ckpt.entries()} == {42, *best}
    assert ft.restore(tmp_path, like=result.state, step="best", by="val/loss").counters().step == best[0]


def test_every_nth_is_kept_for_ever(tmp_path):
    ckpt = checkpoints(tmp_path, every=ft.every(steps=1), keep=ft.keep(every=6))
    run("arrays", ckpt)
    assert [entry.step for entry in ckpt.entries()] == [6, 12, 18, 21]


def test_saving_by_time(tmp_path):
    ckpt = checkpoints(tmp_path, every=ft.every(seconds=1e-6))
    run("arrays", ckpt, epochs=1)
    assert [entry.step for entry in ckpt.entries()] == list(range(1, 8))


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    whole = run("arrays")
    ckpt = checkpoints(tmp_path)

    def hooks(*more):
        return [*more, patience()]

    options = {"epochs": 3, "log": ft.every(steps=3), "progress": False, "compile": False, "batch_size": 8}
    evals = {"val": ft.Evaluator(EVAL, BATCHES[:2], every=ft.every(steps=4) | ft.every(epochs=1))}
    first = ft.fit(
        ft.init(MODEL, TX, seed=3),
        STEP,
        {"x": X, "y": Y},
        hooks=hooks(interrupting(1, signal.SIGUSR1)),
        checkpoint=ckpt,
        evals=evals,
        **options,
    )
    assert first.reason == "preempted"
    assert [entry.step for entry in ckpt.entries()] == [3]
    assert_same(run("arrays", ckpt, resume="latest"), whole)


def test_the_records_on_the_disk_only_grow(tmp_path):
    ckpt = checkpoints(tmp_path, every=ft.every(steps=1))
    sizes = []

    def look(record):
        path = tmp_path / "history.jsonl"
        sizes.append(path.read_bytes() if path.exists() else b"")

    result = run("arrays", ckpt, sinks=[look])
    for a, b in itertools.pairwise(sizes):
        assert b.startswith(a)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [record.step for record in result.history]


def test_a_checkpoint_can_become_a_run_of_its_own(tmp_path):
    whole = run("arrays")
    ckpt = checkpoints(tmp_path / "a", every=ft.every(steps=5))
    run("arrays", ckpt)
    with pytest.raises(ft.errors.CheckpointError, match=r"(?s)step 10 is not the newest.*shutil.copytree") as caught:
        run("arrays", ckpt, resume=10)
    fix = str(caught.value).split("fix:")[1].replace("ft.Checkpoints", "#")
    exec("import shutil\n" + "\n".join(line.strip() for line in fix.splitlines()))
    fork = checkpoints(f"{tmp_path / 'a'}-fork", keep=ft.keep(latest=1))
    assert_same(run("arrays", fork, resume="latest"), whole)
    assert [entry.step for entry in fork.entries()] == [10, 21]  # it deletes nothing that it did not write


def test_a_failed_run_says_where_its_newest_state_is(tmp_path):
    def broken(state, event):
        if event.step == 12:
            raise OSError("no more paper")
        return state

    ckpt = checkpoints(tmp_path)
    with pytest.raises(OSError, match="no more paper") as caught:
        ft.fit(
            ft.init(MODEL, TX), STEP, BATCHES, epochs=3, hooks=[broken], checkpoint=ckpt, progress=False, compile=False
        )
    failure = caught.value.ftrain
    assert (failure.origin, failure.at, failure.path) == ("step", 12, str(tmp_path))
    assert [entry.step for entry in ckpt.entries()] == [7, 12]
    like = STEP.init(ft.init(MODEL, TX))
    assert torch.equal(ft.restore(failure.path, like=like).params["a.weight"], failure.state.params["a.weight"])


class Wider(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.b(self.a(x))


def begin(model=MODEL, tx=TX, seed=3, data=None, **options):
    step = ft.train_step(model, lambda m, batch: nn.functional.cross_entropy(m(batch["x"]), batch["y"]), tx)
    data = {"x": X, "y": Y} if data is None else data
    options = {"epochs": 1, "batch_size": 8, "progress": False, "compile": False, **options}
    return ft.fit(ft.init(model, tx, seed=seed), step, data, **options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"model": Wider()},
            r"(?s)of another run.*only in the checkpoint: .*norm.*a\.weight: shape \[8, 6\] in the checkpoint, \[9, 6\]",
        ),
        ({"tx": ft.optim.sgd(0.1, momentum=0.9)}, r"(?s)of another run.*(missing in|only in) the checkpoint: .*opt"),
        (
            {"tx": ft.optim.adam(1e-2)},
            r"(?s)of another run.*optimizer: clipping.clip_by_global_norm\(\), adam.*decoupled=True",
        ),
        ({"seed": 4}, r"(?s)of another run.*seed: 3 in the checkpoint, 4 now"),
        ({"data": {"x": X[:40], "y": Y[:40]}}, r"(?s)of another run.*data samples: 50 in the checkpoint, 40 now"),
        ({"batch_size": 10}, r"(?s)of another run.*data batch_size: 8 in the checkpoint, 10 now"),
        ({"shuffle": False}, r"(?s)of another run.*data shuffle: True in the checkpoint, False now"),
        (
            {"data": BATCHES, "batch_size": None},
            r"(?s)of another run.*data kind: 'arrays' in the checkpoint, 'list' now",
        ),
    ],
    ids=["model", "optimizer", "rule", "seed", "samples", "batch_size", "shuffle", "kind"],
)
def test_a_run_of_another_kind_does_not_go_on(change, text, tmp_path):
    ckpt = checkpoints(tmp_path)
    begin(checkpoint=ckpt)
    before = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")
    }
    with pytest.raises(ft.errors.RestoreError, match=text):
        begin(checkpoint=ckpt, resume="auto", **change)
    after = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")
    }
    assert before == after
    assert begin(checkpoint=ckpt, resume="auto").reason == "epochs"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, '(?s)checkpoints of a run already.*steps 7.*resume="auto"'),
        ({"resume": "newest"}, '(?s)resume=\'newest\' makes no sense.*"auto", "latest", a step'),
        ({"resume": True}, "(?s)resume=True makes no sense"),
        ({"resume": 3}, "(?s)no checkpoint of step 3.*one of 7"),
        ({"resume": "best"}, "(?s)resume='best' makes no sense"),
    ],
    ids=["none", "newest", "True", "3", "best"],
)
def test_bad_resumes(options, text, tmp_path):
    ckpt = checkpoints(tmp_path)
    begin(checkpoint=ckpt)
    with pytest.raises(ft.errors.CheckpointError, match=text):
        begin(checkpoint=ckpt, **options)


def test_latest_has_to_be_there_and_auto_does_not(tmp_path):
    with pytest.raises(ft.errors.CheckpointError, match=r'(?s)no checkpoints.*resume="auto"'):
        begin(checkpoint=checkpoints(tmp_path), resume="latest")
    assert begin(checkpoint=checkpoints(tmp_path), resume="auto").reason == "epochs"


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ft.errors.CheckpointError, match=r"(?s)the path is a file.*a folder, or nothing yet"):
        ft.Checkpoints(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": 100}, r"(?s)every=100 makes no sense.*every=ft.every\(epochs=1\)"),
        ({"keep": 3}, r"(?s)keep=3 makes no sense.*keep=ft.keep\(latest=2\)"),
        ({"config": object()}, "(?s)config cannot be written as JSON.*not JSON serializable"),
    ],
    ids=["every", "keep", "config"],
)
def test_bad_arguments(options, text, tmp_path):
    with pytest.raises(ft.errors.CheckpointError, match=text):
        ft.Checkpoints(tmp_path, **options)


def test_keeping_by_an_evaluator_that_is_not_there(tmp_path):
    evals = {"test": ft.Evaluator(EVAL, BATCHES)}
    with pytest.raises(ft.errors.CheckpointError, match=r"(?s)no evaluator 'val'.*one of the evaluators: test"):
        begin(checkpoint=checkpoints(tmp_path, keep=ft.keep(best=1, by="val/loss")), evals=evals)


def test_keeping_by_a_metric_that_never_appears(tmp_path):
    ckpt = checkpoints(tmp_path, keep=ft.keep(best=1, by="val/los"))
    with pytest.raises(ft.errors.LimitError, match=r"(?s)'val/los' never appears.*val/loss") as caught:
        run("list", ckpt)
    assert caught.value.ftrain.state.counters().step == 4  # nothing is lost


def test_keeping_by_a_metric_that_is_not_there_when_it_is_saved(tmp_path):
    ckpt = checkpoints(tmp_path, every=ft.every(steps=5), keep=ft.keep(best=1, by="val/loss"))
    with pytest.warns(ft.errors.CheckpointWarning, match="no checkpoint has the metric 'val/loss'"):
        ft.fit(
            ft.init(MODEL, TX),
            STEP,
            BATCHES,
            steps=15,
            evals={"val": ft.Evaluator(EVAL, BATCHES[:1], every=ft.every(steps=4))},
            checkpoint=ckpt,
            progress=False,
            compile=False,
        )


def test_a_state_of_ft_save_is_no_run(tmp_path):
    state = ft.init(MODEL, TX, seed=3)
    ft.save(tmp_path, state)
    with pytest.raises(ft.errors.RestoreError, match="holds a state, but no run"):
        begin(checkpoint=checkpoints(tmp_path), resume="auto")


def test_two_runs_in_one_folder(tmp_path):
    ckpt = checkpoints(tmp_path, every=ft.every(steps=1))

    def second(record):
        begin(checkpoint=ckpt, resume="auto")

    with pytest.raises(ft.errors.CheckpointError, match="another process writes checkpoints to this folder"):
        run("arrays", ckpt, sinks=[second])
    assert run("arrays", ckpt, resume="auto").reason == "epochs"  # the lock is not kept


def test_the_newest_is_damaged(tmp_path):
    whole = run("arrays")
    ckpt = checkpoints(tmp_path, every=ft.every(steps=5))
    run("arrays", ckpt, epochs=None, steps=12)
    (tmp_path / "12" / "document" / "metadata").write_text("{")
    with pytest.raises(
        ft.errors.CheckpointError, match=r"(?s)step 12, which is damaged.*goes on with step 10"
    ) as caught:
        run("arrays", ckpt, resume="auto")
    exec("import shutil\n" + str(caught.value).split("fix:")[1].strip())
    assert_same(run("arrays", ckpt, resume="auto"), whole)


def test_the_config_is_kept(tmp_path):
    ckpt = checkpoints(tmp_path, config={"lr": 1e-2, "layers": [1, 2]})
    begin(checkpoint=ckpt)
    document = json.loads((tmp_path / "7" / "document" / "metadata").read_text())
    assert "1e-2" not in document["versions"]["torch"]
    assert '"lr": 0.01' in json.dumps(document["document"])
    assert document["versions"]["torch"] == torch.__version__


def test_importing_and_naming_checkpoints_does_not_import_orbax(tmp_path):
    code = "import sys, ftrain as ft; ft.Checkpoints('x'); ft.keep(latest=1); print('orbax' in sys.modules, 'jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.split() == ["False", "False"]


def test_the_first_save_of_a_process_draws_from_nobodys_stream(tmp_path):
    """Orbax is imported in the middle of a run, then; numpy's generator is drawn from by something in it."""
    code = """
import random, sys, numpy as np, torch, ftrain as ft
model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
step = ft.train_step(model, lambda m, batch: m(batch).square().mean(), tx)
drawn = []
def hook(state, event):
    drawn.append((np.random.rand(), random.random(), torch.rand(1).item()))
    return state
def run(checkpoint):
    drawn.clear()
    ft.fit(ft.init(model, tx), step, [torch.ones(2, 1)] * 6, hooks=[hook], checkpoint=checkpoint, progress=False, compile=False)
    return list(drawn)
assert "orbax" not in sys.modules
without = run(None)
assert run(ft.Checkpoints("ckpt", every=ft.every(steps=2))) == without
assert "orbax" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_nothing_is_said(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(checkpoint=checkpoints(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_folder_with_other_files_stays_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    shutil.copytree(tmp_path, tmp_path / "7-backup")
    begin(checkpoint=checkpoints(tmp_path, keep=ft.keep(latest=1)))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "7-backup" / "notes.txt").read_text() == "mine"


def test_workers_of_a_loader_start_after_a_save_without_a_warning(tmp_path):
    """JAX, which comes with Orbax, warns at every fork once its backend runs. A process of its own: others may have used JAX."""
    code = """
import torch, ftrain as ft
if __name__ == "__main__":
    model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    step = ft.train_step(model, lambda m, batch: m(batch).square().mean(), tx)
    loader = torch.utils.data.DataLoader(torch.ones(20, 1), batch_size=4, num_workers=1)
    ckpt = ft.Checkpoints("ckpt", every=ft.every(epochs=1))
    result = ft.fit(ft.init(model, tx), step, loader, epochs=3, checkpoint=ckpt, progress=False, compile=False)
    assert result.state.counters().step == 15
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    out = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert out.stderr == ""


@pytest.mark.parametrize("kind", ["arrays", "loader", "window-carry", "source"])
def test_three_epochs_that_are_gone_on_with_three_times_in_an_epoch_read_each_sample_once_an_epoch(kind, tmp_path):
    ids = torch.arange(50)
    inner = ft.train_step(MODEL, lambda m, batch: nn.functional.cross_entropy(m(batch["x"]), batch["y"]), TX)

    def step(state, batch):
        parts = batch.batches if isinstance(batch, ft.data.Window) else (batch,)
        found = torch.cat([part["id"] for part in parts])
        state, metrics = inner(state, batch)
        return state, {**metrics, "id": ft.metrics.Collect((found,))}

    rows = [{"x": X[i], "y": Y[i], "id": ids[i]} for i in range(50)]
    arrays = {"x": X, "y": Y, "id": ids}
    data = {
        "arrays": lambda: (arrays, 8),
        "loader": lambda: (torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True), None),
        "window-carry": lambda: (ft.data.window(arrays, 2, short="carry", batch_size=8), None),
        "source": lambda: (ft.data.source(arrays).shuffle().map(lambda row: row).batch(8), None),
    }[kind]

    def go(limit):
        batches, size = data()
        options = {"progress": False, "compile": False, "log": ft.every(steps=1), "batch_size": size}
        ckpt = checkpoints(tmp_path, every=ft.every(steps=1))
        return ft.fit(ft.init(MODEL, TX, seed=3), step, batches, checkpoint=ckpt, resume="auto", **limit, **options)

    for steps in (2, 4, 6) if kind == "window-carry" else (2, 4, 6, 9, 11, 13, 15, 18, 20):
        go({"steps": steps})
    result = go({"epochs": 3})
    seen = torch.cat([torch.as_tensor(record.metrics["id"]) for record in result.history if record.split == "train"])
    epochs = seen.split(50)
    assert len(seen) == (148 if kind == "window-carry" else 150)  # the last batch waits for a fourth epoch
    for epoch in epochs[:2]:
        assert sorted(epoch.tolist()) == list(range(50))
    assert len(set(epochs[2].tolist())) == len(epochs[2])
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 on torch 2.13
@pytest.mark.parametrize("kind", ["arrays", "loader", "window-carry", "stateful"])
def test_a_loop_without_fit_goes_on_from_what_it_saved(kind, tmp_path):
    """Another process would do the same: nothing of the first loop is used but its folder."""

    def data(seed=0):
        if kind == "stateful":
            torch.manual_seed(seed)  # torchdata's sampler draws its seed as it is made; what was saved goes before that
            rows = [{"x": X[i], "y": Y[i]} for i in range(50)]
            return {"data": StatefulDataLoader(rows, batch_size=8, shuffle=True)}
        return DATA[kind]()

    def leaves(tick):
        return [leaf.clone() for leaf in ft.tree.leaves(tick.state)]

    start = STEP.init(ft.init(MODEL, TX, seed=3))
    whole = [(tick.step, leaves(tick)) for tick in ft.loop(start, STEP, **data(), epochs=2)]
    for tick in ft.loop(start, STEP, **data(), epochs=2):
        if tick.step == 3:
            ft.save(tmp_path, tick.state, position=tick.position(), config={"lr": 1e-2})
            break
    state, position = ft.restore(tmp_path, like=start), ft.checkpoint.position(tmp_path)
    rest = [(tick.step, leaves(tick)) for tick in ft.loop(state, STEP, **data(1), epochs=2, start=position)]
    assert [step for step, _ in rest] == [step for step, _ in whole[3:]]
    for (_, one), (_, two) in zip(rest, whole[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert ft.checkpoint.info(tmp_path)["config"] == {"lr": 1e-2}


def test_what_is_known_of_a_run(tmp_path):
    begin(checkpoint=checkpoints(tmp_path, config={"lr": 1e-2}))
    info = ft.checkpoint.info(tmp_path)
    assert (info["step"], info["epoch"], info["config"], info["format"]) == (7, 1, {"lr": 1e-2}, 1)
    assert info["data"]["samples"] == 50
    assert info["metrics"].keys() == {"loss", "lr", "grad_norm"}
    assert info["versions"]["torch"] == torch.__version__
    assert ft.checkpoint.position(tmp_path).epoch == 1


def test_a_position_that_is_none(tmp_path):
    state = ft.init(MODEL, TX)
    with pytest.raises(
        ft.errors.CheckpointError, match=r"(?s)position= is where a loop is.*position=tick.position\(\)"
    ):
        ft.save(tmp_path, state, position=3)
    ft.save(tmp_path, state)
    with pytest.raises(ft.errors.RestoreError, match=r"(?s)saved without a position.*position=tick.position\(\)"):
        ft.checkpoint.position(tmp_path)


def test_an_evaluation_that_was_interrupted_still_decides_about_its_checkpoint(tmp_path):
    calls = []

    def evaluate(state, batch):
        calls.append(batch)
        if len(calls) == 2:  # at the end of the first epoch, which is to be the best one
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": ft.metrics.Mean(state.step.float(), torch.tensor(1.0))}

    def go():
        ckpt = checkpoints(tmp_path, keep=ft.keep(best=1, by="val/loss"))
        evals = {"val": ft.Evaluator(evaluate, BATCHES[:2])}
        options = {"epochs": 3, "evals": evals, "checkpoint": ckpt, "progress": False, "compile": False}
        return ft.fit(ft.init(MODEL, TX), STEP, BATCHES, resume="auto", **options), ckpt

    result, ckpt = go()
    assert (result.reason, ckpt.entries()[0].metrics.get("val/loss")) == ("terminated", None)
    result, ckpt = go()
    assert [entry.step for entry in ckpt.entries()] == [7, 21]
    assert ckpt.entries()[0].metrics["val/loss"] == 7.0
    assert ft.restore(tmp_path, like=result.state, step="best", by="val/loss").counters().step == 7


def test_what_ft_save_put_there_is_kept(tmp_path):
    ckpt = checkpoints(tmp_path, keep=ft.keep(latest=1))
    result = run("list", ckpt, epochs=1)
    ft.save(tmp_path, result.state, step=5)
    run("list", ckpt, epochs=3, resume="auto")
    assert [entry.step for entry in ckpt.entries()] == [5, 21]


def test_a_training_metric_to_go_by_that_is_not_there_is_said_at_once(tmp_path):
    said = []

    def sink(record):
        said.append((record.step, len(caught)))

    ckpt = checkpoints(tmp_path, every=ft.every(steps=3), keep=ft.keep(best=1, by="los"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("list", ckpt, epochs=1, sinks=[sink])
    texts = [str(one.message) for one in caught]
    assert "the best are kept by 'los', which is not among the metrics so far" in texts[0]
    assert 'by="loss"' in texts[0]
    assert said[0] == (3, 1)
