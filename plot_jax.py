"""Draw the curves of one or several runs: loss, learning rate, tokens per second.

python plot_jax.py out-shakespeare-char                         writes out-shakespeare-char/curves.png
python plot_jax.py out-shakespeare-char out-other --out=two.svg one colour a run, side by side
"""

import argparse
import math
from pathlib import Path
from typing import Any

import jax_console
from jax_run_log import read_metrics

Records = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description="plot_jax.py OUT_DIR [OUT_DIR ...] [--out=FILE]: one picture of the curves of these runs.",
    )
    parser.add_argument("out_dirs", nargs="+", type=Path, metavar="OUT_DIR", help="a run's directory")
    parser.add_argument("--out", type=Path, help="the picture, .png or .svg (default: curves.png in the first OUT_DIR)")
    args = parser.parse_args()
    out = args.out or args.out_dirs[0] / "curves.png"

    runs: dict[str, Records] = {}
    for out_dir in args.out_dirs:
        runs[str(out_dir)] = read_run(out_dir)
    if not out.parent.is_dir():
        raise ValueError(f"--out={out}: there is no folder {out.parent}")
    draw(runs, out)
    print_table(runs)
    print(out)


def read_run(out_dir: Path) -> Records:
    path = out_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} not found; OUT_DIR is the --out_dir of a training run")
    records = read_metrics(path)
    if not records:
        raise ValueError(f"{path} has no records yet")
    return records


def curve(records: Records, key: str) -> tuple[list[int], list[float]]:
    """The iterations that have this key, and its values; null, which stands for NaN, leaves a gap."""
    having = [record for record in records if key in record]
    return [r["iter"] for r in having], [math.nan if r[key] is None else r[key] for r in having]


def draw(runs: dict[str, Records], out: Path) -> None:
    import matplotlib  # late: it takes a second, and a wrong argument should not wait for it

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, (loss, lr, speed) = plt.subplots(
        3, 1, figsize=(9, 10), sharex=True, height_ratios=[3, 1, 1], layout="constrained"
    )
    thin: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.5}
    train: dict[str, Any] = {"linestyle": "--", "marker": "s", "markersize": 4, "markerfacecolor": "white"}
    val: dict[str, Any] = {"marker": "o", "markersize": 4}
    whose = []
    for number, records in enumerate(runs.values()):
        color = f"C{number % 10}"
        # One record makes no line: give it a dot.
        dot = "." if len(curve(records, "loss")[0]) == 1 else None
        loss.plot(*curve(records, "loss"), color=color, marker=dot, **thin)
        loss.plot(*curve(records, "train/loss"), color=color, **train)
        whose += loss.plot(*curve(records, "val/loss"), color=color, **val)
        lr.plot(*curve(records, "lr"), color=color, marker="." if len(records) == 1 else None)
        speed.plot(*curve(records, "tokens_per_s"), color=color, linewidth=0.9, marker=dot)

    # Two legends above the panels: whose curve it is, by colour; which loss it is, by form.
    forms = [loss.plot([], [], color="gray", **form)[0] for form in (thin, train, val)]
    form_names = ["loss of the iteration", "evaluation, train", "evaluation, val"]
    for name in figure.legend(whose, list(runs), loc="outside upper left", frameon=False).get_texts():
        name.set_parse_math(False)  # a $ is a $
    figure.legend(forms, form_names, loc="outside upper right", frameon=False)

    loss.set_ylabel("loss (nats per token)")
    lr.set_ylabel("learning rate")
    lr.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    speed.set_ylabel("tokens per second")
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    speed.set_xlabel("iteration")
    speed.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, lr, speed):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (lr, speed):
        axes.set_ylim(bottom=0)
    figure.savefig(out, dpi=150, format=out.suffix[1:] or "png")
    plt.close(figure)


def print_table(runs: dict[str, Records]) -> None:
    width = max(len("run"), *map(len, runs))
    print(f"{'run':{width}}  {'last iter':>9}  {'last loss':>9}  {'best val':>8}  {'at iter':>7}")
    for name, records in runs.items():
        last_loss = next((r["loss"] for r in reversed(records) if r.get("loss") is not None), None)
        evaluations = [r for r in records if r.get("val/loss") is not None]
        best = min(evaluations, key=lambda r: r["val/loss"], default={})
        print(
            f"{name:{width}}  {records[-1]['iter']:>9}  {_number(last_loss):>9}  "
            f"{_number(best.get('val/loss')):>8}  {best.get('iter', '-'):>7}"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    jax_console.run_script(main, ValueError)
