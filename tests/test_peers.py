"""Beside transformers and nanoGPT themselves, where they are installed: pip install -e ".[peers]".

python -m pytest tests/test_peers.py
NANOGPT=../nanoGPT python -m pytest tests/test_peers.py        with nanoGPT's own class, from its checkout
RUN_LARGE=1 python -m pytest tests/test_peers.py               with a model of GPT-2's size, too

fixtures/weights/ holds for every suite what these two say of one small model; here are more shapes, and the way back.
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import export_jax
import jax_codec
import jax_data
from jax_transformer import GPT2_SIZES, GPTConfig, abstract_params, cross_entropy, forward
from jax_weights import load_weights, save_hf

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[peers]'")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHAPES = [  # n_layer, n_head, n_embd, n_positions, vocab_size
    (2, 4, 32, 64, 97),
    (1, 1, 8, 3, 5),
    (3, 5, 40, 16, 211),
    (12, 2, 16, 24, 64),  # layers "10" and "11" sort before "2"
]


def widened(module, seed: int = 0, std: float = 0.12):
    """The module with every tensor random: fresh biases are 0 and gains 1, which hides mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(std * torch.randn_like(parameter) + (parameter.ndim == 1 and name.endswith("weight")))
    return module.eval()


def gpt2(shape: tuple[int, ...], **options):
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    config = transformers.GPT2Config(
        **dict(zip(names, shape, strict=True)), bos_token_id=None, eos_token_id=None, **options
    )
    return widened(transformers.GPT2LMHeadModel(config))


def ids_for(shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, shape[4], (3, shape[3] + 1), dtype=np.int32)


def their_logits_and_loss(model, ids_BT: np.ndarray) -> tuple[np.ndarray, float]:
    ids = torch.tensor(ids_BT, dtype=torch.long)
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.float()
    return logits.numpy(), torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def our_logits_and_loss(path: Path, ids_BT: np.ndarray) -> tuple[np.ndarray, float]:
    params, config = load_weights(path)
    logits_BTV = jax.jit(forward, static_argnums=2)(params, jnp.asarray(ids_BT[:, :-1]), config)
    return np.asarray(logits_BTV), float(cross_entropy(logits_BTV, jnp.asarray(ids_BT[:, 1:])).mean())


def assert_agree(path: Path, model, ids_BT: np.ndarray, atol: float) -> None:
    (ours_BTV, our_loss), (theirs_BTV, their_loss) = (
        our_logits_and_loss(path, ids_BT),
        their_logits_and_loss(model, ids_BT),
    )
    assert np.abs(theirs_BTV).max() > 0.1  # there is something to differ
    np.testing.assert_allclose(ours_BTV, theirs_BTV, atol=atol, rtol=0)
    assert our_loss == pytest.approx(their_loss, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_and_loss_are_transformers_own_in_several_shapes(tmp_path, shape, activation):
    model = gpt2(shape, activation_function=activation)
    model.save_pretrained(tmp_path)
    assert_agree(tmp_path, model, ids_for(shape), 1e-5)


@pytest.mark.parametrize("layout", ["sharded", "untied but equal", "zip", "legacy", "float16", "bfloat16"])
def test_logits_and_loss_are_transformers_own_in_every_layout(tmp_path, layout):
    shape = SHAPES[0]
    model = gpt2(shape, tie_word_embeddings=layout != "untied but equal")
    if layout in ("float16", "bfloat16"):
        model = model.to(getattr(torch, layout))
    if layout == "untied but equal":
        with torch.no_grad():
            model.lm_head.weight.copy_(model.transformer.wte.weight)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if layout == "sharded" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (layout == "sharded")
    if layout in ("zip", "legacy"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "zip")
    assert_agree(tmp_path, model.float(), ids_for(shape), 1e-5)


def test_head_of_its_own_goes_in_and_out(tmp_path):
    model = gpt2(SHAPES[0], tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "theirs")
    assert_agree(tmp_path / "theirs", model, ids_for(SHAPES[0]), 1e-5)
    save_hf(*load_weights(tmp_path / "theirs"), tmp_path / "ours")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert_agree(tmp_path / "ours", again, ids_for(SHAPES[0]), 1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_export_gives_transformers_the_same_model_and_comes_back_bit_for_bit(tmp_path, bias, gelu):
    random = np.random.default_rng(0)
    config = GPTConfig(3, 2, 24, 20, 67, bias=bias, gelu=gelu)
    params = jax.tree.map(lambda a: 0.3 * random.standard_normal(a.shape, np.float32), abstract_params(config))
    save_hf(params, config, tmp_path / "ours")
    model, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_agree(tmp_path / "ours", model.eval(), ids_for((3, 2, 24, 20, 67)), 1e-5)
    model.save_pretrained(tmp_path / "theirs")
    loaded, found = load_weights(tmp_path / "theirs")
    assert found == config  # also bias: transformers keeps the flag
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), loaded, params)
    assert jax.tree.all(same)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_exported_tokenizer_encodes_as_tiktoken(tmp_path):
    try:
        files = export_jax.gpt2_tokenizer_files()
    except jax_data.DataError as error:
        pytest.skip(str(error))
    save_hf(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), abstract_params(GPTConfig(1, 1, 2, 8, 50257))),
            GPTConfig(1, 1, 2, 8, 50257), tmp_path, eos_token_id=50256)  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    codec = jax_codec.make_codec(None)
    random = np.random.default_rng(0)
    strange = "".join(map(chr, [*random.integers(1, 0xD800, 3000), *random.integers(0xE000, 0x1FFFF, 3000)]))
    code = Path(export_jax.__file__).read_text(encoding="utf-8")
    texts = ["Hello world", " it's 1234  \n\n\t x", "a<|endoftext|>b", code, strange]
    for tokenizer in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")),
    ):
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert ids == codec.encode(text)
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.eos_token_id == 50256


def nanogpt_module():
    folder = os.environ.get("NANOGPT")
    if not folder:
        pytest.skip("NANOGPT is not set to a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpts_checkpoint_gives_nanogpts_logits(tmp_path, bias, prefix):
    nanogpt = nanogpt_module()
    args = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": bias, "vocab_size": 65, "dropout": 0.2}
    model = widened(nanogpt.GPT(nanogpt.GPTConfig(**args)))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    ids_BT = ids_for((3, 4, 32, 24, 65))
    x, y = (torch.tensor(ids, dtype=torch.long) for ids in (ids_BT[:, :-1], ids_BT[:, 1:]))
    model(x, y)[1].backward()
    optimizer.step()
    saved = {"model": {prefix + name: tensor for name, tensor in model.state_dict().items()}, "model_args": args,
             "optimizer": optimizer.state_dict(), "iter_num": 1, "best_val_loss": torch.tensor(3.0),
             "config": {"device": "cpu", "learning_rate": 1e-3, "compile": True}}  # fmt: skip
    torch.save(saved, tmp_path / "ckpt.pt")
    logits, loss = model(x, y)
    ours_BTV, our_loss = our_logits_and_loss(tmp_path / "ckpt.pt", ids_BT)
    np.testing.assert_allclose(ours_BTV, logits.detach().numpy(), atol=1e-5)
    assert our_loss == pytest.approx(loss.item(), rel=1e-6)


def test_comparison_example_prints_a_row_for_each_batch_and_fails_on_a_miss(run, workdir):
    done = run("examples/compare_with_transformers.py", "--batches=3", "--model=random")
    assert len(re.findall(r"^ +\d +\d\.\d\de-0\d", done.stdout, re.M)) == 3
    assert "✓ 3 of 3 batches within 0.0001" in done.stdout
    done = run("examples/compare_with_transformers.py", "--batches=3", "--model=random", "--tolerance=0", expect=1)
    assert "✗ 0 of 3 batches within 0\n" in done.stdout
    gpt2(SHAPES[0]).save_pretrained(workdir / "model")
    run("examples/compare_with_transformers.py", "--batches=2", "--model=model", "--tokens=1000")
    broken = json.loads((workdir / "model" / "config.json").read_text()) | {"bos_token_id": 5}
    (workdir / "model" / "config.json").write_text(json.dumps(broken | {"n_embd": 64}))
    done = run("examples/compare_with_transformers.py", "--model=model", expect=2)
    assert done.stderr.startswith("error: model does not fit") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not os.environ.get("RUN_LARGE"), reason="RUN_LARGE is not set: 500 MB of weights, a minute")
def test_logits_of_gpt2s_shape_are_transformers_own(tmp_path):
    size = GPT2_SIZES["gpt2"]
    shape = (size.n_layer, size.n_head, size.n_embd, size.block_size, size.vocab_size)
    model = widened(transformers.GPT2LMHeadModel(transformers.GPT2Config()), std=0.05)
    model.save_pretrained(tmp_path)
    assert load_weights(tmp_path)[1] == size
    assert_agree(tmp_path, model, ids_for(shape)[:1, :129], 1e-4)
