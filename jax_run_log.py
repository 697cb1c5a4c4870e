"""What a run says about itself: console lines, metrics.jsonl, wandb and a progress bar.

The console lines are nanoGPT's, with additions at their end, so that scripts which scrape them go on working.
metrics.jsonl is the record that survives a kill: one JSON object a line, on the disk before a checkpoint is sealed.
"""

import contextlib
import json
import math
import os
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from jax_console import complain, silence
from jax_manifest import fsync

# ----------------------------------------------------------------------------------------------------------------------
# Peak FLOP/s of one device

# Dense TFLOP/s by JAX's device_kind (less "NVIDIA "): names, bfloat16, float16, float32. None: the chip has no such.
# Vendors' figures; NVIDIA's "with sparsity" are halved, and the 16-bit ones are with float32 accumulation, as XLA's.
# float32 is what JAX makes of a float32 matmul unless jax_default_matmul_precision says otherwise: TF32 on NVIDIA since
# Ampere (jax-ml/jax#4873), one bfloat16 pass on a TPU (jax-ml/jax#1856), plain float32 on older GPUs.
_PEAK_TFLOPS: list[tuple[str, float | None, float | None, float]] = [
    ("GB200", 2500, 2500, 1250),  # GB200 NVL72 page: 360 and 180 PFLOPS with sparsity, 72 GPUs
    ("B200", 2250, 2250, 1125),  # HGX page: 36 and 18 PFLOPS with sparsity, 8 GPUs
    ("H200 | GH200 480GB | GH200 144G HBM3e", 989.4, 989.4, 494.7),  # H200, GH200 data sheets: the H100 SXM's die
    ("H100 80GB HBM3", 989.4, 989.4, 494.7),  # H100 architecture white paper, SXM
    ("H100 PCIe", 756, 756, 378),  # the same, PCIe: fewer SMs, lower clock
    ("H100 NVL | H200 NVL", 835.5, 835.5, 417.5),  # data sheets: 1,671 and 835 with sparsity
    ("A100-SXM4-40GB | A100-SXM4-80GB | A100-PCIE-40GB | A100 80GB PCIe", 312, 312, 156),  # A100 data sheet
    ("A10", 125, 125, 62.5),  # A10 data sheet
    ("A10G", 70, 70, 35),  # A10G data sheet (AWS G5): far from an A10
    ("L40S", 362.05, 362.05, 183),  # L40S data sheet
    ("L4", 121, 121, 60),  # L4 data sheet: 242 and 120 with sparsity
    ("RTX A6000", 154.8, 154.8, 77.4),  # GA102 architecture white paper
    ("GeForce RTX 3090", 71, 71, 35.6),  # the same
    ("GeForce RTX 4090", 165.2, 165.2, 82.6),  # Ada architecture white paper
    ("GeForce RTX 5090", 209.5, 209.5, 104.8),  # RTX Blackwell architecture white paper
    ("Tesla T4", None, 65, 8.1),  # T4 data sheet; no bfloat16 before Ampere
    ("Tesla V100-SXM2-16GB | Tesla V100-SXM2-32GB", None, 125, 15.7),  # V100 data sheet
    ("Tesla V100-PCIE-16GB | Tesla V100-PCIE-32GB", None, 112, 14),  # the same
    # cloud.google.com/tpu/docs/<version>, per chip; on v2, v3 and v7 a JAX device is one of its two cores: halved.
    ("TPU v2", 23, None, 23),
    ("TPU v3", 61.5, None, 61.5),
    ("TPU v4", 275, None, 275),
    ("TPU v5 lite | TPU v5e", 197, None, 197),
    ("TPU v5 | TPU v5p", 459, None, 459),
    ("TPU v6 lite | TPU v6e", 918, None, 918),
    ("TPU7x", 1153.5, None, 1153.5),
]


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s, or None where it is not known (every CPU).

    Whole names only: a MIG slice, a laptop part or an RTX 4090 D has a longer name and a lower peak.
    """
    for names, bfloat16, float16, float32 in _PEAK_TFLOPS:
        if device_kind.removeprefix("NVIDIA ") in names.split(" | "):
            tflops = {"bfloat16": bfloat16, "float16": float16, "float32": float32}.get(dtype)
            return None if tflops is None else tflops * 1e12
    return None


# ----------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


class MetricsError(ValueError):
    """metrics.jsonl is not what a trainer wrote. One line, naming the file and the line."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A kill can tear the last line: it is left out. Another bad line is an error."""
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines and their records, one at a time: the log of a long run has a hundred megabytes."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line.decode())
                if not isinstance(record, dict) or type(record.get("iter")) is not int:
                    raise ValueError('not an object with an integer "iter"')
                if any(value is not None and type(value) not in (int, float) for value in record.values()):
                    raise ValueError("a value that is not a number")
            except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors too
                if not file.read().strip(b"\n"):
                    return
                raise MetricsError(f"{path}, line {number}: {error}; remove that line to go on") from None
            yield line, record


def trim_metrics(path: Path, step: int) -> int | None:
    """Cut metrics.jsonl back to what had happened when `step` updates were done: the newest evaluation's iteration.

    Iteration `step` has yet to run, so its record goes; an evaluation at `step` came before the checkpoint and stays.
    """
    if not path.exists():
        return None
    size, newest_evaluation, before, in_order = 0, None, (-1, False), True
    for line, record in _lines(path):
        at = _when(record)
        in_order &= before < at and line.endswith(b"\n")
        before = at
        if at < (step, True):
            size += len(line)
            if "val/loss" in record:
                newest_evaluation = max(record["iter"], newest_evaluation or 0)
    if in_order:  # what stays is where it is, so that a full disk is no hindrance
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    else:  # edited by hand, or torn at the last line's end: each record once
        kept = {at: line.rstrip(b"\n") + b"\n" for line, record in _lines(path) if (at := _when(record)) < (step, True)}
        replace_file(path, b"".join(kept.values()).decode())
    return newest_evaluation


def _when(record: dict[str, Any]) -> tuple[int, bool]:
    """Orders records as they came: an evaluation before the iteration of its number."""
    return record["iter"], "val/loss" not in record


def validation_losses(path: Path) -> dict[int, float]:
    """Iteration -> what its evaluation logged; of no log, nothing. Raises MetricsError as `read_metrics`."""
    if not path.exists():
        return {}
    return {record["iter"]: record["val/loss"] for _, record in _lines(path) if "val/loss" in record}


def replace_file(path: Path, text: str) -> None:
    """Write a file as a whole: a kill or a full disk leaves the old one. Raises OSError, which names the file."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    fsync(path.parent)


def _json_line(record: dict[str, Any]) -> str:
    """NaN and infinity become null: JSON has neither, and null leaves a column of numbers a column of numbers."""
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# The log of one process's part of a run


@dataclass
class RunLog:
    """Prints and records. Call it in order: the evaluation at k, then iteration k, then what comes after k."""

    out_dir: Path | None  # where metrics.jsonl lives; None writes nothing
    resume_step: int | None  # go on from the state after this many updates; None starts the file anew
    max_iters: int
    tokens_per_iter: int
    flops_per_iter: float
    peak: float | None  # FLOP/s of all devices in use together; None where it is not known
    wandb_run: Any = None

    def __post_init__(self) -> None:
        self.first_iter = self.resume_step or 0
        self.records = 0  # iterations logged by this process
        self.seconds = 0.0  # per iteration, running mean
        self.first_logged, self.last_logged, self.logged_at = 0, 0, 0.0  # iterations, and when the last one was
        self.beside = 0.0  # seconds since the first one logged that were not training: evaluations, saves
        self.mfu: float | None = None  # percent, running mean
        self.bar: tqdm | None = None
        self.disk_is_full = self.console_is_gone = False
        # A resumed wandb run remembers how far it came, which may be further than our newest checkpoint.
        self.wandb_step = getattr(self.wandb_run, "starting_step", 0)
        if self.wandb_step > self.first_iter + 1:
            self.say(f"wandb: has this run up to iteration {self.wandb_step - 1} already and goes on from there")
        self.last_evaluation: int | None = None  # the newest on file: a resumed run need not repeat it
        self.file: BinaryIO | None = None
        self.unwritten = bytearray()  # lines that metrics.jsonl could not take yet
        if self.out_dir is not None:
            path = self.out_dir / "metrics.jsonl"
            if self.resume_step is not None:
                self.last_evaluation = trim_metrics(path, self.resume_step)
            self.file = open(path, "wb" if self.resume_step is None else "ab", buffering=0)  # noqa: SIM115
            fsync(self.out_dir)

    def say(self, line: str) -> None:
        """Print a line, above the progress bar where there is one. A console that fails does not stop a run."""
        if self.console_is_gone:
            return
        try:
            if self.bar is None:
                print(line, flush=True)
            else:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
        except OSError as error:  # a pipe that was closed, a full disk under `> log.txt`
            self.console_is_gone = True
            silence(1)
            complain(f"warning: nothing more is printed ({_one_line(error)}); the run goes on")

    def iteration(self, iter: int, loss: float, lr: float, grad_norm: float, seconds_per_iter: float) -> None:
        """Log iteration `iter`; the time is the mean per iteration since the last one logged."""
        # The first record of a process has the compilation in its time: the averages start after it, and the MFU,
        # as in nanoGPT, not before the process's sixth iteration.
        self.records += 1
        if self.peak is not None and self.records > 1 and iter - self.first_iter >= 5:
            mfu = 100 * self.flops_per_iter / seconds_per_iter / self.peak
            self.mfu = mfu if self.mfu is None else 0.9 * self.mfu + 0.1 * mfu
        self.seconds = seconds_per_iter if self.records <= 2 else 0.9 * self.seconds + 0.1 * seconds_per_iter
        now = time.monotonic()
        if self.records == 1:  # its time is mostly compilation: it says nothing about the rest
            self.first_logged, eta = iter, "?"
        else:
            self.beside += max(now - self.logged_at - (iter - self.last_logged) * seconds_per_iter, 0)
            beside_each = self.beside / (iter - self.first_logged)
            eta = _duration((self.seconds + beside_each) * (self.max_iters - iter - 1))
        self.last_logged, self.logged_at = iter, now
        tokens_per_s = self.tokens_per_iter / seconds_per_iter
        time_ms = 1000 * seconds_per_iter

        if self.bar is None and sys.stderr.isatty():  # the lines are the record; the bar is for a person watching
            self.bar = tqdm(total=self.max_iters, initial=iter, unit="it", dynamic_ncols=True, leave=False)
        mfu_shown = -100.0 if self.mfu is None else self.mfu  # -100: not known (yet), as nanoGPT prints it
        self.say(
            f"iter {iter}: loss {loss:.4f}, time {time_ms:.2f}ms, mfu {mfu_shown:.2f}%, "
            f"{tokens_per_s:,.0f} tok/s, eta {eta}"
        )
        if self.bar is not None:
            self.bar.update(iter + 1 - self.bar.n)
        record = {"iter": iter, "loss": loss, "lr": lr, "grad_norm": grad_norm, "time_ms": time_ms}
        self._record(record | {"tokens_per_s": tokens_per_s, "mfu": self.mfu})

    def evaluation(self, iter: int, train_loss: float, val_loss: float, lr: float) -> None:
        """Log the evaluation of the state after `iter` updates."""
        self.say(f"step {iter}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        if iter == self.last_evaluation:  # on file already, from before a resume
            return
        self.last_evaluation = iter
        self._record({"iter": iter, "train/loss": train_loss, "val/loss": val_loss, "lr": lr, "mfu": self.mfu})

    def retry(self) -> None:
        """Write the lines that a full disk did not take, if there are any. They stay in memory until it does."""
        if self.unwritten:
            self._write(b"")

    def _write(self, line: bytes) -> None:
        """Append to metrics.jsonl, after what it could not take before."""
        assert self.file is not None
        self.unwritten += line
        try:
            while self.unwritten:  # unbuffered: a kill may tear this line, but none before it
                del self.unwritten[: self.file.write(self.unwritten) or 0]
        except OSError as error:
            if not self.disk_is_full:
                self.disk_is_full = True
                complain(f"error: metrics.jsonl cannot be written ({error}); its lines wait in memory, the run goes on")
        else:
            if self.disk_is_full:
                self.disk_is_full = False
                self.say("metrics.jsonl can be written again, and has all its lines")

    def close(self, exit_code: int = 0) -> int:
        """End the bar, the file and the wandb run, which shows as failed where the exit code is not 0.

        Returns the exit code: 1 instead of 0 where metrics.jsonl lacks lines.
        """
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.file is not None:
            self.retry()
            with contextlib.suppress(OSError):  # of a network disk that is full: told when a line cannot be written
                os.fsync(self.file.fileno())
            if self.unwritten:
                lines = self.unwritten.count(b"\n")
                complain(f"error: the last {lines} lines of metrics.jsonl could not be written")
                exit_code = exit_code or 1
            self.file.close()
            self.file = None
        if self.wandb_run is not None:
            try:
                self.wandb_run.finish(exit_code=exit_code)
            except Exception as error:  # noqa: BLE001  whatever it is, the run itself is done and saved
                self.say(f"wandb: could not finish ({_one_line(error)})")
            self.wandb_run = None
        return exit_code

    def _record(self, record: dict[str, Any]) -> None:
        if self.file is not None:
            self._write(_json_line(record).encode())
        # wandb merges what it gets for one step into one row (the evaluation at k, iteration k), and it drops, with a
        # warning each, what lies before the step it has reached: that it has already, from before the resume.
        step = record["iter"]
        if self.wandb_run is None or step < self.wandb_step:
            return
        try:
            # wandb knows NaN, but draws a table, not a curve, for a key that is sometimes null.
            self.wandb_run.log({key: value for key, value in record.items() if value is not None}, step=step)
            self.wandb_step = step
        except Exception as error:  # noqa: BLE001  a broken logger must not stop a run
            self.wandb_run = None
            self.say(f"wandb: off for the rest of this run ({_one_line(error)}); metrics.jsonl has everything")


def _duration(seconds: float) -> str:
    """Two units are enough: 7s, 1m02s, 3h05m, 2d04h."""
    s = round(max(seconds, 0))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def _one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


# ----------------------------------------------------------------------------------------------------------------------
# Weights & Biases


def start_wandb(config: dict[str, Any], project: str, name: str, run_id: str | None, out_dir: Path) -> Any:
    """A wandb run, or None where it cannot be had. Never asks, never stops the run.

    The id goes into the checkpoint's meta, so that a resumed run continues the same curves.
    """
    try:
        import wandb  # half a second: only for those who use it

        mode = wandb.setup().settings.mode  # WANDB_MODE, or what `wandb offline` left in this directory
        logged_in = mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False, verify=False)
        mode = mode if logged_in else "offline"
        # Online, quiet leaves the line that says where to look. A dead network must not hold up a run for long:
        # what is not sent in time stays in the folder, for `wandb sync`.
        silent = mode in ("offline", "dryrun")
        settings = wandb.Settings(mode=mode, quiet=True, silent=silent, init_timeout=30, finish_timeout=300)
        run_id = run_id or uuid.uuid4().hex[:8]
        run = wandb.init(project=project, name=name, id=run_id, resume="allow", config=config, settings=settings)
        if silent:
            why = "offline" if logged_in else "nobody is logged in, so offline"
            print(f"wandb: {why}; to upload later: wandb sync {os.path.relpath(Path(run.dir).parent)}", flush=True)
        return run
    except Exception as error:  # noqa: BLE001  no wandb, no network, a bad key: train without it
        print(f"wandb: off ({_one_line(error)}); the metrics are in {out_dir / 'metrics.jsonl'}", flush=True)
        return None
