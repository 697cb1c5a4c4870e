"""The parts of benchmarks/gpu.sh: one process each, the most important first, results in one JSON file.

    python benchmarks/gpu.py --json=benchmarks/gpu.json --nanogpt=../nanoGPT --seconds=520

It needs data/shakespeare_char (its prepare.py), and nothing from the network. A part that fails is kept with the end of
what it printed, and tried again by the next call. A part is not begun when less than a minute is left, or, for both
trainers, two and a half.
`--device=cpu` with `--only=NAME` tries a part out where there is no GPU.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEP_ONLY = ["--eval_iters=0", "--new_tokens=0"]
GPT2 = ["config/train_gpt2.py", "--gradient_accumulation_steps=1", "--real_data=False", "--steps=30", *STEP_ONLY]
CHAR = ["config/train_shakespeare_char.py", "--steps=200", *STEP_ONLY]
TRAINERS = ["config/train_gpt2.py", "--gradient_accumulation_steps=1", "--eval_iters=1", "--wandb_log=False"]
TRAINERS += ["--eval_interval=1000", "--log_interval=10", "--max_iters=110"]
FLAGS = {  # one at a time, at 64 rows
    "cuBLASLt": "--xla_gpu_enable_cublaslt=true",
    "cuBLAS not tried out": "--xla_gpu_autotune_level=0",
    "graphs of one kernel": "--xla_gpu_graph_min_graph_size=1",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "kernels side by side": "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    "kernels begun before the last ends": "--xla_gpu_enable_pdl=true --xla_gpu_enable_pdl_launch=true",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "products merged": "--xla_gpu_dot_merger_threshold_mb=64",
    "products by Triton, too": "--xla_gpu_enable_triton_gemm=true",
}
NANOGPT_BENCH = """
import runpy, torch
runpy.run_path("bench.py")
print(f"peak memory {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")
"""


def parts(nanogpt: Path | None) -> dict[str, tuple[str, list[str], dict[str, str]]]:
    """Name -> (kind, flags, environment)."""
    table: dict[str, tuple[str, list[str], dict[str, str]]] = {
        "char run": ("train", ["config/train_shakespeare_char.py"], {}),
        "gpt2 x32": ("bench", [*GPT2, "--batch_size=32"], {}),
    }
    if nanogpt is not None:
        table["nanogpt gpt2 x32"] = ("nanogpt bench", ["--batch_size=32"], {})
    table["gpt2 x64"] = ("bench", [*GPT2, "--batch_size=64"], {})
    if nanogpt is not None:
        table["nanogpt gpt2 x64"] = ("nanogpt bench", ["--batch_size=64"], {})
    table["char step"] = ("bench", CHAR, {})
    table["gpt2 x12"] = ("bench", [*GPT2, "--batch_size=12"], {})
    if nanogpt is not None:
        table["nanogpt gpt2 x12"] = ("nanogpt bench", ["--batch_size=12"], {})
        for rows in (32, 64):
            table[f"both trainers, gpt2 x{rows}"] = ("trainers", [*TRAINERS, f"--batch_size={rows}"], {})
    table["gpt2 x32, deterministic"] = ("bench", [*GPT2, "--batch_size=32", "--deterministic=True"], {})
    for name in ("cuBLASLt", "cuBLAS not tried out"):  # the most promising of FLAGS, before the others below
        table[f"gpt2 x64, {name}"] = ("bench", [*GPT2, "--batch_size=64"], {"XLA_FLAGS": FLAGS[name]})
    table["gpt2 x32, dropout 0.1"] = ("bench", [*GPT2, "--batch_size=32", "--dropout=0.1"], {})
    table["gpt2 4 x 16"] = ("bench", [*GPT2, "--batch_size=16", "--gradient_accumulation_steps=4"], {})
    for rows in (1, 64):
        few = ["--steps=5", "--new_tokens=256", f"--batch_size={rows}"]
        table[f"gpt2 generation x{rows}"] = ("bench", [*GPT2, *few], {})
    table["gpt2 x12, float32"] = ("bench", [*GPT2, "--batch_size=12", "--dtype=float32"], {})
    table["gpt2 x32, layers scanned"] = ("bench", [*GPT2, "--batch_size=32", "--scan_layers=True"], {})
    table["char step, 10 a dispatch"] = ("bench", [*CHAR, "--steps_per_dispatch=10"], {})
    table["gpt2 x96"] = ("bench", [*GPT2, "--batch_size=96"], {})
    if nanogpt is not None:
        table["nanogpt gpt2 x96"] = ("nanogpt bench", ["--batch_size=96"], {})
    for rows in (32, 64):  # as nanoGPT's bench.py, which does not clip; its trainer does
        table[f"gpt2 x{rows}, not clipped"] = ("bench", [*GPT2, f"--batch_size={rows}", "--grad_clip=0"], {})
    table["char step, layers scanned"] = ("bench", [*CHAR, "--scan_layers=True"], {})
    table["char step, cuBLAS not tried out"] = ("bench", CHAR, {"XLA_FLAGS": "--xla_gpu_autotune_level=0"})
    for name, flag in FLAGS.items():
        table[f"gpt2 x64, {name}"] = ("bench", [*GPT2, "--batch_size=64"], {"XLA_FLAGS": flag})
    table["gpt2 x32, profile"] = ("bench", [*GPT2, "--batch_size=32", "--profile=True"], {})
    return table


def measure(
    kind: str, flags: list[str], environment: dict[str, str], nanogpt: Path | None, folder: Path, timeout: float
) -> dict:
    """Run one part and read its figures. Raises RuntimeError with the end of its output if it fails, and ValueError,
    LookupError or OSError if it prints or writes something else."""
    figures, environment = folder / "figures.json", {**os.environ, **environment}
    if kind == "bench":
        command, where = [sys.executable, "bench_jax.py", *flags, f"--json={figures}"], ROOT
    elif kind == "train":
        command, where = [sys.executable, "train_jax.py", *flags, f"--out_dir={folder / 'out'}"], ROOT
        environment |= {"XDG_CACHE_HOME": str(folder), "JAX_COMPILATION_CACHE_DIR": ""}  # nothing is compiled yet
    elif kind == "trainers":
        assert nanogpt is not None
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, 50257, 2**20, np.uint16).tofile(folder / f"{split}.bin")
        flags, started = [*flags, f"--dataset={folder}"], time.perf_counter()
        ours, theirs = (
            trainer_ms(
                [sys.executable, script, *flags, f"--out_dir={folder / script}"], where, environment, timeout / 2
            )
            for script, where in (("train_jax.py", ROOT), ("train.py", nanogpt))
        )
        return {"ours_ms": ours, "nanogpt_ms": theirs, "seconds": time.perf_counter() - started}
    else:
        assert nanogpt is not None
        command, where = [sys.executable, "-c", NANOGPT_BENCH, "--real_data=False", "--compile=True", *flags], nanogpt
    started = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {timeout:.0f} s") from None
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    if kind == "bench":
        result = json.loads(figures.read_text())
        del result["config"]["json"]  # a folder that is gone by now
        return {"seconds": seconds, **result}
    if kind == "train":
        losses = [float(loss) for loss in re.findall(r"^step \d+: .*val loss ([\d.]+)", done.stdout, re.MULTILINE)]
        times = [float(ms) for ms in re.findall(r"^iter \d+: .*time ([\d.]+)ms", done.stdout, re.MULTILINE)]
        return {"seconds": seconds, "val_losses": losses, "best_val_loss": min(losses), "times_ms": times}
    ms = float(re.findall(r"time per iteration: ([\d.]+)ms", done.stdout)[-1])
    memory = float(re.findall(r"^peak memory ([\d.]+) MB$", done.stdout, re.MULTILINE)[-1])
    rows = int(flags[0].partition("=")[2])
    return {"seconds": seconds, "ms": ms, "tokens_per_s": rows * 1024 / ms * 1000, "peak_memory_mb": memory}


def trainer_ms(command: list[str], where: Path, environment: dict[str, str], timeout: float) -> float:
    """Milliseconds per iteration, from when it prints iteration 20 to when it prints 100: all that a user waits for.

    Raises RuntimeError with the end of its output if it fails or takes longer than `timeout` seconds.
    """
    printed_at, lines = {}, []
    pipe, environment = subprocess.PIPE, {**environment, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=where, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip
        # with all that it started, which has the pipe, too
        killer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if iteration := re.match(r"iter (\d+): ", line):
                    printed_at[int(iteration[1])] = time.perf_counter()
        finally:
            killer.cancel()
    if process.returncode or 100 not in printed_at:
        why = f"ended with {process.returncode}, or took {timeout:.0f} s"
        raise RuntimeError(f"{why}, and printed {len(printed_at)} iterations: {''.join(lines)[-1500:]}")
    return 1000 * (printed_at[100] - printed_at[20]) / 80


def show(name: str, result: dict) -> str:
    if "error" in result:
        return f"{name:32} failed: {result['error'].splitlines()[0][:80]}"
    if "best_val_loss" in result:
        return f"{name:32} {result['seconds']:9.1f} s in all, best val loss {result['best_val_loss']}"
    if "nanogpt_ms" in result:
        ours, theirs = result["ours_ms"], result["nanogpt_ms"]
        return f"{name:32} {ours:9.2f} ms an iteration, nanoGPT {theirs:.2f}: {theirs / ours:.2f}"
    train = result.get("train", result)
    ms = train["ms"]["median"] if isinstance(train["ms"], dict) else train["ms"]
    figures = [f"{ms:9.2f} ms {train['tokens_per_s']:12,.0f} tok/s", f"{train['peak_memory_mb'] / 1000:.1f} GB"]
    if train.get("mfu") is not None:
        figures.append(f"{train['mfu']:.1f} % MFU")
    if "compile_s" in train:
        figures.append(f"compiled in {train['compile_s']:.1f} s")
    if made := result.get("generation"):
        figures.append(f"generates {made['decode_tokens_per_s']['median']:,.0f} tok/s")
    return f"{name:32} " + ", ".join(figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "gpu.json", help="where the figures go")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, for its rows")
    parser.add_argument("--seconds", type=float, default=520, help="stop beginning parts in time for this")
    parser.add_argument("--device", help="another device than the GPU, to try the parts out")
    parser.add_argument("--only", help="this part alone")
    args = parser.parse_args()
    if args.nanogpt is not None and not (args.nanogpt / "bench.py").is_file():
        print(f"error: --nanogpt={args.nanogpt} has no bench.py", file=sys.stderr)
        return 2
    table = parts(args.nanogpt)
    if args.only is not None and args.only not in table:
        print(f"error: --only={args.only} is none of: {', '.join(table)}", file=sys.stderr)
        return 2

    if not (ROOT / "data" / "shakespeare_char" / "train.bin").is_file():
        print(
            "error: no data/shakespeare_char/train.bin: run `python data/shakespeare_char/prepare.py`", file=sys.stderr
        )
        return 2

    deadline = time.monotonic() + args.seconds
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    there = [name for name in table if "error" not in results.get(name, {"error": ""})]
    print(f"{len(there)} of {len(table)} parts are in {args.json} already")
    for number, (name, (kind, flags, environment)) in enumerate(table.items(), 1):
        if args.only not in (None, name) or name in there:
            continue
        if (left := deadline - time.monotonic()) < (150 if kind == "trainers" else 60):
            print(f"out of time before part {number} of {len(table)}; call again to go on")
            break
        device = [f"--device={args.device}"] if args.device else []
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[name] = measure(
                    kind, flags + device, environment, args.nanogpt, Path(folder), min(left - 10, 240)
                )
            except (RuntimeError, ValueError, LookupError, OSError) as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{number:2} of {len(table)}  {show(name, results[name])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
