"""What checkpoints cost: runs with one every --every iterations and runs without any, in turns.

    python benchmarks/checkpoint_cost.py --rounds=5 -- config/train_shakespeare_char.py --device=cpu --block_size=64 \
        --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0

What follows `--` goes to the trainer. The time of an iteration is the mean from the log, saves included, without the
first tenth (compilation, warm-up) and evaluations. A machine's speed drifts: only the two of a round are compared. Two
runs of one program still differ by some percent, so the second figure is from within the run that saves: the iterations
after a save beside those before the next.
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

    ratios, shares = [], []
    for number in range(args.rounds):
        ms, times = {}, {}
        order = [0, args.every] if number % 2 else [args.every, 0]  # neither is always the first
        for save_interval in order:
            times[save_interval] = milliseconds(args.flags, args.iters, save_interval)
            ms[save_interval] = statistics.fmean(times[save_interval].values())
        ratios.append(ms[args.every] / ms[0])
        shares.append(share_of_saves(times[args.every], args.every))
        print(
            f"round {number + 1} of {args.rounds}: {ms[0]:.2f} ms an iteration without checkpoints, "
            f"{ms[args.every]:.2f} ms with one every {args.every}: {ratios[-1] - 1:+.1%}; "
            f"by the iterations after a save {shares[-1]:+.1%}",
            flush=True,
        )
    print(
        f"median {statistics.median(ratios) - 1:+.1%} ({min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}); "
        f"by the iterations after a save {statistics.median(shares):+.1%} ({min(shares):+.1%} to {max(shares):+.1%})"
    )
    return 0


def share_of_saves(ms: dict[int, float], every: int) -> float:
    """Time that a save adds, over the time of the iterations between two: the median of all saves."""
    shares = []
    for save in (i for i in ms if i % every == 0 and i + every - 1 in ms):
        after = statistics.fmean(ms[i] for i in range(save, save + every // 2))
        later = statistics.fmean(ms[i] for i in range(save + every // 2, save + every))
        shares.append((after - later) * (every // 2) / (later * every))
    return statistics.median(shares)


def milliseconds(flags: list[str], iters: int, save_interval: int) -> dict[int, float]:
    """Iteration -> its time, of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "train_jax.py"), *flags, f"--out_dir={folder}/out", f"--max_iters={iters}",
            f"--save_interval={save_interval}", "--log_interval=1", f"--eval_interval={10 * iters}", "--eval_iters=1",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        records = map(json.loads, Path(folder, "out", "metrics.jsonl").read_text().splitlines())
        return {r["iter"]: r["time_ms"] for r in records if "loss" in r and r["iter"] >= iters // 10}


if __name__ == "__main__":
    sys.exit(main())
