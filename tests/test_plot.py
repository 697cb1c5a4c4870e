"""plot_jax.py: the picture and the table made of metrics.jsonl.

python -m pytest tests/test_plot.py
"""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jax_run_log import RunLog

ROOT = Path(__file__).resolve().parent.parent


def plot(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "plot_jax.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def fake_run(out_dir: Path, iterations: int, evaluations: int) -> None:
    out_dir.mkdir()
    log = RunLog(out_dir, None, max_iters=100, tokens_per_iter=768, flops_per_iter=4e9, peak=None)
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


def test_a_dollar_in_a_name_is_no_mathematics(tmp_path):
    fake_run(tmp_path / r"a$\frac$", 2, 1)
    done = plot(r"a$\frac$", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and is_png(tmp_path / r"a$\frac$" / "curves.png")


def test_a_run_of_evaluations_only_is_drawn_where_told(tmp_path):
    fake_run(tmp_path / "out", 0, 2)
    done = plot("out", "--out=picture.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2].split() == ["out", "1", "-", "13.0000", "0"]
    assert is_png(tmp_path / "picture.png")
    assert not (tmp_path / "out" / "curves.png").exists()


def test_the_picture_is_of_the_kind_that_its_name_says(tmp_path):
    fake_run(tmp_path / "out", 2, 1)
    assert plot("out", "--out=picture.svg", cwd=tmp_path).returncode == 0
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    done = plot("out", "--out=picture.xyz", cwd=tmp_path)
    assert done.returncode == 2 and re.match(r"error: Format 'xyz' is not supported .*svg", done.stderr)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "picture.svg"]


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
