"""How the cost of a training step grows with layers, width, context and batch, beside its count of operations.

    python benchmarks/growth.py --json=benchmarks/growth_cpu.json --plot=assets/growth_cpu.png --device=cpu

One size is changed at a time, from nanoGPT's laptop recipe, or from GPT-2 (124M) with --base=gpt2. Each point is a
process of its own (bench_jax.py), and the median of --rounds of them, with all other points between two. If time
followed the count, the lines of the plot would lie on the dashed one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASES = {
    "laptop": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 12},
}
SWEEPS = {
    "laptop": {
        "n_layer": [1, 2, 4, 8, 16],
        "n_embd": [32, 64, 128, 256, 512],
        "block_size": [16, 32, 64, 128, 256, 512],
        "batch_size": [1, 3, 6, 12, 24, 48],
    },
    "gpt2": {
        "n_layer": [3, 6, 12, 24],
        "n_embd": [384, 768, 1536],
        "block_size": [256, 512, 1024],
        "batch_size": [4, 12, 32],
    },
}


def measure(shape: dict[str, int], device: str, vocab: list[str]) -> dict[str, float]:
    """Milliseconds, billions of operations, and megabytes of one training step."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        flags = [f"--{key}={value}" for key, value in shape.items()]
        flags += [f"--device={device}", "--eval_iters=1", "--steps=40", "--new_tokens=0"]
        command = [sys.executable, "bench_jax.py", *vocab, *flags]
        done = subprocess.run([*command, f"--json={figures}"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}: {done.stderr[-1000:]}")
        train = json.loads(figures.read_text())["train"]
    ms = train["ms"]["median"]
    return {"ms": ms, "gflop": train["gflops_per_s"] * ms / 1000, "memory_mb": train["peak_memory_mb"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(BASES), default="laptop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", help="a data set with the vocabulary to use; without: GPT-2's, random tokens")
    parser.add_argument("--json", type=Path, required=True, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them")
    args = parser.parse_args()
    base, vocab = BASES[args.base], [f"--dataset={args.dataset}"] if args.dataset else ["--real_data=False"]

    sweeps = SWEEPS[args.base]
    shapes = {str(shape): shape for key in sweeps for value in sweeps[key] for shape in [{**base, key: value}]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in shapes}
    for number in range(args.rounds):
        for done, (name, shape) in enumerate(shapes.items(), 1):
            runs[name].append(measure(shape, args.device, vocab))
            print(f"{number * len(shapes) + done} of {args.rounds * len(shapes)}", end="\r", file=sys.stderr)

    result: dict[str, list[dict[str, float]]] = {}
    for key, values in sweeps.items():
        result[key] = []
        print(f"\n| {key} | ms | GFLOP | GFLOP/s | memory, MB |\n|---|---|---|---|---|")
        for value in values:
            of_runs = runs[str({**base, key: value})]
            row = {name: statistics.median(run[name] for run in of_runs) for name in ("ms", "gflop", "memory_mb")}
            result[key].append({"value": value, **row})
            rate = row["gflop"] / row["ms"] * 1000
            print(f"| {value} | {row['ms']:.1f} | {row['gflop']:.2f} | {rate:.0f} | {row['memory_mb']:.0f} |")
    args.json.write_text(json.dumps({"base": base, "sweeps": result}, indent=1) + "\n")
    if args.plot:
        plot(result, base, args.plot)
    return 0


def plot(result: dict[str, list[dict[str, float]]], base: dict[str, int], path: Path) -> None:
    """Time, operations and memory of each sweep, relative to the base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(result), figsize=(3.6 * len(result), 3.6), sharey=True, layout="constrained")
    for panel, (key, rows) in zip(panels, result.items(), strict=True):
        origin = next(row for row in rows if row["value"] == base[key])
        x = [row["value"] for row in rows]
        lines = {"ms": ("time", "o-"), "gflop": ("operations", "k--"), "memory_mb": ("memory of the process", "s:")}
        for name, (label, style) in lines.items():
            panel.plot(x, [row[name] / origin[name] for row in rows], style, label=label)
        panel.set(xscale="log", yscale="log", xlabel=key, xticks=x, xticklabels=x)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative to the base")
    panels[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
