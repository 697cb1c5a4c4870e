"""How long a start takes: seconds of whole commands, and the peak memory of those that train, in one or more Pythons.

    python benchmarks/startup.py --rounds=5 --python=.venv/bin/python --python=OTHER/bin/python -- \
        config/train_shakespeare_char.py --device=cpu --eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 \
        --n_head=4 --n_embd=128 --dropout=0.0

What follows `--` goes to the trainer. In each round every Python starts with an empty cache of compiled code and an
empty run directory, and then goes on from what it left there.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {  # name -> flags, and the exit code that belongs to it
    "--help": (["--help"], 0),
    "a misspelt option": (["--batch_sise=1"], 2),
    "one iteration, cold": (["--max_iters=1"], 0),
    "the same again": (["--max_iters=1", "--overwrite=True"], 0),
    "eval_only": (["--init_from=resume", "--eval_only=True"], 0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", action="append", help="a Python with the requirements; without: this one")
    parser.add_argument("flags", nargs="+", help="config files and flags for the trainer")
    args = parser.parse_args()
    pythons = [str(Path(python).absolute()) if "/" in python else python for python in args.python or [sys.executable]]

    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(args.rounds):
        for python in pythons[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                for name, (flags, code) in COMMANDS.items():
                    command = [python, str(ROOT / "train_jax.py"), *args.flags, *flags, f"--out_dir={folder}/out"]
                    taken.setdefault((python, name), []).append(seconds_and_megabytes(command, folder, code))
        print(f"round {number + 1} of {args.rounds}", flush=True)

    for python in pythons:
        print(f"\n{python}\n{'':24} median seconds (least to most)   peak memory")
        for name in COMMANDS:
            seconds, megabytes = zip(*taken[python, name], strict=True)
            print(
                f"{name:24} {statistics.median(seconds):14.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
                f" {statistics.median(megabytes):14.0f} MB"
            )
    return 0


def seconds_and_megabytes(command: list[str], folder: str, code: int) -> tuple[float, float]:
    env = {**os.environ, "XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": ""}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # as wait(), with the child's own peak memory
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        printed.seek(0)
        if process.returncode != code:
            raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}:\n{printed.read()[-2000:]}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    sys.exit(main())
