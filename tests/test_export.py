"""export_jax.py and the examples, as their users meet them. tests/test_peers.py has transformers load what is exported.

python -m pytest tests/test_export.py
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_checkpoint
import jax_run_dir
import test_jax_transformer
from jax_codec import DataError, make_codec
from jax_train_utils import make_mesh, replicated
from jax_transformer import GPTConfig, abstract_params
from jax_weights import load_weights, save_hf

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"config.json", "model.safetensors"}
TOKENIZER = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"}


def needs_gpt2_tokenizer() -> None:
    """Skip where neither the test inputs nor tiktoken's own cache nor the network have it."""
    try:
        make_codec(None)
    except DataError as error:
        pytest.skip(str(error))


def random_weights(folder: Path, config: GPTConfig) -> None:
    random = np.random.default_rng(0)
    shapes = abstract_params(config)
    save_hf(jax.tree.map(lambda a: random.standard_normal(a.shape, np.float32), shapes), config, folder)


@pytest.fixture
def gpt2_run(workdir: Path) -> GPTConfig:
    """out/: a run with GPT-2's tokens, at step 3, whose model has a padded vocabulary."""
    config = GPTConfig(1, 1, 4, 8, 50304)
    params = jax.tree.map(lambda a: np.full(a.shape, 0.5, np.float32), abstract_params(config))
    codec = {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16"}
    saver = jax_checkpoint.Saver(workdir / "out", keep=1)
    about = {"model": vars(config), "codec": codec, "config": {}, "bad_steps": 0}
    about |= dict.fromkeys(("best_val_loss", "evaluated_at", "wandb_run_id", "devices")) | {
        "tied_head": True,
        "data": None,
    }
    saver.save(3, jax.device_put(params), {"none": jnp.zeros(1)}, about, is_best=True)
    saver.close()
    return config


def test_export_of_a_run_loads_as_the_run_bit_for_bit(run, workdir, finished):
    done = run("export_jax.py", "--out_dir=finished", "--hf_dir=my-gpt2", fresh=True)
    assert "exported finished/checkpoints/20 to my-gpt2:" in done.stdout
    assert {path.name for path in (workdir / "my-gpt2").iterdir()} == WEIGHTS | {"meta.json"}
    assert "transformers has no tokenizer of kind 'char': meta.json says what the ids mean" in done.stdout

    step_dir, _ = jax_run_dir.find_checkpoint(finished)
    meta = jax_run_dir.read_meta(step_dir)
    assert json.loads((workdir / "my-gpt2" / "meta.json").read_text()) == meta["codec"]
    codec = make_codec(json.loads((workdir / "my-gpt2" / "meta.json").read_text()))
    assert codec.decode(codec.encode("the cat sat")) == "the cat sat"
    params, config = load_weights(workdir / "my-gpt2")
    assert vars(config) == meta["model"] | {"dropout": 0.0} and not config.bias
    sharding = replicated(make_mesh(jax.devices()[:1]))
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), abstract_params(config))
    trained = jax_checkpoint.restore(step_dir, {"params": wanted})["params"]
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), params, trained)
    assert jax.tree.all(same)


def test_gpt2s_codec_brings_its_tokenizer_and_padding_can_be_trimmed(run, workdir, gpt2_run):
    needs_gpt2_tokenizer()
    done = run("export_jax.py", "--hf_dir=all", "--out_dir=out", "--checkpoint=best")
    assert {path.name for path in (workdir / "all").iterdir()} == WEIGHTS | TOKENIZER
    assert "50304 rows of embeddings, of which no token has the last 47" in done.stdout
    assert load_weights(workdir / "all")[1] == gpt2_run
    run("export_jax.py", "--hf_dir=trimmed", "--out_dir=out", "--trim_vocab=True")
    params, config = load_weights(workdir / "trimmed")
    assert config.vocab_size == 50257 == params["wte"]["embedding"].shape[0]

    import tiktoken

    bpe = tiktoken.get_encoding("gpt2")
    vocab = json.loads((workdir / "all" / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(50257)) and vocab["<|endoftext|>"] == 50256
    assert [vocab["Hello"], vocab["Ġworld"]] == bpe.encode("Hello world")
    version, *merges = (workdir / "all" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert version.startswith("#version") and len(merges) == 50_000
    # the n-th merge makes the n-th token after the 256 bytes
    assert all(vocab[merge.replace(" ", "")] == 256 + n for n, merge in enumerate(merges))
    options = json.loads((workdir / "all" / "config.json").read_text())
    assert options["eos_token_id"] == 50256 and options["bias"] is False
    assert json.loads((workdir / "all" / "tokenizer_config.json").read_text())["model_max_length"] == 8


@pytest.mark.slow
def test_overwrite_replaces_an_earlier_export_and_keeps_what_is_the_users(run, workdir, finished):
    run("export_jax.py", "--out_dir=finished", "--hf_dir=mine", "--checkpoint=10")
    (workdir / "mine" / "vocab.json").write_text("of another export")
    (workdir / "mine" / "README.md").write_text("mine")
    run("export_jax.py", "--out_dir=finished", "--hf_dir=mine", "--overwrite=True")
    assert {path.name for path in (workdir / "mine").iterdir()} == WEIGHTS | {"meta.json", "README.md"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "hf_dir is not given"),
        (["--hf_dir=data"], "hf_dir=data is not empty.*--overwrite=True"),
        (["--hf_dir=tiny.py"], "hf_dir=tiny.py is a file"),
        (["--hf_dir=finished", "--overwrite=True"], "hf_dir=finished holds a run"),
        (["--hf_dir=new", "--out_dir=nowhere"], "no checkpoint that verifies in nowhere/checkpoints"),
        (["--hf_dir=new", "--checkpoint=11"], "no checkpoint of step 11 in finished"),
        (["--hf_dir=new", "--trim=True"], "unknown key 'trim'.*trim_vocab"),
    ],
)
def test_mistake_is_one_line_and_exit_2(run, workdir, finished, args, expected):
    done = run("export_jax.py", "--out_dir=finished", *args, expect=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and re.search(expected, line), line
    assert not (workdir / "new").exists()


def test_empty_tokenizer_cache_without_a_network_is_one_line_and_nothing_is_written(run, workdir, gpt2_run):
    nowhere = {"TIKTOKEN_CACHE_DIR": str(workdir / "empty"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = run("export_jax.py", "--out_dir=out", "--hf_dir=new", expect=2, **nowhere)
    (line,) = done.stderr.splitlines()
    assert "TIKTOKEN_CACHE_DIR" in line and not (workdir / "new").exists()


# ----------------------------------------------------------------------------------------------------------------------
# the examples


def test_next_token_example_shows_the_softmax_of_the_forward_pass(run, workdir):
    needs_gpt2_tokenizer()
    config = GPTConfig(1, 2, 8, 16, 50304, bias=True, gelu="tanh")
    random_weights(workdir / "model", config)
    done = run("examples/gpt2_next_token.py", "--model=model")
    assert "'Hello world' is 2 tokens: [15496, 995]" in done.stdout

    from jax_transformer import forward

    params, config = load_weights(workdir / "model")
    logits_V = np.asarray(forward(params, jnp.array([[15496, 995]]), config), np.float64)[0, -1, :50257]
    weights_V = np.exp(logits_V - logits_V.max())
    likeliest = np.argsort(-weights_V)[:5]
    rows = re.findall(r"^ +([\d.]+)% +(\d+)  (.*)$", done.stdout, re.M)
    assert [int(token) for _, token, _ in rows] == likeliest.tolist()
    expected = 100 * weights_V[likeliest] / weights_V.sum()
    assert [float(percent) for percent, _, _ in rows] == pytest.approx(expected, abs=0.006)
    assert [text for _, _, text in rows] == [repr(make_codec(None).decode([token])) for token in likeliest.tolist()]


def test_next_token_example_takes_the_tokens_that_lie_beside_the_weights(run, workdir):
    random_weights(workdir / "model", GPTConfig(1, 1, 4, 4, 3))
    meta = {"tokenizer": "char", "vocab_size": 3, "dtype": "uint16", "itos": ["a", "b", "ö"]}
    (workdir / "model" / "meta.json").write_text(json.dumps(meta))
    done = run("examples/gpt2_next_token.py", "--model=model", "--text=öb")
    assert "'öb' is 2 tokens: [2, 1]" in done.stdout
    assert sorted(re.findall(r"% +(\d)  '(.)'$", done.stdout, re.M)) == [("0", "a"), ("1", "b"), ("2", "ö")]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model=gpt3"], "'gpt3' is neither a GPT-2 nor a directory"),
        (["--model=model", "--text="], "text has 0 tokens"),
        (["--model=model", "--text=a b c d e f"], "text has 6 tokens; the model takes 1 to 4"),
        (["--model=model", "--text=Hello world"], "knows 9 tokens only"),
    ],
)
def test_mistake_in_the_next_token_example_is_one_line(run, workdir, args, expected):
    needs_gpt2_tokenizer()
    random_weights(workdir / "model", GPTConfig(1, 1, 4, 4, 9))
    done = run("examples/gpt2_next_token.py", *args, expect=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and expected in line


def test_comparison_without_transformers_says_what_to_install(run, workdir):
    (workdir / "none" / "torch").mkdir(parents=True)
    (workdir / "none" / "torch" / "__init__.py").write_text("raise ImportError(name='torch')")
    done = run("examples/compare_with_transformers.py", expect=2, PYTHONPATH=str(workdir / "none"))
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch is missing: pip install torch")


# ----------------------------------------------------------------------------------------------------------------------
# the check of an accelerator


def test_accelerator_check_without_one_is_one_line(run):
    done = run("test_jax_transformer.py", "--accelerator=True", JAX_PLATFORMS="cpu")
    (line,) = done.stdout.splitlines()[1:]  # after the line that every option given gets
    assert line.startswith("no accelerator: JAX sees only a CPU") and done.stderr == ""


@pytest.mark.usefixtures("exact_and_quick")
def test_accelerator_checks_pass_on_a_cpu_and_fail_where_the_arithmetic_is_coarser():
    (cpu, *_) = jax.devices("cpu")
    for check in test_jax_transformer.ACCELERATOR_CHECKS:
        check(cpu)
    with pytest.raises(AssertionError, match=r"^bfloat16: gradient\S* is off by"):
        test_jax_transformer.check_against_cpu(cpu, test_jax_transformer.WIDE, "bfloat16", 1e-4)
