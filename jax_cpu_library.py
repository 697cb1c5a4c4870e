"""The folder of compiled code, and the library of jax_cpu_kernels.cc in it, which the machine's C++ compiler makes.

Once for each kind of processor, as torch.compile does with its code. Without JAX, so that a script can have the library
made while JAX is imported.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("jax_cpu_kernels.cc")
FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC"]


def cache_folder() -> Path:
    """The user's folder for compiled code. Raises OSError if it cannot be had.

    Code for a CPU may use all its instructions: each kind of processor has a folder of its own, in case a home
    directory is shared.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    kind = f"{platform.machine()}-{hashlib.sha256(''.join(processor).encode()).hexdigest()[:8]}"
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home
        raise OSError(f"{error}; XDG_CACHE_HOME names another") from error
    folder = caches / "nanogpt-jax" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def begin(find_folder: Callable[[], Path]) -> Future[Path]:
    """Begin to make the library, or find it, in a folder that is for one kind of processor. Returns at once.

    It takes a compiler one or two seconds, while Python does something else. result() of what is returned is the
    library, or raises OSError, in one line, where there is no compiler, or it fails. A second call for the same folder
    gets what the first one began. `jax_host_memory.keep_freed_memory` comes before: this starts a thread.
    """
    thread = ThreadPoolExecutor(max_workers=1)
    making = thread.submit(_make, find_folder)
    thread.shutdown(wait=False)
    return making


def _make(find_folder: Callable[[], Path]) -> Path:
    asked_for = os.environ.get("CXX") or "c++"
    try:
        compiler, *options = shlex.split(asked_for)
    except ValueError as error:  # quotes that do not close, or only blanks
        raise OSError(f"CXX={asked_for!r} names no C++ compiler") from error
    if (found := shutil.which(compiler)) is None:
        raise OSError(f"no C++ compiler {compiler}")
    jaxlib = importlib.util.find_spec("jaxlib")
    assert jaxlib is not None and jaxlib.submodule_search_locations, "jaxlib is a package that JAX needs"
    include = Path(jaxlib.submodule_search_locations[0]) / "include"  # jax.ffi.include_dir()
    command = [found, *options, *FLAGS, f"-I{include}", str(SOURCE)]
    compiler_stat = os.stat(found)
    made_with = [*command, compiler_stat.st_size, compiler_stat.st_mtime, platform.libc_ver()]
    made_of = [path.read_text() for path in (SOURCE, include / "xla" / "ffi" / "api" / "c_api.h")]
    name = f"cpu_kernels-{hashlib.sha256(repr([made_of, made_with]).encode()).hexdigest()[:16]}.so"
    library = find_folder() / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as unfinished:
            _compile([*command, "-o", f"{unfinished}/{name}"])
            Path(unfinished, name).replace(library)  # whole or not at all: other processes may be at the same
    return library


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=120, env=os.environ | {"LC_ALL": "C"}
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} has not compiled {SOURCE.name} in two minutes") from error
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "error" in line] or ["it does not say why"]
        raise OSError(f"{command[0]} cannot compile {SOURCE.name}: {told[0]}")
