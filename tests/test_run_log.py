"""The run's log (jax_run_log.py): console lines, MFU, metrics.jsonl.

python -m pytest tests/test_run_log.py
"""

import errno
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_run_log
from jax_run_log import RunLog, peak_flops, read_metrics, trim_metrics

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


def test_the_eta_counts_what_evaluations_and_saves_took(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(jax_run_log.time, "monotonic", lambda: now)
    log = make_log(None, max_iters=401)
    for k in range(0, 201, 10):
        log.iteration(k, 4.0, 1e-3, 1.0, 1.0)
        now += 10 + 5 * (k % 20 == 10)  # iterations of 1 s, and after every twenty 5 s of something else
    etas = [line.split("eta ")[1] for line in capsys.readouterr().out.splitlines()]
    # 390 left, nothing else seen yet; 380 left and 5 s lost in 20; 200 left and 50 s lost in 200
    assert (etas[1], etas[2], etas[20]) == ("6m30s", "7m55s", "4m10s")


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
    assert trim_metrics(path, 10) == 10
    assert path.read_text() == "".join(json.dumps(r) + "\n" for r in kept)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("step", "lines", "evaluated"), [(0, 1, 0), (1, 2, 0), (2, 4, 2), (3, 5, 2), (9, 5, 2)])
def test_trimming_takes_no_room_as_it_cuts_the_file_where_it_is(tmp_path, step, lines, evaluated):
    path = tmp_path / "metrics.jsonl"
    log = [
        b'{"iter": 0, "train/loss": 4.2, "val/loss": 4.2}\n',
        b'{"iter": 0,  "loss": 4.2}\n',  # with a blank more than json.dumps would write
        b'{"iter": 1, "loss": 4.1}\n',
        b'{"iter": 2, "train/loss": 3.0, "val/loss": 3.1}\n',
        b'{"iter": 2, "loss": 3.9}\n',
    ]
    path.write_bytes(b"".join(log) + b'{"iter": 3, "lo')
    file = path.stat().st_ino
    assert trim_metrics(path, step) == evaluated
    assert path.read_bytes() == b"".join(log[:lines])
    assert path.stat().st_ino == file


def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write, which does not know the name

    monkeypatch.setattr(jax_run_log.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/config\.json'"):
        jax_run_log.replace_file(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("config.json", "old")]


def test_a_last_line_without_its_newline_is_ended_when_a_run_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"iter": 0, "loss": 4.0}\n{"iter": 1, "loss": 3.9}')
    log = make_log(tmp_path, 2)
    log.iteration(2, 3.8, 1e-3, 1.0, 0.01)
    assert [r["iter"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


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
