"""Ours and nanoGPT side by side: the same configuration and data, run in turns, ratios pair by pair.

    python benchmarks/compare.py --nanogpt=../nanoGPT --nanogpt_python=../nanoGPT/.venv/bin/python \
        --dataset=data/shakespeare_char -- config/train_shakespeare_char.py --device=cpu --eval_iters=20 \
        --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0

What follows `--` goes to both trainers; each reads the config file of that name in its own folder. A machine's speed
drifts: only figures of the same round are compared, every other round runs in the opposite order, and the median over
the rounds is what counts. The time of an iteration is the one that each trainer prints, the first tenth of the
iterations (compilation, warm-up; one at least) left out.
With --cold each run finds an empty cache of compiled code, as on its first day.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--nanogpt_python", default="python", help="a Python with torch")
    parser.add_argument("--dataset", type=Path, required=True, help="a folder with train.bin, val.bin and meta.pkl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iters", type=int, default=200, help="iterations of each run")
    parser.add_argument(
        "--eval_interval", type=int, help="iterations between evaluations; without: first and last only"
    )
    parser.add_argument("--cold", action="store_true", help="nothing compiled before is found")
    parser.add_argument("--forms", default="eager,compiled", help="of nanoGPT: eager, compiled or both")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("flags", nargs="+", help="config files and flags for both")
    args = parser.parse_args()
    forms = args.forms.split(",")
    if not (args.nanogpt / "train.py").is_file():
        print(f"error: --nanogpt={args.nanogpt} has no train.py", file=sys.stderr)
        return 2

    common = [
        *args.flags, f"--dataset={args.dataset.resolve()}", f"--max_iters={args.iters}", "--log_interval=1",
        f"--eval_interval={args.eval_interval or 10 * args.iters}",
    ]  # fmt: skip
    python = args.nanogpt_python if "/" not in args.nanogpt_python else str(Path(args.nanogpt_python).absolute())
    rounds = []
    for number in range(args.rounds):
        result = {}
        with tempfile.TemporaryDirectory() as out_dir:
            ours = [sys.executable, str(ROOT / "train_jax.py"), *common, f"--out_dir={out_dir}/ours"]
            cold = {
                "XDG_CACHE_HOME": f"{out_dir}/cache", "JAX_COMPILATION_CACHE_DIR": "",
                "TORCHINDUCTOR_CACHE_DIR": f"{out_dir}/torch",
            }  # fmt: skip
            env = {**os.environ, **(cold if args.cold else {})}
            for form in ["ours", *forms][:: -1 if number % 2 else 1]:
                theirs = [python, "train.py", *common, f"--out_dir={out_dir}/{form}", f"--compile={form == 'compiled'}"]
                command, folder = (ours, ROOT) if form == "ours" else (theirs, args.nanogpt)
                result[form] = run(command, folder, env, args.iters)
        rounds.append(result)
        print(
            f"round {number + 1} of {args.rounds}: "
            + ", ".join(
                f"{name} {result[name]['ms']:.1f} ms, {result[name]['seconds']:.1f} s" for name in ("ours", *forms)
            ),
            flush=True,
        )

    print(f"\nmedians of {args.rounds} rounds   ms/iter   whole command   peak memory")
    for name in ("ours", *forms):
        ms, seconds, mb = (statistics.median(r[name][key] for r in rounds) for key in ("ms", "seconds", "memory_mb"))
        print(f"  {name:22} {ms:10.2f} {seconds:13.1f} s {mb:10.0f} MB")
    chosen = {form: [form] for form in forms} | ({"the better of each round": forms} if len(forms) > 1 else {})
    for name, those in chosen.items():
        for key, what in (("ms", "per iteration"), ("seconds", "whole command")):
            ratios = sorted(min(r[form][key] for form in those) / r["ours"][key] for r in rounds)
            middle = statistics.median(ratios)
            print(f"nanoGPT {name} / ours, {what}: median {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if args.json:
        args.json.write_text(json.dumps({"flags": args.flags, "rounds": rounds}, indent=1) + "\n")
    return 0


def run(command: list[str], folder: Path, env: dict[str, str], iters: int) -> dict[str, float]:
    """Median milliseconds per iteration, seconds of the whole command, and its peak memory."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=printed, stderr=errors, stdin=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)  # as wait(), with the child's own peak memory
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        printed.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}:\n{errors.read()[-2000:]}")
        lines = re.findall(r"^iter \d+: .*time ([\d.]+)ms", printed.read(), re.MULTILINE)
    times = [float(ms) for ms in lines][max(1, iters // 10) : iters]  # nanoGPT makes one iteration more
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return {"ms": statistics.median(times), "seconds": seconds, "memory_mb": memory}


if __name__ == "__main__":
    sys.exit(main())
