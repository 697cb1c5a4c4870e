"""bench_jax.py, benchmarks/compare.py, and what makes a start and a step cheap: the figures, never the times.

python -m pytest tests/test_bench.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import the_error

ROOT = Path(__file__).resolve().parents[1]


def test_bench_times_a_configuration_and_its_figures_fit_together(quick, workdir):
    done = quick("bench_jax.py", "tiny.py", "--steps=5", "--warmup_steps=2", "--json=bench.json", "--profile=True")
    result = json.loads((workdir / "bench.json").read_text())
    train = result["train"]
    assert result["config"]["n_embd"] == 16 and result["config"]["gradient_accumulation_steps"] == 2
    assert train["ms"]["q25"] <= train["ms"]["median"] <= train["ms"]["q75"]
    assert train["tokens_per_s"] == pytest.approx(2 * 4 * 16 / train["ms"]["median"] * 1000)
    # 6 x 6,864 parameters without the positions, 12 x 2 layers x 16 wide x 16 tokens, for each token
    parameters = 15 * 16 + 2 * (12 * 16 * 16 + 2 * 16) + 16
    flops = 128 * (6 * parameters + 12 * 2 * 16 * 16)
    assert train["gflops_per_s"] == pytest.approx(flops / (train["ms"]["median"] / 1000) / 1e9)
    assert train["mfu"] is None and "MFU: -100.00%" in done.stdout  # nobody knows a CPU's peak
    assert train["peak_memory_mb"] > 50 and train["compile_s"] > 0
    assert re.search(r"^time per iteration: \d+\.\d{4}ms, MFU: ", done.stdout, re.M)  # nanoGPT's line
    assert 1 <= len(result["profile"]) <= 10
    assert [row["ms"] for row in result["profile"]] == sorted((row["ms"] for row in result["profile"]), reverse=True)
    generation = result["generation"]
    assert generation["rows"] == 4 and generation["prompt_tokens"] == 8 and generation["new_tokens"] == 64
    assert generation["prefill_ms"]["median"] > 0 and generation["decode_tokens_per_s"]["median"] > 0
    assert re.search(r"^  generation       4 rows of 8 tokens: prefill .* ms .*, then [\d,]+ tok/s$", done.stdout, re.M)
    assert list((workdir / "bench_log").rglob("*.trace.json.gz"))


@pytest.mark.slow
def test_bench_without_the_data_set_takes_random_tokens_and_says_so(quick):
    if (ROOT / "data" / "openwebtext" / "train.bin").exists():
        pytest.skip("OpenWebText is prepared here")
    few = ("--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=2", "--new_tokens=0")
    done = quick("bench_jax.py", *few, "--steps=1", "--warmup_steps=1", "--eval_iters=1")
    assert "generation" not in done.stdout
    assert re.search(r"^note: random tokens, since .*openwebtext", done.stdout, re.M)


def test_bench_refuses_a_data_set_that_was_asked_for_and_is_not_there(run):
    error = the_error(run("bench_jax.py", "tiny.py", "--dataset=nowhere", expect=2))
    assert "no data set 'nowhere'" in error and "--real_data=False takes random tokens" in error


def test_bench_says_what_it_does_not_read_and_prints_its_options_when_asked(quick):
    few = ("--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--steps=1", "--eval_iters=0", "--new_tokens=0")
    done = quick("bench_jax.py", *few, "--real_data=False", "--batch_size=1", "--init_from=gpt2-xl")
    assert "note: init_from=gpt2-xl is not read" in done.stdout
    shown = quick("bench_jax.py", *few, "--print_config").stdout
    namespace: dict[str, object] = {}
    exec(shown, namespace)
    assert (namespace["n_embd"], namespace["warmup_steps"]) == (8, 10)


def test_bench_makes_several_steps_in_one_dispatch(quick, workdir):
    few = ("--warmup_steps=1", "--eval_iters=1", "--new_tokens=0", "--json=bench.json")
    done = quick("bench_jax.py", "tiny.py", "--steps=6", "--steps_per_dispatch=3", *few, JAX_LOG_COMPILES="1")
    assert "Compiling jit(several_steps)" in done.stderr and "Compiling jit(train_step)" not in done.stderr
    train = json.loads((workdir / "bench.json").read_text())["train"]
    assert train["tokens_per_s"] == pytest.approx(2 * 4 * 16 / train["ms"]["median"] * 1000)


@pytest.mark.parametrize(
    "flag", ["--n_head=3", "--burn=3", "--json=nowhere/bench.json", "--json=data", "--new_tokens=1", "--profile=True"]
)
def test_bench_mistake_is_one_line(run, workdir, flag):
    (workdir / "bench_log").write_text("where traces belong")
    assert flag[2:6] in the_error(run("bench_jax.py", "tiny.py", flag, expect=2))


@pytest.mark.slow
def test_compare_pairs_the_two_trainers_on_one_configuration(workdir, environment):
    nanogpt = workdir / "nanoGPT"
    nanogpt.mkdir()
    # stands in for nanoGPT: notes its arguments, and prints its lines with a time that is surely longer than ours
    (nanogpt / "train.py").write_text(
        "import sys\n"
        "open('seen.txt', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "for i in range(21): print(f'iter {i}: loss 1.0, time 90000.00ms, mfu -100.00%')\n"
    )
    command = [
        sys.executable, str(ROOT / "benchmarks" / "compare.py"), f"--nanogpt={nanogpt}",
        f"--nanogpt_python={sys.executable}", "--dataset=data/tiny", "--rounds=1", "--iters=20", "--json=pairs.json",
        "--", str(workdir / "tiny.py"), "--n_layer=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=workdir, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (pair,) = json.loads((workdir / "pairs.json").read_text())["rounds"]
    assert set(pair) == {"ours", "eager", "compiled"}
    assert pair["eager"]["ms"] == 90000 and 0 < pair["ours"]["ms"] < 90000 and pair["ours"]["memory_mb"] > 50
    seen = (nanogpt / "seen.txt").read_text().splitlines()
    assert ["--compile=False" in line for line in seen] == [True, False]
    assert all("--n_layer=1" in line and f"--dataset={workdir / 'data' / 'tiny'}" in line for line in seen)
    assert "nanoGPT eager / ours, per iteration: median" in done.stdout


def test_a_whole_run_with_evaluations_saves_and_a_resume_compiles_everything_once(run, workdir):
    for args in (
        ("tiny.py", "--max_iters=12", "--eval_interval=3"),
        ("--init_from=resume", "--out_dir=out", "--max_iters=15"),
    ):
        done = run("train_jax.py", *args, JAX_LOG_COMPILES="1")
        compiled = re.findall(r"Compiling jit\((\w+)\)", done.stderr)
        compiled = [name for name in compiled if name != "copy"]  # of restored arrays: once for each shape
        assert {"train_step", "eval_losses"} <= set(compiled)
        assert len(compiled) == len(set(compiled)), compiled


def test_compiled_code_is_kept_in_the_users_cache_and_found_again(quick, workdir):
    kept = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(workdir / "cache")}
    quick("train_jax.py", "tiny.py", "--max_iters=2", **kept)
    entries = {p: p.stat().st_size for p in (workdir / "cache" / "nanogpt-jax").rglob("*-cache")}
    assert any("train_step" in p.name for p in entries)
    quick("train_jax.py", "tiny.py", "--max_iters=2", "--overwrite=True", **kept)
    assert {p: p.stat().st_size for p in (workdir / "cache" / "nanogpt-jax").rglob("*-cache")} == entries
    torn = next(path for path in entries if path.name.startswith("jit_train_step"))
    torn.write_bytes(torn.read_bytes()[:1000])
    done = quick("train_jax.py", "tiny.py", "--max_iters=2", "--overwrite=True", **kept)
    assert re.fullmatch(r"note: compiled code in .* was damaged; what was kept of jit_train_step is .*\n", done.stderr)
    assert torn.stat().st_size > 50_000


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_had_is_a_note_not_an_error(quick, workdir):
    (workdir / "file").write_text("")
    nowhere = {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(workdir / "file")}
    assert "note: no folder for compiled code" in quick("train_jax.py", "tiny.py", "--max_iters=1", **nowhere).stdout
    nowhere = {"JAX_COMPILATION_CACHE_DIR": str(workdir / "file")}
    done = quick("train_jax.py", "tiny.py", "--max_iters=1", "--overwrite=True", **nowhere)
    assert re.fullmatch(r"(note: compiled code cannot be kept in .*/file: .*\n)+", done.stderr)


def test_xlas_flags_are_set_before_the_devices_are_asked_for_and_those_of_the_user_win():
    code = "import os, jax_devices; jax_devices.find_devices('cpu', deterministic=True); print(os.environ['XLA_FLAGS'])"
    theirs = ["--xla_force_host_platform_device_count=1", "--xla_gpu_enable_triton_gemm=true"]
    env = os.environ | {"XLA_FLAGS": " ".join(theirs)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    ours = ["--xla_gpu_dot_merger_threshold_mb=0", "--xla_gpu_deterministic_ops=true"]
    assert done.stdout.split() == theirs + ours, done.stderr


def test_a_trainer_is_timed_from_what_it_prints_and_ended_with_all_it_started(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu import trainer_ms

    def time_it(script: str, timeout: float = 100) -> float:
        return trainer_ms(["bash", "-c", script], ROOT, dict(os.environ), timeout)

    assert time_it(r"for i in 0 10 20 90; do echo iter $i: loss; done; printf '\xff\n'; echo iter 100: loss") > 0
    with pytest.raises(RuntimeError, match=r"ended with 3, .*, and printed 1 iterations: iter 20: loss\nno more"):
        time_it("echo iter 20: loss; echo no more; exit 3")
    with pytest.raises(RuntimeError, match="printed 1 iterations"):
        time_it("echo iter 20: loss")
    with pytest.raises(RuntimeError, match="took 0 s"):
        time_it("sleep 1000 & sleep 1000", timeout=0.2)


def test_generation_is_compared_with_transformers_on_the_same_weights(tmp_path, environment):
    pytest.importorskip("transformers")
    command = [
        sys.executable, str(ROOT / "benchmarks" / "generation.py"), "--batch_sizes=1,3", "--rounds=2", "--n_layer=2",
        "--n_head=2", "--n_embd=16", "--block_size=32", "--vocab_size=50", "--prompt_tokens=8", "--new_tokens=20",
        "--json=figures.json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    weights = 4 * (50 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16)
    assert result["weight_bytes"] == weights
    for rows, batch in result["batches"].items():
        assert batch["same_tokens"] == 1.0
        assert batch["limit"] == pytest.approx(int(rows) * result["bytes_per_s"] / weights)
        assert len(batch["rounds"]) == 2 and all(min(r.values()) > 0 for r in batch["rounds"])
    assert done.stdout.count("100% of the tokens are the same") == 2
    refused = subprocess.run(
        [*command, "--new_tokens=30"], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert refused.returncode == 2 and refused.stderr.startswith("error: 8 + 30 tokens do not fit in block_size=32")
