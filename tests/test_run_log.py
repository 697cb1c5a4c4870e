"""The run's log: console lines, metrics.jsonl, wandb, and the picture made of them.

python -m pytest tests/test_run_log.py
"""

import io
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
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_run_log
from jax_run_log import RunLog, peak_flops, read_metrics, start_wandb, trim_metrics

ROOT = Path(__file__).resolve().parent.parent


def make_log(out_dir: Path | None, resume_step: int | None = None, **changes: Any) -> RunLog:
    options = {"max_iters": 100, "tokens_per_iter": 768, "flops_per_iter": 4e9, "peak": None} | changes
    return RunLog(out_dir, resume_step, **options)


def strict_json(line: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


# ----------------------------------------------------------------------------------------------------------------------
# Console lines


def test_the_iteration_line_is_nanogpts_with_additions_at_its_end(capsys):
    log = make_log(None)
    log.iteration(9, 3.3, 1e-3, 1.0, 2.0)
    log.iteration(10, 3.20412, 1e-3, 1.0, 0.03123)
    line = capsys.readouterr().out.splitlines()[1]
    assert line == "iter 10: loss 3.2041, time 31.23ms, mfu -100.00%, 24,592 tok/s, eta 3s"


def test_the_evaluation_line_is_nanogpts(capsys):
    make_log(None).evaluation(250, 2.12344, 2.23454, 1e-3)
    assert capsys.readouterr().out == "step 250: train loss 2.1234, val loss 2.2345\n"


def test_scrapers_written_for_nanogpt_read_the_lines(capsys):
    log = make_log(None, peak=1e12)
    log.evaluation(0, 4.2, 4.3, 0.0)
    for k in range(12):
        log.iteration(k, 4.0 - k / 10, 1e-3, 1.0, 0.01)
    text = capsys.readouterr().out
    iterations = re.findall(r"^iter (\d+): loss ([\d.]+), time ([\d.]+)ms, mfu (-?[\d.]+)%", text, re.MULTILINE)
    assert [int(k) for k, *_ in iterations] == list(range(12))
    assert iterations[11] == ("11", "2.9000", "10.00", "40.00")
    assert re.findall(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)$", text, re.MULTILINE) == [
        ("0", "4.2000", "4.3000")
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (62, "1m02s"), (3599.7, "1h00m"), (11100, "3h05m"), (187200, "2d04h")],
)
def test_durations_have_two_units(seconds, shown):
    assert jax_run_log._duration(seconds) == shown


def test_the_eta_forgets_the_first_record_which_holds_the_compilation(capsys):
    log = make_log(None, max_iters=102)
    log.iteration(0, 4.0, 1e-3, 1.0, 60.0)
    log.iteration(1, 4.0, 1e-3, 1.0, 1.0)
    log.iteration(2, 4.0, 1e-3, 1.0, 2.0)  # mean 1.1 s, 99 left
    log.iteration(101, 4.0, 1e-3, 1.0, 1.0)
    etas = [line.split("eta ")[1] for line in capsys.readouterr().out.splitlines()]
    assert etas == ["?", "1m40s", "1m49s", "0s"]


def test_lines_go_to_stdout_and_the_bar_only_to_a_terminal(capsys, monkeypatch):
    log = make_log(None)
    log.iteration(0, 4.0, 1e-3, 1.0, 0.01)
    log.close()
    assert capsys.readouterr().err == ""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    log = make_log(None)
    for k in range(3):
        log.iteration(k, 4.0, 1e-3, 1.0, 0.01)
    log.say("saving checkpoint to out_jax")
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["iter 0", "iter 1", "iter 2", "saving checkpoint to out_jax"]
    assert "/100" in terminal.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# MFU and peaks


def test_mfu_is_nanogpts_running_average_in_percent(tmp_path):
    log = make_log(tmp_path, peak=989e12, flops_per_iter=854.8e6 * 491_520)
    times = [30.0, 1.1, 0.9, 1.0, 1.05, 0.8, 0.9, 1.2]
    for k, seconds in enumerate(times):
        log.iteration(k, 3.0, 6e-4, 1.0, seconds)
    log.evaluation(8, 3.0, 3.1, 6e-4)
    expected, running = [], -1.0
    for k, seconds in enumerate(times):
        if k >= 5:
            now = (854.8e6 * 491_520 / seconds) / 989e12
            running = now if running == -1.0 else running * 0.9 + now * 0.1
        expected.append(None if running == -1.0 else pytest.approx(running * 100))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["mfu"] for r in records] == [*expected, expected[-1]]
    assert 30 < records[-1]["mfu"] < 70


def test_mfu_waits_for_the_first_iterations_of_a_resumed_process_too(tmp_path):
    log = make_log(tmp_path, 1003, max_iters=2000, peak=1e12)
    for k in (1010, 1020):  # the first record still holds the compilation
        log.iteration(k, 3.0, 6e-4, 1.0, 0.01)
    assert [r["mfu"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [None, pytest.approx(40)]


def test_peaks_are_known_by_the_names_jax_gives():
    assert peak_flops("NVIDIA H200", "bfloat16") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA A100-SXM4-40GB", "bfloat16") == 312e12  # the figure in nanoGPT
    assert peak_flops("NVIDIA A100-SXM4-40GB", "float32") == 156e12
    assert peak_flops("NVIDIA A100 80GB PCIe", "float16") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA H100 NVL", "bfloat16") == 835.5e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A10", "bfloat16") != peak_flops("NVIDIA A10G", "bfloat16")
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5", "bfloat16") == 459e12


@pytest.mark.parametrize(
    "kind",
    [
        *("cpu", "", "NVIDIA", "TPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100"),
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti"),
    ],
)
def test_an_unknown_or_cut_down_device_has_no_peak(kind):
    assert [peak_flops(kind, dtype) for dtype in ("bfloat16", "float16", "float32")] == [None] * 3


def test_no_bfloat16_peak_where_there_is_no_bfloat16_unit():
    assert peak_flops("Tesla T4", "bfloat16") is None
    assert peak_flops("Tesla T4", "float16") == 65e12
    assert peak_flops("NVIDIA H200", "int4") is None


def test_the_peak_table_is_consistent():
    names = [name for row in jax_run_log._PEAK_TFLOPS for name in row[0].split(" | ")]
    assert len(names) == len(set(names))
    for _, bfloat16, float16, float32 in jax_run_log._PEAK_TFLOPS:
        sixteen = bfloat16 or float16
        assert sixteen is not None
        assert 1 <= sixteen / float32 <= 9 and float32 >= 8 and sixteen <= 2500
        assert bfloat16 is None or float16 is None or bfloat16 == float16


# ----------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_records_come_back_as_they_went_in(tmp_path):
    log = make_log(tmp_path)
    loss = 3.4028234663852886  # every digit counts: resumed runs are compared bit for bit
    log.evaluation(0, 4.2, 4.25, 0.0)
    log.iteration(0, loss, 1e-5, 0.1 + 0.2, 0.03125)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed, though not closed
    assert [strict_json(line) for line in lines] == [
        {"iter": 0, "train/loss": 4.2, "val/loss": 4.25, "lr": 0.0, "mfu": None},
        {
            "iter": 0,
            "loss": loss,
            "lr": 1e-5,
            "grad_norm": 0.1 + 0.2,
            "time_ms": 31.25,
            "tokens_per_s": 24576.0,
            "mfu": None,
        },
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == [strict_json(line) for line in lines]
    log.retry()
    log.close()


def test_nan_and_infinity_are_null_in_json_and_plain_on_the_console(tmp_path, capsys):
    log = make_log(tmp_path)
    log.iteration(0, math.nan, 1e-3, math.inf, 0.01)
    log.evaluation(1, math.inf, math.nan, 1e-3)
    records = [strict_json(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (records[0]["loss"], records[0]["grad_norm"], records[0]["lr"]) == (None, None, 1e-3)
    assert (records[1]["train/loss"], records[1]["val/loss"]) == (None, None)
    out = capsys.readouterr().out
    assert "loss nan," in out and "train loss inf, val loss nan" in out


def test_without_an_out_dir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = make_log(None)
    log.iteration(0, 4.0, 1e-3, 1.0, 0.01)
    log.evaluation(0, 4.0, 4.0, 1e-3)
    log.retry()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_run_does_not_continue_the_file_of_a_run_that_saved_nothing(tmp_path):
    for _ in range(2):
        log = make_log(tmp_path)
        log.iteration(0, 4.0, 1e-3, 1.0, 0.01)
        log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    "torn", [b'{"iter": 2, "lo', b'{"iter": 2, "lo\n', b"\x00\x00\x00", b'{"iter": 2, "\xff', b"7"]
)
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iter": 0, "loss": 4.0}\n{"iter": 1, "loss": 3.9}\n' + torn)
    assert [r["iter"] for r in read_metrics(path)] == [0, 1]


def test_a_last_line_that_lacks_only_its_newline_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iter": 0, "loss": 4.0}\n{"iter": 1, "loss": 3.9}')
    assert [r["iter"] for r in read_metrics(path)] == [0, 1]


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=30) | st.sampled_from([b'{"iter": 3}', b'{"iter": NaN}', b"[" * 100_000]), max_size=4)
)
def test_any_bytes_are_records_or_a_metrics_error(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("garbage") / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        assert all(type(record["iter"]) is int for record in read_metrics(path))
    except jax_run_log.MetricsError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("bad", [b'{"iter": 1, "lo', b"[1]", b"", b'{"loss": 1.0}'])
def test_a_bad_line_elsewhere_is_an_error_that_names_file_and_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iter": 0, "loss": 4.0}\n' + bad + b'\n{"iter": 2, "loss": 3.9}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        trim_metrics(path, 1)


def test_trimming_keeps_what_had_happened_by_the_checkpoint_each_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [
        {"iter": 0, "train/loss": 4.2, "val/loss": 4.2},
        {"iter": 0, "loss": 4.2},
        {"iter": 9, "loss": 4.0},
        {"iter": 10, "train/loss": 3.0, "val/loss": None},  # an evaluation, though its loss was NaN
    ]
    dropped = [
        {"iter": 9, "loss": 4.0},
        {"iter": 10, "loss": 3.9},
        {"iter": 20, "train/loss": 3.0, "val/loss": 3.1},
        {"iter": 20, "loss": 3.0},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in kept + dropped) + '{"iter": 21, "lo')
    assert trim_metrics(path, 10) == kept
    assert path.read_text() == "".join(json.dumps(r) + "\n" for r in kept)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_without_a_metrics_file_starts_one(tmp_path):
    log = make_log(tmp_path, 10)
    assert log.last_evaluation is None
    log.iteration(10, 4.0, 1e-3, 1.0, 0.01)
    assert [r["iter"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [10]


def run_from(log: RunLog, start: int, eval_interval: int, log_interval: int) -> list[tuple[int, int]]:
    """A trainer without the training; returns (file size when sealed, step) of each checkpoint."""
    assert log.out_dir is not None
    checkpoints = []
    for k in range(start, log.max_iters + 1):
        if k % eval_interval == 0 or k == log.max_iters:
            if log.last_evaluation != k:
                log.evaluation(k, 4 / (k + 1), 4.1 / (k + 1), 1e-3)
            if k > 0:
                log.retry()
                checkpoints.append(((log.out_dir / "metrics.jsonl").stat().st_size, k))
        if k < log.max_iters and k % log_interval == 0:
            log.iteration(k, 4.2 / (k + 1), 1e-3, 1.0, 0.01)
    log.close()
    return checkpoints


@settings(max_examples=60, deadline=None)
@given(data=st.data(), eval_interval=st.integers(1, 7), log_interval=st.integers(1, 4))
def test_killed_at_any_byte_and_resumed_every_record_is_there_once(tmp_path_factory, data, eval_interval, log_interval):
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    run_from(make_log(whole, max_iters=12), 0, eval_interval, log_interval)

    path = killed / "metrics.jsonl"
    checkpoints = run_from(make_log(killed, max_iters=12), 0, eval_interval, log_interval)
    for _ in range(data.draw(st.integers(1, 3), label="kills")):
        size = data.draw(st.integers(0, path.stat().st_size), label="bytes that were written")
        os.truncate(path, size)
        checkpoints = [c for c in checkpoints if c[0] <= size]
        step = checkpoints[-1][1] if checkpoints else None
        checkpoints += run_from(make_log(killed, step, max_iters=12), step or 0, eval_interval, log_interval)
    assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# wandb


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


# ----------------------------------------------------------------------------------------------------------------------
# plot_jax.py


def plot(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "plot_jax.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def fake_run(out_dir: Path, iterations: int, evaluations: int) -> None:
    out_dir.mkdir()
    log = make_log(out_dir)
    for k in range(max(iterations, evaluations)):
        if k < evaluations:
            log.evaluation(k, 4 / (k + 1), math.nan if k == 1 else 4 + (k - 3) ** 2, 1e-3)
        if k < iterations:
            log.iteration(k, math.nan if k == 2 else 4.25 / (k + 1), 1e-3, 1.0, 0.01)
    log.close()


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 20_000


def test_curves_of_two_runs_make_a_picture_and_a_table(tmp_path):
    fake_run(tmp_path / "out-a", 20, 6)
    fake_run(tmp_path / "out-b", 1, 1)
    (tmp_path / "out-b" / "metrics.jsonl").open("a").write('{"iter": 1, "lo')  # still being written
    done = plot("out-a", "out-b", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    *_, row_a, row_b, path = done.stdout.splitlines()
    assert row_a.split() == ["out-a", "19", "0.2125", "4.0000", "3"]
    assert row_b.split() == ["out-b", "0", "4.2500", "13.0000", "0"]
    assert path == "out-a/curves.png" and is_png(tmp_path / path)


def test_a_run_of_evaluations_only_is_drawn_where_told(tmp_path):
    fake_run(tmp_path / "out", 0, 2)
    done = plot("out", "--out=picture.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2].split() == ["out", "1", "-", "13.0000", "0"]
    assert is_png(tmp_path / "picture.png")
    assert not (tmp_path / "out" / "curves.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"error: out/metrics\.jsonl not found"),
        ("", r"error: out/metrics\.jsonl has no records"),
        ('{"iter": 0, "lo', r"error: out/metrics\.jsonl has no records"),
        ('oops\n{"iter": 0, "loss": 1.0}\n', r"error: out/metrics\.jsonl, line 1: "),
    ],
)
def test_missing_empty_or_malformed_metrics_are_one_line_and_exit_2(tmp_path, content, message):
    if content is not None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "metrics.jsonl").write_text(content)
    done = plot("out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(message + r"[^\n]*\n", done.stderr)


def test_a_picture_that_cannot_be_written_is_one_line_and_exit_2(tmp_path):
    fake_run(tmp_path / "out", 2, 1)
    done = plot("out", "--out=nowhere/x.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
