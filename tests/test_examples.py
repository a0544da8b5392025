"""The examples run as a user runs them: as scripts, from another directory, on real data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ftrain

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGE = Path(ftrain.__file__).parents[1]  # the scripts import the ftrain that these tests do, installed or not
PNG = b"\x89PNG\r\n\x1a\n"


def run(script: str, *args: str, cwd: Path, code: int = 0) -> str:
    """Run an example in `cwd`, and give what it printed; nothing may go to stderr where it succeeds."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / script), *args]
    done = subprocess.run(command, check=False, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    if code == 0:
        assert not done.stderr, done.stderr
        return done.stdout
    return done.stderr


def test_digits_reaches_98_percent_and_saves_its_curves(tmp_path):
    out = run("digits.py", "--epochs", "12", "--no-compile", "--plot", "curves.png", cwd=tmp_path)
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)% +([\d.]+) +([\d.]+)% +[\d.]+$", out, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 13))
    loss, val_loss = [float(row[1]) for row in rows], [float(row[3]) for row in rows]
    assert loss[-1] < 0.1 * loss[0]
    assert val_loss[-1] < 0.2 * val_loss[0]
    found = re.search(r"^test accuracy ([\d.]+)%", out, flags=re.MULTILINE)
    assert found is not None, out
    assert float(found[1]) >= 98.0
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_digits_is_deterministic(tmp_path):
    args = ("--epochs", "1", "--no-compile", "--seed", "3")
    results = [re.findall(r"^test accuracy.*$", run("digits.py", *args, cwd=tmp_path), re.MULTILINE) for _ in range(2)]
    assert results[0] == results[1]
    assert len(results[0]) == 1
    assert (tmp_path / "digits.png").read_bytes().startswith(PNG)


def test_byte_lm_learns_and_shows_gzip_beside_it(tmp_path):
    small = ("--layers", "1", "--width", "64", "--context", "64", "--batch-size", "8")
    out = run("byte_lm.py", "--steps", "20", "--no-compile", *small, cwd=tmp_path)
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)$", out, flags=re.MULTILINE)
    assert [int(row[0]) for row in rows] == [0, 4, 8, 12, 16, 20]
    bits = [float(row[2]) for row in rows]
    assert 7.5 < bits[0] < 9.0  # guessing, before the first step
    assert bits[-1] < bits[0] - 1.5
    assert bits[-1] == min(bits)
    yardstick = re.search(r"^ *gzip -9 +([\d.]+)$", out, flags=re.MULTILINE)
    assert yardstick is not None, out
    assert 1.0 < float(yardstick[1]) < 4.0
    assert "\ndef " in out[yardstick.end() :]  # the sample begins with its prompt
    assert not list(tmp_path.iterdir())


def table(out: str) -> dict[str, list[float]]:
    """The lines of a table: a name, then numbers or percentages."""
    lines = re.findall(r"^ *(\w[\w ]*?)((?: {2,}[\d.]+%?)+)$", out, flags=re.MULTILINE)
    return {name: [float(value.rstrip("%")) for value in values.split()] for name, values in lines}


@pytest.mark.parametrize("options", [["--accumulate", "1"], ["--simultaneous"]], ids=["alternating", "simultaneous"])
def test_gan_draws_digits(options, tmp_path):
    out = run("gan.py", "--epochs", "15", *options, cwd=tmp_path)
    distance = {name: value for name, (value,) in table(out).items()}
    assert list(distance) == ["untrained", "trained", "averaged", "real"]
    assert distance["averaged"] < 0.25 * distance["untrained"]
    assert distance["trained"] < 0.25 * distance["untrained"]
    assert distance["real"] < 0.2  # what a perfect generator would show
    assert len(re.findall(r"^[ .:\-=+*#%@]{96}$", out, flags=re.MULTILINE)) == 8  # six pictures


def test_thawing_is_better_than_its_alternatives(tmp_path):
    out = run("finetune.py", cwd=tmp_path)
    known = re.search(r"pre-trained: ([\d.]+)% .* ([\d.]+)% on negatives", out)
    assert known is not None, out
    assert float(known[1]) > 99
    assert float(known[2]) < 10
    found = {name: value for name, (value,) in table(out).items()}
    assert list(found) == ["from scratch", "head alone", "all at once", "thawing"]
    assert found["thawing"] > found["from scratch"] + 1
    assert found["thawing"] > found["all at once"] + 3
    assert found["thawing"] > found["head alone"] - 1
    rates = re.findall(r"^ +(\d+) +([\d.e+-]+) +([\d.e+-]+) +([\d.e+-]+)$", out, flags=re.MULTILINE)
    first = [
        next(int(row[0]) for row in rates if float(row[i]) > 0) for i in (1, 2, 3)
    ]  # when each group is seen to move
    assert first == [26, 76, 126]


def test_the_critic_finds_the_distance_that_exact_transport_gives(tmp_path):
    out = run("gradient_penalty.py", "--pairs", "01", "--steps", "500", cwd=tmp_path)
    found = re.search(r"^ +0 +1 +([\d.]+) +([\d.]+) +([\d.]+)$", out, flags=re.MULTILINE)
    assert found is not None, out
    critic, exact, slope = (float(value) for value in found.groups())
    assert abs(critic / exact - 1) < 0.05
    assert abs(slope - 1) < 0.05


def test_maml_adapts_in_one_step(tmp_path):
    out = run("maml.py", "--steps", "400", cwd=tmp_path)
    loss = table(out)
    assert list(loss)[-3:] == ["untrained", "all at once", "MAML"]
    assert loss["MAML"][1] < 0.65 * loss["MAML"][0]
    assert loss["MAML"][1] < 0.65 * loss["all at once"][1]
    assert loss["MAML"][5] < loss["MAML"][1]  # further steps, which it was not trained for, help too


def test_folds_ensembles_and_sweeps_are_loops(tmp_path):
    out = run("sweep.py", "--epochs", "4", "--folds", "3", "--members", "3", cwd=tmp_path)
    found = [
        (name, float(value.rstrip("%"))) for name, value in re.findall(r"^ +(\S+) +([\d.e+-]+%?)$", out, re.MULTILINE)
    ]
    folds, members, rates = found[:5], found[5:10], found[10:]
    assert [name for name, _ in folds] == ["1", "2", "3", "mean", "deviation"]
    accuracies = [value for _, value in folds[:3]]
    assert abs(folds[3][1] - sum(accuracies) / 3) < 0.02
    assert min(accuracies) > 85
    assert len(set(accuracies)) > 1  # other data
    assert [name for name, _ in members] == ["0", "1", "2", "alone", "together"]
    assert members[4][1] >= members[3][1]  # the mean prediction is at least as good as a member is on average
    assert len({value for _, value in members[:3]}) > 1  # other seeds
    losses = dict(rates[:-1])
    assert len(losses) == 6
    assert rates[-1] == ("best", float(min(losses, key=losses.__getitem__)))
    assert losses["1e-04"] > 2 * min(losses.values())
    assert re.search(r"^12 runs in [\d.]+ s$", out, re.MULTILINE)
    assert (
        out.split("\n")[:-2]
        == run("sweep.py", "--epochs", "4", "--folds", "3", "--members", "3", cwd=tmp_path).split("\n")[:-2]
    )


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_wrong_options_are_told(script, tmp_path):
    limit = "--epochs" if script in ("digits.py", "gan.py", "sweep.py") else "--steps"
    assert "0 is not positive" in run(script, limit, "0", cwd=tmp_path, code=2)
