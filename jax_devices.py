"""The devices that JAX computes on, and what is set before it is first used: platform, XLA's flags, caches, threads."""

import functools
import glob
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

import jax_console
import jax_cpu_kernels
import jax_cpu_library
import jax_host_memory

# For NVIDIA's GPUs. The first keeps apart the products that `jax_forms.attend` computes apart, the second leaves
# products to cuBLAS: of those that XLA makes with Triton GPT-2's step takes none, and trying them out took a minute.
GPU_FLAGS = {"xla_gpu_dot_merger_threshold_mb": "0", "xla_gpu_enable_triton_gemm": "false"}


def described(devices: Sequence[jax.Device]) -> str:
    """How many of which kind. What they compute depends on it up to rounding, and on a CPU on its cores, too."""
    text = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform != "cpu":
        return text
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{text} ({cores} core{'s' * (cores != 1)})"


def find_devices(device: str, deterministic: bool = False) -> list[jax.Device]:
    """The devices behind `--device`: auto, cpu, cuda, gpu, tpu, mps (a CPU here), or one of several, as cuda:1.

    Where several processes train together, they are those of all.

    Raises ValueError if JAX has none of that kind. Must come before JAX is first used, which it also prepares:
    `jax_host_memory.keep_freed_memory`, `keep_compiled_code`, our own code for a CPU (`jax_cpu_kernels.load`), XLA's
    flags for a GPU, and with `deterministic` a GPU that gives the same bits every time.
    """
    jax.config.update("jax_enable_x64", False)  # whatever JAX_ENABLE_X64 says: parameters are float32
    kind, _, index = device.partition(":")
    # The CPU stays available beside an accelerator, as it is by default: libraries compute small things there.
    platforms = {"auto": None, "cpu": "cpu", "mps": "cpu", "cuda": "cuda,cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
    if kind not in platforms or (index and not index.isdecimal()):
        raise ValueError(f"device={device!r} must be auto, cpu, cuda, gpu or tpu, or one of several as in cuda:1")
    if kind == "mps":
        print("note: JAX has no supported backend for Apple's GPU; device=mps computes on the CPU")
    if platforms[kind] is not None:
        jax.config.update("jax_platforms", platforms[kind])
    # XLA reads its flags when the devices are first asked for. What the user says there goes before ours.
    flags = GPU_FLAGS | ({"xla_gpu_deterministic_ops": "true"} if deterministic else {})
    theirs = os.environ.get("XLA_FLAGS", "")
    named = {flag.partition("=")[0].lstrip("-") for flag in theirs.split()}
    ours = [f"--{name}={value}" for name, value in flags.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join([theirs, *ours]).strip()
    jax_host_memory.keep_freed_memory()
    keep_compiled_code()
    try:
        devices = jax.devices()
        missing = None
    except (RuntimeError, AssertionError) as error:  # which of them depends on the platform that is missing
        missing = next(iter(str(error).splitlines()), "JAX was installed without it")
    if missing is None and kind in ("cuda", "gpu", "tpu") and devices[0].platform == "cpu":
        missing = "JAX was installed without it, or its driver does not answer"
    if missing is not None:
        raise ValueError(f"device={device}: JAX finds no such device ({missing}); see JAX_README.md, Installation")
    if kind == "auto" and devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        print("warning: nvidia-smi is here, but JAX has only a CPU; for the GPU: make train JAX=cuda12 (or cuda13)")
    if devices[0].platform == "cpu":
        jax_cpu_kernels.load()
    if index:
        if jax.process_count() > 1:
            raise ValueError(
                f"device={device} is one device, and there are {jax.process_count()} processes to share it"
            )
        if int(index) >= len(devices):
            raise ValueError(f"device={device}: JAX sees {len(devices)} such devices, numbered from 0")
        devices = [devices[int(index)]]
    return devices


def compute_dtype(dtype: str, device: jax.Device) -> str:
    """What `--dtype=auto` means on a device. On a CPU bfloat16 is slower than float32, not faster."""
    if dtype != "auto":
        return dtype
    return "float32" if device.platform == "cpu" else "bfloat16"


def keep_compiled_code() -> None:
    """Keep what XLA compiles in `jax_cpu_library.cache_folder`, so that the next start compiles nothing.

    JAX_COMPILATION_CACHE_DIR decides where, if it is set. Several processes may use it at once.
    """
    warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
    for name, value in {"min_compile_time_secs": 0.0, "min_entry_size_bytes": -1}.items():  # small ones add up
        if f"JAX_PERSISTENT_CACHE_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_persistent_cache_{name}", value)
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        jax.config.update("jax_compilation_cache_dir", str(jax_cpu_library.cache_folder()))
    except OSError as error:
        print(f"note: no folder for compiled code, so each start compiles anew ({error})")


def _show_warning(usual: Callable[..., None], message: Warning | str, *where: Any, **how: Any) -> None:
    """warnings.showwarning, but for those about `keep_compiled_code`: a line each, and damage is repaired.

    An entry that is torn, by a kill or a full disk, JAX would never write again, and warn of at each start.
    """
    trouble = re.match(r"Error (read|writ)ing persistent compilation cache entry for '(.*?)': ", str(message))
    if trouble is None:
        usual(message, *where, **how)
        return
    folder = Path(str(jax.config.jax_compilation_cache_dir))  # type: ignore[attr-defined]
    why = " ".join(str(message)[trouble.end() :].split())[:200]
    try:
        entries = list(folder.glob(f"{glob.escape(trouble[2])}-*-cache")) if trouble[1] == "read" else []
        if not entries:  # it is the folder that is no good
            _note(f"compiled code cannot be kept in {folder}: {why}")
            return
        for entry in entries:
            with entry.open("rb"):  # another user's is not ours to remove
                entry.unlink(missing_ok=True)
        _note(f"compiled code in {folder} was damaged; what was kept of {trouble[2]} is compiled anew")
    except OSError:
        _note(f"compiled code in {folder} cannot be read: {why}")


@functools.cache
def _note(text: str) -> None:
    """Said once."""
    jax_console.complain(f"note: {text}")


def in_own_thread() -> Callable[..., Future]:
    """compute(function, *arguments) -> the Future of what it returns: on a CPU it is computed in a thread of its own.

    On a CPU the Future is done when all of it is computed (several virtual devices would deadlock in the all-reduces of
    two steps under way), on an accelerator at once.

    Call it before JAX looks for its devices. By default XLA runs a CPU's programs in threads of its own, and reports a
    result before it has freed that program's temporary memory, so that the next step now and then takes as much again.
    Without asynchronous dispatch a program runs in the thread that calls it, and this cannot happen; but that thread
    must not be the main one, which handles signals.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    def compute(function: Callable[..., Any], *arguments: Any) -> Future:
        if jax.default_backend() == "cpu":
            return thread.submit(lambda: jax.block_until_ready(function(*arguments)))  # host-device sync
        dispatched: Future = Future()
        dispatched.set_result(function(*arguments))  # it is computed while the caller goes on
        return dispatched

    return compute
