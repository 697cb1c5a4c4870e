"""A run that is killed with SIGKILL and resumed is, bit for bit, the run that was never killed.

python -m pytest tests/test_kill.py

A few kills, chosen as `tests/torture.py` chooses them; `make torture` has fifty.
"""

import shutil

import pytest

from tests import torture


def test_run_killed_at_random_moments_is_the_run_never_killed(tmp_path, environment):
    outcome = torture.torture(tmp_path, kills=3, iters=600, seed=5, env=environment)
    assert outcome.faults == []
    assert sum(outcome.kills.values()) == 3 and outcome.starts == 4
    assert max(outcome.lost) <= 200  # a save every 20, one on its way, and on a slow disk training runs ahead


@pytest.mark.parametrize("damage", ["a loss", "a line twice", "other weights", "a leftover"])
def test_a_difference_would_be_noticed(finished, tmp_path, damage):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    assert torture.differences(finished, other, 20) == []
    log = other / "metrics.jsonl"
    if damage == "a loss":
        log.write_text(log.read_text().replace('"loss": 2.', '"loss": 1.', 1))
    elif damage == "a line twice":
        log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    elif damage == "other weights":
        shutil.rmtree(other / "checkpoints/20/params")
        shutil.copytree(other / "checkpoints/10/params", other / "checkpoints/20/params")
    else:
        (other / "lock").write_text("")
    assert len(torture.differences(finished, other, 20)) == 1
