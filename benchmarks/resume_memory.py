"""Peak memory of a run that starts afresh and of one that resumes, side by side. On a CPU, where it is the process's.

    python benchmarks/resume_memory.py -- config/train_shakespeare_char.py --device=cpu --n_layer=9 --n_head=9 \
        --n_embd=540 --block_size=64 --batch_size=4 --eval_iters=1

What follows `--` goes to the trainer. Both runs make the same number of updates and one save at their end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=3, help="updates of each run")
    parser.add_argument("flags", nargs="+", help="config files and flags for the trainer")
    args = parser.parse_args()
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            fresh = peak_megabytes([*args.flags, f"--out_dir={folder}/out", f"--max_iters={args.iters}"])
            resumed = peak_megabytes(["--init_from=resume", f"--out_dir={folder}/out", f"--max_iters={2 * args.iters}"])
        print(
            f"{number + 1} of {args.rounds}: a fresh run took {fresh:,.0f} MB, the resumed one {resumed:,.0f} MB: "
            f"{resumed / fresh - 1:+.1%}",
            flush=True,
        )
    return 0


def peak_megabytes(flags: list[str]) -> float:
    """The most memory that one run of the trainer had at a time."""
    command = [sys.executable, str(ROOT / "train_jax.py"), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: {' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    sys.exit(main())
