"""Law 6 across processes: `kill -9` at random moments, also in the middle of a save (the harness is in crash.py)."""

import pytest

from . import crash

KILLS = 5


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen processes one after the other, beside another worker's tests
def test_a_run_that_is_killed_at_random_moments_is_the_run_that_was_not(tmp_path):
    whole, killed, moments = crash.crash(tmp_path, KILLS)
    assert len(moments) == KILLS
    assert "in a save" in moments
    assert killed["reason"] == whole["reason"] == "epochs"
    assert killed["rows"] == whole["rows"]
    assert killed["journal"] == whole["journal"]
    assert killed["state"] == whole["state"]
    assert whole["skipped"] > 10  # the planted infinities were met
    assert len(whole["rows"]) > 50
