"""Training that starts from weights, as its users meet it.

python -m pytest tests/test_init_from.py
"""

import hashlib
import json
import re
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_data
import jax_run_dir
from jax_transformer import GPTConfig, abstract_params, cross_entropy, forward
from jax_weights import load_weights, save_hf

ROOT = Path(__file__).resolve().parents[1]
MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=17, bias=True, gelu="tanh")

# As nanoGPT's finetune_shakespeare.py: nothing of the model's shape, which comes with the weights.
TUNE = """
init_from = 'weights'
out_dir = 'out'
dataset = 'tiny'
batch_size = 2
gradient_accumulation_steps = 3
eval_interval = 2
eval_iters = 3
max_iters = 4
learning_rate = 1e-3
decay_lr = False
device = 'cpu'
"""


def write_weights(folder: Path, tied_head: bool = True) -> None:
    random = np.random.default_rng(0)
    shapes = abstract_params(MODEL, tied_head)
    params = jax.tree.map(lambda a: (a.ndim == 1) + 0.2 * random.standard_normal(a.shape), shapes)
    save_hf(jax.tree.map(np.float32, params), MODEL, folder)


@pytest.fixture
def tune(workdir: Path) -> Path:
    write_weights(workdir / "weights")
    (workdir / "tune.py").write_text(TUNE)
    return workdir


def fingerprints(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def losses(out_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def evaluations(printed: str) -> list[tuple[float, float]]:
    found = re.findall(r"^step \d+: train loss ([\d.]+), val loss ([\d.]+)", printed, re.M)
    return [(float(train), float(val)) for train, val in found]


def loss_of(workdir: Path, split: str, rows: int, block_size: int, sampling: str) -> float:
    """The loss of the weights in another way: as loaded, on the rows the trainer sees at step 0."""
    params, config = load_weights(workdir / "weights")
    x_BT, y_BT = jax_data.get_batch(
        workdir / "data" / "tiny", split, 0, seed=1337, batch_size=rows, block_size=block_size, sampling=sampling
    )
    logits_BTV = jax.jit(forward, static_argnums=2)(params, jnp.asarray(x_BT), config)
    return float(cross_entropy(logits_BTV, jnp.asarray(y_BT)).mean())


def test_training_goes_on_from_the_weights_and_resumes_as_any_run(quick, tune):
    done = quick("train_jax.py", "tune.py")
    assert "Initializing from the weights of weights\n" in done.stdout
    assert losses(tune / "out")[0] == pytest.approx(loss_of(tune, "train", 6, 32, "random"), rel=1e-5)
    meta = jax_run_dir.read_meta(jax_run_dir.find_checkpoint(tune / "out")[0])
    assert meta["model"] == vars(MODEL) and meta["config"]["n_embd"] == 16 and meta["config"]["bias"] is True

    shutil.rmtree(tune / "weights")  # a checkpoint holds all it needs
    quick("train_jax.py", "--init_from=resume", "--out_dir=out", "--max_iters=6")
    write_weights(tune / "weights")
    quick("train_jax.py", "tune.py", "--out_dir=whole", "--max_iters=6")
    assert losses(tune / "out") == losses(tune / "whole") and len(losses(tune / "whole")) == 6


def test_weights_that_know_other_tokens_are_told(quick, tune):
    meta = json.loads((tune / "data/tiny/meta.json").read_text())
    for itos, is_told in ((meta["itos"], False), (meta["itos"][::-1], True)):
        (tune / "weights/meta.json").write_text(json.dumps(meta | {"itos": itos}))
        done = quick("train_jax.py", "tune.py", "--eval_only=True")
        assert (
            "note: weights knows char tokens, and those of data/tiny are of another alphabet" in done.stdout
        ) == is_told


def test_a_head_of_its_own_is_trained_saved_sampled_from_and_exported(quick, tune):
    write_weights(tune / "weights", tied_head=False)
    quick("train_jax.py", "tune.py")
    assert losses(tune / "out")[0] == pytest.approx(loss_of(tune, "train", 6, 32, "random"), rel=1e-5)
    last = evaluations(quick("train_jax.py", "--init_from=resume", "--out_dir=out", "--max_iters=6").stdout)[-1]
    quick("export_jax.py", "--out_dir=out", "--hf_dir=exported")
    before, after = (load_weights(tune / name)[0]["lm_head"]["embedding"] for name in ("weights", "exported"))
    assert before.shape == after.shape and np.abs(before - after).max() > 1e-4
    evaluate = ("tune.py", "--init_from=exported", "--eval_only=True")
    assert evaluations(quick("train_jax.py", *evaluate).stdout) == [last]
    few = ("--num_samples=1", "--max_new_tokens=20", "--temperature=0", "--start=a")
    samples = [quick("sample_jax.py", *few, source).stdout for source in ("--out_dir=out", "--init_from=exported")]
    assert samples[0].splitlines()[-2:] == samples[1].splitlines()[-2:]


def test_a_shorter_block_size_crops_and_dropout_is_the_options(quick, tune):
    done = quick("train_jax.py", "tune.py", "--block_size=12", "--max_iters=1", "--dropout=0.4")
    (_, val_loss), *_ = evaluations(done.stdout)  # without dropout, and before any update
    assert val_loss == pytest.approx(loss_of(tune, "val", 6, 12, "spread"), abs=1e-4)
    assert abs(losses(tune / "out")[0] - loss_of(tune, "train", 6, 12, "random")) > 1e-3  # with dropout
    meta = jax_run_dir.read_meta(jax_run_dir.find_checkpoint(tune / "out")[0])
    assert meta["model"]["block_size"] == 12 and meta["model"]["dropout"] == 0.4


def test_eval_only_evaluates_the_weights_and_writes_nothing(quick, tune):
    before = fingerprints(tune)
    done = quick("train_jax.py", "tune.py", "--eval_only=True")
    assert fingerprints(tune) == before
    trained = quick("train_jax.py", "tune.py", "--max_iters=1", "--eval_interval=1")
    assert len(evaluations(trained.stdout)) == 2
    assert evaluations(done.stdout) == evaluations(trained.stdout)[:1]


def test_nanogpts_checkpoint_can_be_trained_on(quick, tune):
    text = "abcdefghijklmnopqrstuvw"  # 23 tokens, as many as the checkpoint knows
    ids = np.random.default_rng(0).integers(0, 23, 500)
    jax_data.write_dataset(tune / "data" / "letters", "char", 23, ids[:400], ids[400:], itos=list(text))
    path = ROOT / "tests" / "fixtures" / "weights" / "nanogpt" / "ckpt.pt"
    done = quick("train_jax.py", "tune.py", f"--init_from={path}", "--dataset=letters", "--max_iters=1")
    assert f"Initializing from the weights of {path}\n" in done.stdout
    meta = jax_run_dir.read_meta(jax_run_dir.find_checkpoint(tune / "out")[0])
    assert meta["model"]["gelu"] == "erf" and meta["model"]["bias"] is False and meta["model"]["block_size"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["eval_gpt2", "eval_gpt2_medium", "eval_gpt2_large", "eval_gpt2_xl", "finetune_shakespeare"]
)
def test_config_file_for_gpt2s_weights_runs_as_it_is(quick, tune, name):
    """On weights and data of our own under the names it asks for: as if they had been downloaded and prepared."""
    config = ROOT / "config" / f"{name}.py"
    options = runpy.run_path(str(config))
    dataset = options.get("dataset", "openwebtext")
    shutil.copytree(tune / "data" / "tiny", tune / "data" / dataset)
    snapshot = tune / "hub" / f"models--openai-community--{options['init_from']}" / "snapshots" / ("0" * 40)
    shutil.copytree(tune / "weights", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    offline = {"HF_HUB_CACHE": str(tune / "hub"), "HF_HUB_OFFLINE": "1"}
    before = fingerprints(tune)
    small = ["--device=cpu", "--eval_iters=2", "--max_iters=5"]
    done = quick("train_jax.py", str(config), *small, **offline)
    assert f"Initializing from OpenAI GPT-2 weights: {options['init_from']}\n" in done.stdout
    assert "note: gpt2" in done.stdout  # characters are not what it was trained on
    assert evaluations(done.stdout)
    if name.startswith("eval"):
        assert fingerprints(tune) == before
    else:
        assert jax_run_dir.holds_run(tune / "out-shakespeare")


def test_print_config_says_who_decides_and_reads_no_weights(run, tune):
    shutil.rmtree(tune / "data")
    (tune / "weights" / "model.safetensors").unlink()
    done = run("train_jax.py", "tune.py", "--print_config=True", "--n_head=2")
    assert re.search(r"^# n_embd += 768 +# default; weights decides$", done.stdout, re.M)
    assert re.search(r"^n_head += 2 +# --n_head=2$", done.stdout, re.M)


def test_what_print_config_shows_of_a_run_from_weights_is_a_config_file(quick, tune):
    printed = quick("train_jax.py", "tune.py", "--print_config=True", "--grad_clip=inf").stdout
    (tune / "shown.py").write_text(printed)
    quick("train_jax.py", "shown.py", "--max_iters=1")
    config = json.loads((tune / "out" / "config.json").read_text())
    assert (config["grad_clip"], config["n_embd"]) == (float("inf"), 16)


def large_data(folder: Path) -> None:
    path = folder / "data" / "tiny" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"tokenizer": "bytes", "vocab_size": 18}))


def cut_weights(folder: Path) -> None:
    path = folder / "weights" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def nan_weights(folder: Path) -> None:
    path = folder / "weights" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes())


MISTAKES = {
    "another depth": (["--n_layer=3"], None, [r"n_layer=3 \(--n_layer=3\) contradicts init_from=weights.*n_layer=2"]),
    "another width": (["--n_embd=32"], None, [r"n_embd=32 \(--n_embd=32\)", "n_embd=16"]),
    "no biases": (["--bias=False"], None, [r"bias=False \(--bias=False\) contradicts", "bias=True"]),
    "another gelu": (["--gelu=erf"], None, ["gelu=erf", "gelu=tanh"]),
    "too long": (["--block_size=33"], None, [r"block_size=33 \(--block_size=33\) is longer than", "block_size=32"]),
    "a config file contradicts": (["deep.py"], lambda f: (f / "deep.py").write_text("n_layer = 3"), [
        r"n_layer=3 \(deep\.py\) contradicts init_from=weights"]),
    "larger vocabulary": ([], large_data, ["dataset=tiny has a vocabulary of 18", "init_from=weights know 17 tokens"]),
    "unknown name": (["--init_from=gtp2"], None, [r"init_from=gtp2 \(--init_from=gtp2\)", "did you mean gpt2"]),
    "misspelt resume": (["--init_from=resum"], None, ["init_from=resum", "neither scratch nor resume"]),
    "no data": (["--dataset=none", "--init_from=gpt2"], None, ["no data set 'none'"]),
    "cut short": ([], cut_weights, [r"weights/model\.safetensors cannot be read", "damaged, incomplete or no"]),
    "NaN": ([], nan_weights, ["weights has weights that are not finite: "]),
    "into the weights": (["--out_dir=weights"], None, ["out_dir=weights .* has a config.json that is not a run's"]),
    "over the weights": (["--out_dir=weights", "--overwrite=True"], None, ["config.json that is not a run's"]),
    "weights with a checkpoint": (["--checkpoint=best"], None, ["checkpoint=best", "--init_from=resume"]),
    "a run": (["--init_from=out"], lambda f: shutil.copytree(f / "weights", f / "out") and (
        f / "out" / "config.json").write_text('{"init_from": "scratch"}'), ["--init_from=resume --out_dir=out"]),
    "not downloaded": (["--init_from=gpt2"], None, ["gpt2 is not in the cache", "hf download openai-community/gpt2"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_2_and_writes_nothing(run, tune, mistake):
    args, damage, expected = MISTAKES[mistake]
    if damage is not None:
        damage(tune)
    before = fingerprints(tune)
    done = run("train_jax.py", "tune.py", *args, expect=2, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tune / "hub"))
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ") and all(re.search(text, error) for text in expected), error
    assert fingerprints(tune) == before
