"""A script in a process that has JAX imported already: what takes Python a second and a half is done once.

The process is forked off one that has imported it and done nothing else, with no devices looked for: from there on all
is as `python script.py` has it, but for variables that Python and JAX read when they begin.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["jax", "flax.nnx", "optax", "orbax.checkpoint", "tyro"])


def run_warm(folder: Path, env: dict[str, str], *command: str, optimised: bool) -> subprocess.CompletedProcess[str]:
    """`python *command` in `folder`, to its end; without XLA's optimisations unless `optimised`."""
    with tempfile.TemporaryDirectory() as outputs:
        process = _processes.Process(target=_become, args=(folder, env, command, outputs, optimised))
        process.start()
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
            process.join()
        told = [Path(outputs, name).read_text(encoding="utf-8") for name in ("1", "2")]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(command, process.exitcode, *told)


def _become(folder: Path, env: dict[str, str], command: tuple[str, ...], outputs: str, optimised: bool) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for descriptor in (1, 2):
        file = os.open(f"{outputs}/{descriptor}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = list(command)
    sys.path[:] = [str(Path(command[0]).parent), *(path for path in sys.path if path not in ("", str(ROOT)))]
    if not optimised:
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends without them
