"""jax_host_memory.py: how memory is handed out, seen in the process that is told to.

python -m pytest tests/test_host_memory.py
"""

import ctypes
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest

import jax_host_memory

ROOT = Path(__file__).resolve().parents[1]
STATUS = Path("/proc/self/status")


def test_scripts_start_again_once_with_large_pages_and_leave_a_users_choice_alone(tmp_path):
    script = tmp_path / "script.py"
    lines = ["import os, sys", "import jax_host_memory", "jax_host_memory.use_huge_pages()"]
    lines.append("print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])")
    script.write_text("\n".join(lines))

    def started(**environment):
        inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        process = subprocess.Popen(
            [sys.executable, str(script), "--a=b c"], text=True, stdout=subprocess.PIPE,
            env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip
        out, _ = process.communicate()
        return process.pid, out

    pid, out = started()
    large = "glibc.malloc.hugetlb=1" if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None
    assert out == f"{pid} {large} ['--a=b c']\n"  # the same process, with the same arguments
    pid, out = started(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert out == f"{pid} glibc.malloc.hugetlb=0 ['--a=b c']\n"
    pid, out = started(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert large is None or out == f"{pid} glibc.malloc.check=0:{large} ['--a=b c']\n"
    script.write_text("import sys\nsys.executable = '/nowhere/python'\n" + script.read_text())
    pid, out = started()
    assert out == f"{pid} None ['--a=b c']\n"  # as it is, where Python cannot be started again


@pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc's allocator only")
def test_freed_memory_is_kept_so_that_the_kernel_need_not_zero_it_again():
    code = """
import resource, sys
import numpy as np
import jax_host_memory
if sys.argv[1] == "kept":
    jax_host_memory.keep_freed_memory()
np.ones(8_000_000)  # 64 MB: the first one has to come from the kernel
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(8_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, text=True, capture_output=True).stdout)
        for how in ("kept", "as it is")
    }
    assert faults["kept"] < 50
    assert faults["as it is"] > 200  # 320 with pages of 2 MB, 160,000 with small ones


@pytest.mark.parametrize("most", [2**31 - 1, 2**25])  # glibc since 2.35, and before
def test_an_older_glibc_keeps_the_largest_blocks_that_it_can(monkeypatch, most):
    set_to = {}

    def mallopt(option: int, value: int) -> int:
        if option != -3 or value <= most:
            set_to[option] = value
            return 1
        return 0

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    jax_host_memory.keep_freed_memory()
    assert set_to == {-3: most, -1: 2**31 - 1, -8: 1}


@pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc's allocator only")
def test_memory_that_the_compiler_used_is_given_back_although_freed_memory_is_kept():
    code = """
import os, sys
import numpy as np
import jax, jax_host_memory, jax_train_utils
jax.config.update("jax_platforms", "cpu")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
jax_host_memory.keep_freed_memory()
before = resident()
last = [np.ones(5_000) for _ in range(5_000)][-1]  # 200 MB in small blocks, with one at the end still in use
print(resident() - before)
if sys.argv[1] == "compiled":
    jax_train_utils.compile_ahead(jax.jit(lambda x: x + 1), last).result()
print(resident() - before)
"""
    for how in ("compiled", "not compiled"):
        done = subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        kept, afterwards = map(int, done.stdout.split())
        assert kept > 190e6
        assert (afterwards < 110e6) == (how == "compiled")


@pytest.mark.skipif(not STATUS.exists() or "THP_enabled" not in STATUS.read_text(), reason="Linux tells it since 5.0")
def test_only_a_large_model_is_given_large_pages(run, workdir):
    (workdir / "sitecustomize.py").write_text(
        "import atexit, pathlib, shutil\n"
        "atexit.register(lambda: shutil.copy('/proc/self/status', pathlib.Path(__file__).with_name('status')))\n"
    )
    for size, allowed in (([], 0), (["--n_embd=512", "--n_layer=6"], 1)):  # 75 million numbers
        run("train_jax.py", "tiny.py", "--eval_only=True", *size, PYTHONPATH=str(workdir))
        assert f"THP_enabled:\t{allowed}\n" in (workdir / "status").read_text()


@pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc's allocator only")
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_all_threads_of_a_run_share_one_heap(run, workdir, device):
    """A thread that began before it was asked for would keep a heap of its own, in which a later one computes."""
    (workdir / "sitecustomize.py").write_text(
        "import atexit, ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.fopen.restype = ctypes.c_void_p\n"
        "def tell():\n"
        "    file = ctypes.c_void_p(libc.fopen(b'heaps.xml', b'w'))\n"
        "    libc.malloc_info(0, file)\n"
        "    libc.fclose(file)\n"
        "atexit.register(tell)\n"
    )
    run("train_jax.py", "tiny.py", f"--device={device}", "--max_iters=3", PYTHONPATH=str(workdir), JAX_PLATFORMS="cpu")
    assert (workdir / "heaps.xml").read_text().count("<heap nr=") == 1
