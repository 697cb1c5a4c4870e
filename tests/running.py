"""What the tests of the trainer share: its files read, its lines waited for, its one line of error."""

import hashlib
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax_run_dir

# In a script's environment: XLA compiles in a third of the time, without optimisations and, before JAX 0.11, with the
# older of its two ways to make code of what it fused.
HAS_BOTH_WAYS = tuple(map(int, version("jax").split(".")[:2])) < (0, 11)
QUICKLY = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false" if HAS_BOTH_WAYS else "",
}


def metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def fingerprints(folder: Path) -> dict[str, tuple]:
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    assert any(line.startswith(beginning) for line in process.stdout), f"no {beginning!r}: {process.communicate()}"


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a mistake is told in."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def steps(out_dir: Path) -> list[int]:
    return sorted(jax_run_dir.sealed_steps(out_dir))


def leftovers(out_dir: Path) -> list[str]:
    """What a run that has ended should not leave."""
    unsealed = [p for p in out_dir.glob("*/*") if not (p / "MANIFEST.json").exists()]
    return [str(p) for p in [*unsealed, *out_dir.rglob("*tmp*"), *out_dir.glob("lock")]]
