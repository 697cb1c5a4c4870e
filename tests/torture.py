"""Kill a run again and again, at random moments, and demand the very run that was never killed.

    python tests/torture.py --kills=50        # or: make torture; about four minutes on two CPU cores

A third of the kills come while a checkpoint is being saved, a sixth while the trainer starts, the others in between.
Each is a SIGKILL: nothing can be caught or tidied up. In the end metrics.jsonl has to have each line once and the same
numbers (times aside), and the last checkpoint the same bits.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it only

import jax_data  # noqa: E402

TIMES = {"time_ms", "tokens_per_s", "mfu"}  # the only fields that may differ between two equal runs

# Small, with everything switched on that could break exact resume; saves so often that many kills hit one.
CONFIG = """
n_layer = 2
n_head = 2
n_embd = 16
block_size = 16
batch_size = 4
gradient_accumulation_steps = 2
dropout = 0.1
learning_rate = 1e-2
warmup_iters = 10
sampling = 'epoch'
eval_interval = 100
save_interval = 20
eval_iters = 2
device = 'cpu'
dataset = 'letters'
"""


class Outcome(NamedTuple):
    kills: dict[str, int]  # by moment: start, save, training
    starts: int
    lost: list[int]  # iterations done again, for each kill
    faults: list[str]  # where the run differs from the one never killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--iters", type=int, help="iterations of the run; 100 for each kill if not given")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    args = parser.parse_args()
    print(f"moments from --seed={args.seed}")
    with tempfile.TemporaryDirectory() as folder:
        outcome = torture(Path(folder), args.kills, args.iters or 100 * args.kills, args.seed, dict(os.environ))
    print(
        f"\n{sum(outcome.kills.values())} kills ({', '.join(f'{n} in {when}' for when, n in outcome.kills.items())}), "
        f"{outcome.starts} starts, at most {max(outcome.lost, default=0)} iterations done again after a kill"
    )
    for fault in outcome.faults:
        print(f"✗ {fault}")
    if not outcome.faults:
        print("✓ metrics.jsonl equals that of the run never killed, and the last checkpoint has the same bits")
    return 1 if outcome.faults else 0


def torture(folder: Path, kills: int, iters: int, seed: int, env: dict[str, str]) -> Outcome:
    """Train once in peace and once under `kills` SIGKILLs, and compare. Raises RuntimeError if a resume fails."""
    rng = random.Random(seed)
    ids = np.array([rng.randrange(15) for _ in range(9000)], np.uint16)
    itos = list("abcdefghijklmno")  # as many as in the tests' data, whose compiled code it shares there
    jax_data.write_dataset(folder / "data" / "letters", "char", len(itos), ids[:8000], ids[8000:], itos=itos)
    (folder / "torture.py").write_text(f"{CONFIG}max_iters = lr_decay_iters = {iters}\n")
    env = env | {"JAX_COMPILATION_CACHE_DIR": env.get("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))}

    def start(out_dir: str, resume: bool) -> subprocess.Popen[bytes]:
        options = ["--init_from=resume"] if resume else ["torture.py"]
        command = [sys.executable, str(ROOT / "train_jax.py"), *options, f"--out_dir={out_dir}"]
        with open(folder / f"{out_dir}.log", "ab") as log:
            return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def finish(process: subprocess.Popen[bytes], out_dir: str) -> None:
        if process.wait() != 0:
            tail = (folder / f"{out_dir}.log").read_text()[-2000:]
            raise RuntimeError(f"the trainer ended with {process.returncode}:\n{tail}")

    began = time.monotonic()
    finish(start("calm", resume=False), "calm")
    whole_run = time.monotonic() - began
    print(f"the run in peace: {iters} iterations in {whole_run:.0f} s", flush=True)

    out_dir, starts, lost = folder / "killed", 0, []
    moments = {"start": 0, "save": 0, "training": 0}
    began = time.monotonic()
    while (done := sum(moments.values())) < kills:
        resumed_at = newest_step(out_dir)
        process = start("killed", resume=resumed_at is not None)
        starts += 1
        moment = rng.choice(["start", "save", "save", "training", "training", "training"])
        # what is left of the run is shared out, so that it lasts for all the kills
        left, more = iters - last_iteration(out_dir) - 40, kills - done
        wait_for(moment, process, out_dir, rng, max(1, 2 * left // (more + 1)))
        if process.poll() is not None:
            finish(process, "killed")  # it came to its end: fine if so, but there is nobody left to kill
            break
        process.kill()
        process.wait()
        moments[moment] += 1
        lost.append(max(0, last_iteration(out_dir) + 1 - (newest_step(out_dir) or 0)))
        eta = (time.monotonic() - began) / (done + 1) * (kills - done - 1)
        print(f"kill {done + 1} of {kills} in {moment}: {lost[-1]} iterations lost, eta {eta:.0f} s", flush=True)
    finish(start("killed", resume=newest_step(out_dir) is not None), "killed")
    faults = differences(folder / "calm", out_dir, iters)
    if sum(moments.values()) < kills:
        faults.append(f"only {sum(moments.values())} kills: the run came to its end; give it more --iters")
    return Outcome(moments, starts + 1, lost, faults)


def wait_for(moment: str, process: subprocess.Popen[bytes], out_dir: Path, rng: random.Random, share: int) -> None:
    """Return at a random time of the kind asked for, or when the process ends."""
    if moment == "start":
        time.sleep(rng.uniform(0.0, 4.0))
        return
    goal = last_iteration(out_dir) + 1 + rng.randrange(share)  # further than the log of the processes before
    while process.poll() is None and last_iteration(out_dir) < goal:
        time.sleep(0.002)
    while moment == "save" and process.poll() is None and not save_under_way(out_dir):
        pass
    time.sleep(rng.uniform(0.0, 0.06))


def save_under_way(out_dir: Path) -> bool:
    """Whether there is a step that is not sealed yet."""
    for root in ("checkpoints", "best"):
        try:
            steps = list((out_dir / root).iterdir())
        except FileNotFoundError:
            continue
        if any("tmp" in step.name or not (step / "MANIFEST.json").exists() for step in steps):
            return True
    return False


def last_iteration(out_dir: Path) -> int:
    """The last iteration in the log, -1 if there is none."""
    try:
        tail = (out_dir / "metrics.jsonl").read_bytes()[-1000:]
    except FileNotFoundError:
        return -1
    iterations = [json.loads(line)["iter"] for line in tail.split(b"\n")[1:-1] if b'"loss"' in line]
    return max(iterations, default=-1)


def newest_step(out_dir: Path) -> int | None:
    steps = [int(p.parent.name) for p in out_dir.glob("checkpoints/*/MANIFEST.json") if p.parent.name.isdecimal()]
    return max(steps, default=None)


def differences(calm: Path, killed: Path, step: int) -> list[str]:
    """What the killed run has otherwise than the calm one."""
    faults = []
    ours, theirs = (numbers(path / "metrics.jsonl") for path in (killed, calm))
    if ours != theirs:
        both = enumerate(zip(ours, theirs, strict=False))
        at = next((i for i, (a, b) in both if a != b), min(len(ours), len(theirs)))
        faults.append(
            f"metrics.jsonl: {len(ours)} records, not {len(theirs)}; the first difference is in line {at + 1}"
        )
    for which in (f"checkpoints/{step}", "best"):
        if fingerprint(killed / which) != fingerprint(calm / which):
            faults.append(f"{which}: the arrays or the folders differ")
    leftovers = [str(p.relative_to(killed)) for p in killed.rglob("*") if "tmp" in p.name or p.name == "lock"]
    return faults + [f"left behind: {name}" for name in leftovers]


def numbers(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def fingerprint(root: Path) -> dict[str, str]:
    """A hash of each array under a folder of checkpoints, and of what meta says."""
    import jax
    import orbax.checkpoint as ocp

    found = {}
    for meta in sorted(root.rglob("meta/metadata")):
        step_dir = meta.parents[1]
        about = json.loads(meta.read_text())
        del about["config"]  # of it only out_dir differs, and how the run was started
        found[f"{step_dir.relative_to(root)}/meta"] = json.dumps(about, sort_keys=True)
        for item in ("params", "opt_state"):
            if not (step_dir / item).exists():  # best/ has no optimizer state
                continue
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                tree = checkpointer.restore((step_dir / item).resolve())
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                name = f"{step_dir.relative_to(root)}/{item}{jax.tree_util.keystr(path)}"
                found[name] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(main())
