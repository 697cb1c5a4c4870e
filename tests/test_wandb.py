"""What wandb gets from the run's log (jax_run_log.py), and that it never stops a run.

python -m pytest tests/test_wandb.py
"""

import json
import math
import os
import re
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jax_run_log import RunLog, read_metrics, start_wandb

ROOT = Path(__file__).resolve().parent.parent


def make_log(out_dir: Path | None, resume_step: int | None = None, **changes: Any) -> RunLog:
    options = {"max_iters": 100, "tokens_per_iter": 768, "flops_per_iter": 4e9, "peak": None} | changes
    return RunLog(out_dir, resume_step, **options)


class Recorder:
    """A wandb run as far as the log needs one."""

    def __init__(self, starting_step: int = 0, fails_at: int | None = None):
        self.starting_step, self.fails_at = starting_step, fails_at
        self.calls: list[tuple[int, dict[str, Any]]] = []
        self.exit_code: int | None = None

    def log(self, record: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the network\nis gone")
        self.calls.append((step, record))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_wandb_gets_the_same_keys_and_steps_never_go_down(tmp_path):
    run = Recorder()
    log = make_log(tmp_path, wandb_run=run)
    log.evaluation(0, 4.2, 4.3, 0.0)
    log.iteration(0, 4.2, 1e-3, 1.0, 0.01)
    log.iteration(10, 4.0, 1e-3, 1.0, 0.01)
    log.iteration(9, 4.1, 1e-3, 1.0, 0.01)  # out of order: in the file, not in wandb
    log.evaluation(10, 3.9, 3.9, 1e-3)
    log.close(exit_code=3)
    assert [step for step, _ in run.calls] == [0, 0, 10, 10]
    file = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["iter"] != 9]
    assert [r for _, r in run.calls] == [{k: v for k, v in r.items() if v is not None} for r in file]
    assert run.exit_code == 3


def test_a_resumed_wandb_run_that_was_ahead_of_the_checkpoint_is_not_sent_old_steps(tmp_path, capsys):
    run = Recorder(starting_step=23)
    log = make_log(tmp_path, 20, wandb_run=run)
    for k in range(20, 25):
        log.iteration(k, 4.0, 1e-3, 1.0, 0.01)
    assert [step for step, _ in run.calls] == [23, 24]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    assert capsys.readouterr().out.count("wandb: has this run up to iteration 22 already") == 1


def test_a_wandb_that_breaks_later_is_switched_off_with_one_line(tmp_path, capsys):
    run = Recorder(fails_at=1)
    log = make_log(tmp_path, wandb_run=run)
    for k in range(4):
        log.iteration(k, 4.0, 1e-3, 1.0, 0.01)
    log.close()
    assert [step for step, _ in run.calls] == [0]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
    assert len(lines) == 1 and "ConnectionError: the network is gone" in lines[0]


def test_a_wandb_that_cannot_finish_does_not_stop_the_end_of_a_run(capsys):
    run = types.SimpleNamespace(starting_step=0, finish=lambda exit_code: 1 / 0)
    make_log(None, wandb_run=run).close()
    assert capsys.readouterr().out.startswith("wandb: could not finish (ZeroDivisionError")


@pytest.mark.parametrize("broken", [None, types.SimpleNamespace(setup=lambda: 1 / 0)])
def test_a_missing_or_broken_wandb_is_one_line_and_no_run(monkeypatch, capsys, tmp_path, broken):
    monkeypatch.setitem(sys.modules, "wandb", broken)  # None makes the import fail
    assert start_wandb({}, "p", "n", None, tmp_path) is None
    out = capsys.readouterr().out
    assert out.startswith("wandb: off (") and out.count("\n") == 1 and "metrics.jsonl" in out


WANDB_SCRIPT = """
import math
from pathlib import Path
from jax_run_log import RunLog, start_wandb
run = start_wandb({"n_layer": 2, "dataset": "toy"}, "owt", "gpt2", {run_id!r}, Path("out"))
print("id", run.id)
log = RunLog(None, None, 100, 768, 4e9, 1e12, run)
log.evaluation(0, 4.2, 4.25, 0.0)
for k in range(7):
    log.iteration(k, math.nan if k == 3 else 4.0 - k, 1e-3, 1.5, 0.01)
log.iteration(2, 1.0, 1e-3, 1.5, 0.01)
log.evaluation(7, 3.0, 3.5, 1e-3)
log.close()
"""


def run_wandb_script(folder: Path, run_id: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    here = {"HOME": str(folder), "NETRC": str(folder / "none"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", WANDB_SCRIPT.replace("{run_id!r}", repr(run_id))],
        cwd=folder,
        env=clean | here | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def read_wandb_file(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format, a 7 byte file header, then blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for record in read_wandb_file(file):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items()})
    return rows


def test_where_nobody_is_logged_in_wandb_is_offline_with_one_line_and_no_prompt(tmp_path):
    done = run_wandb_script(tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, *lines = done.stdout.splitlines()
    assert re.fullmatch(r"wandb: nobody is logged in, so offline; to upload later: wandb sync (\S+)", first)
    assert (tmp_path / first.split()[-1]).is_dir()
    assert re.fullmatch(r"id [0-9a-f]{8}", second)
    assert not [line for line in lines if "wandb" in line]
    assert done.stderr == ""

    rows = wandb_rows(tmp_path)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7]
    seen = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    iteration = {"lr": 1e-3, "grad_norm": 1.5, "time_ms": 10.0, "tokens_per_s": 76800.0}
    assert seen[0] == {"iter": 0, "train/loss": 4.2, "val/loss": 4.25, "loss": 4.0} | iteration
    assert seen[1] == {"iter": 1, "loss": 3.0} | iteration
    assert "NaN" in str(seen[3]["loss"]) or math.isnan(seen[3]["loss"])
    assert seen[5] == {"iter": 5, "loss": -1.0, "mfu": pytest.approx(40)} | iteration
    assert seen[7] == {"iter": 7, "train/loss": 3.0, "val/loss": 3.5, "lr": 1e-3, "mfu": pytest.approx(40)}


def test_wandb_keeps_the_run_id_it_is_given_and_obeys_its_environment(tmp_path):
    done = run_wandb_script(tmp_path, "cafe1234", WANDB_MODE="offline", WANDB_DIR=str(tmp_path / "elsewhere"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wandb: offline; to upload later: wandb sync ")
    assert "id cafe1234" in done.stdout
    assert list((tmp_path / "elsewhere").glob("wandb/offline-run-*-cafe1234/run-cafe1234.wandb"))


def test_a_disabled_wandb_writes_and_says_nothing(tmp_path):
    done = run_wandb_script(tmp_path, WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stdout + done.stderr
    assert not list(tmp_path.glob("wandb/*run-*"))
