"""What checkpoints cost: runs with one every --every iterations and runs without any, in turns.

    python benchmarks/checkpoint_cost.py --rounds=5 -- config/train_shakespeare_char.py --device=cpu --block_size=64 \
        --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0

What follows `--` goes to the trainer. The time of an iteration is the mean from the log, saves included, without the
first tenth (compilation, warm-up) and evaluations. A machine's speed drifts: only the two of a round are compared.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=50, help="iterations from one checkpoint to the next")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iters", type=int, default=600, help="iterations of each run")
    parser.add_argument("flags", nargs="+", help="config files and flags for the trainer")
    args = parser.parse_args()

    ratios = []
    for number in range(args.rounds):
        ms = {}
        order = [0, args.every] if number % 2 else [args.every, 0]  # neither is always the first
        for save_interval in order:
            ms[save_interval] = milliseconds(args.flags, args.iters, save_interval)
        ratios.append(ms[args.every] / ms[0])
        print(
            f"round {number + 1} of {args.rounds}: {ms[0]:.2f} ms an iteration without checkpoints, "
            f"{ms[args.every]:.2f} ms with one every {args.every}: {ratios[-1] - 1:+.1%}",
            flush=True,
        )
    print(f"median {statistics.median(ratios) - 1:+.1%} ({min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%})")
    return 0


def milliseconds(flags: list[str], iters: int, save_interval: int) -> float:
    """Mean time of an iteration of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "train_jax.py"), *flags, f"--out_dir={folder}/out", f"--max_iters={iters}",
            f"--save_interval={save_interval}", "--log_interval=1", f"--eval_interval={10 * iters}", "--eval_iters=1",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        records = map(json.loads, Path(folder, "out", "metrics.jsonl").read_text().splitlines())
        return statistics.fmean(r["time_ms"] for r in records if r.get("iter", 0) >= iters // 10 and "loss" in r)


if __name__ == "__main__":
    sys.exit(main())
