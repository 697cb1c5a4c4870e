"""The sampler as its users meet it.

python -m pytest tests/test_sample.py
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_checkpoint
import jax_codec
import jax_manifest
import jax_run_dir
import sample_jax
from jax_train_utils import make_mesh, replicated
from jax_transformer import GPTConfig, abstract_params, forward, init_params
from jax_weights import save_hf
from tests.running import QUICKLY

ROOT = Path(__file__).resolve().parents[1]


def samples(stdout: str, prompt: str) -> list[str]:
    """The texts after the prompt, in nanoGPT's form: each followed by a line of dashes."""
    *texts, rest = stdout[stdout.index(prompt) :].split("\n---------------\n")
    assert rest == ""
    assert all(text.startswith(prompt) for text in texts)
    return [text.removeprefix(prompt) for text in texts]


def test_samples_are_text_of_the_vocabulary_in_nanogpts_form(quick, workdir, finished):
    shutil.rmtree(workdir / "data")  # the codec is in the checkpoint
    done = quick("sample_jax.py", "--out_dir=finished", "--start=the cat", "--num_samples=3", "--max_new_tokens=40")
    texts = samples(done.stdout[done.stdout.index("= 40") :], "the cat")
    assert [len(text) for text in texts] == [40, 40, 40]  # well past the window of 16 tokens
    assert len(set(texts)) == 3
    assert set("".join(texts)) <= set("the cat sat on a mat and dog ran to my house")


@pytest.mark.slow
def test_a_sample_depends_on_seed_and_row_only(quick, finished):
    def draw(*args: str) -> list[str]:
        common = ("--out_dir=finished", "--start=a dog", "--max_new_tokens=20")
        return samples(quick("sample_jax.py", *common, *args).stdout.split("Overriding")[-1], "a dog")

    two = draw("--num_samples=2")
    assert draw("--num_samples=4")[:2] == two
    assert draw("--num_samples=2", "--seed=5") != two
    assert len(set(draw("--num_samples=2", "--top_k=1"))) == 1  # only the likeliest: no chance left


def test_greedy_continuation_is_the_argmax_of_the_forward_pass(quick, workdir, finished):
    (workdir / "prompt.txt").write_text("the house ran to my mat and")  # longer than the window
    done = quick("sample_jax.py", "--out_dir=finished", "--start=FILE:prompt.txt", "--temperature=0", "--num_samples=1",
               "--max_new_tokens=30")  # fmt: skip
    assert "the longest prompt has 27 tokens: only the last 16 fit in the model's window\n" in done.stderr
    (text,) = samples(done.stdout, "the house ran to my mat and")

    step_dir, _ = jax_run_dir.find_checkpoint(finished)
    meta = jax_run_dir.read_meta(step_dir)
    config = GPTConfig(**meta["model"])
    sharding = replicated(make_mesh(jax.devices()[:1]))
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), abstract_params(config))
    params = jax_checkpoint.restore(step_dir, {"params": wanted})["params"]
    itos = meta["codec"]["itos"]
    ids = [itos.index(c) for c in "the house ran to my mat and"]
    for _ in range(30):  # nanoGPT's way: the last block_size tokens through the model, again and again
        window_BT = jnp.array([ids[-config.block_size :]])
        ids.append(int(np.argmax(forward(params, window_BT, config)[0, -1])))
    assert text == "".join(itos[i] for i in ids[27:])


def test_padded_vocabulary_is_never_sampled(quick, workdir, finished, environment):
    """A model of 50304 rows knows 50257 tokens. Here: 15 rows, of which the codec is told it has 14."""
    import json

    step_dir = finished / "checkpoints" / "20"
    path = step_dir / "meta" / "metadata"
    meta = json.loads(path.read_text())
    dropped = meta["codec"]["itos"].pop()
    meta["codec"]["vocab_size"] -= 1
    path.write_text(json.dumps(meta))
    jax_manifest.write_manifest(step_dir)
    done = quick(
        "sample_jax.py", "--out_dir=finished", "--start=a", "--temperature=5", "--top_k=None", "--num_samples=5"
    )
    texts = samples(done.stdout.split("num_samples = 5\n")[-1], "a")
    assert len("".join(texts)) == 5 * 500 and dropped not in "".join(texts)


def test_stream_prints_the_same_samples(quick, workdir, finished):
    (workdir / "prompts.txt").write_text("the cat\n\nmy dog ran to the house and\n")
    common = ("--out_dir=finished", "--start=FILE:prompts.txt", "--prompt_per_line=True", "--num_samples=2",
              "--max_new_tokens=30", "--stop=['at', 'og', ' ']", "--top_p=0.9", "--min_p=0.01")  # fmt: skip
    batch, streamed = quick("sample_jax.py", *common), quick("sample_jax.py", *common, "--stream=True")
    printed = batch.stdout.split("min_p = 0.01\n")[-1]
    texts = printed.split("\n---------------\n")
    assert len(texts) == 5 and texts[-1] == ""
    assert [text.startswith("the cat") for text in texts[:4]] == [True, True, False, False]
    assert all(text.startswith("my dog ran to the house and") for text in texts[2:4])
    assert not any(stop in text[7:] for text in texts[:2] for stop in ("at", "og", " "))
    assert streamed.stdout.split("stream = True\n")[-1] == printed
    for done in (batch, streamed):
        assert re.search(r"^\d+ new tokens in \d+\.\d\d s", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_has_enough_is_one_line(workdir, finished, environment, stream):
    command = [sys.executable, str(ROOT / "sample_jax.py"), "--out_dir=finished", f"--stream={stream}"]
    process = subprocess.Popen(
        [*command, "--start=a", "--max_new_tokens=400"], cwd=workdir, env=environment | QUICKLY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = [line for line in process.stderr.read().splitlines() if "tokens" not in line]
    assert process.wait() == 1 and errors == ["error: [Errno 32] Broken pipe"]


def test_no_new_tokens_print_the_prompt(quick, finished):
    done = quick("sample_jax.py", "--out_dir=finished", "--start=a cat", "--num_samples=1", "--max_new_tokens=0")
    assert done.stdout.endswith("max_new_tokens = 0\na cat\n---------------\n")


@pytest.mark.parametrize("stops", [[], ["né"], ["x", "€ "], ["aé€"], ["\U0001f600!", "\U0001f600"]])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 100])
def test_streamed_text_is_the_whole_text_byte_for_byte(tokens, stops):
    codec = jax_codec.make_codec({"tokenizer": "bytes", "vocab_size": 256, "dtype": "uint16"})
    prompts = [codec.encode("né "), codec.encode("x")]
    wholes = ["aé€ \U0001f600 né\ufffd€x", "ok\U0001f600!" + "é" * 9]
    rows = [codec.encode(text) for text in wholes]
    rows[0] += [0xE2, 0x82]  # the model stopped amid a character
    chunks = ([row[i : i + tokens] for row in rows] for i in range(0, max(map(len, rows)), tokens))

    seen: list[list[str]] = [[], []]
    for texts in sample_jax.texts_so_far(chunks, prompts, codec, stops):
        for steps, text in zip(seen, texts, strict=True):
            assert text.startswith(steps[-1] if steps else "")  # what was shown stays
            steps.append(text)
    for steps, prompt, whole in zip(seen, ["né ", "x"], [wholes[0] + "\ufffd", wholes[1]], strict=True):
        ends = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
        assert steps[-1] == prompt + whole[: min(ends)[1] if ends else None]
    if tokens == 1 and not stops:
        assert not any(text.endswith("\ufffd") for text in seen[0][:-1])  # never half a character


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", []), ("a", ["a"]), ("[x", ["[x"]), ("['a', \"b\"]", ["a", "b"]), ('["\\n\\n"]', ["\n\n"])],
)
def test_stop_is_a_text_or_a_list_of_them(text, expected):
    assert sample_jax.stop_strings(text) == expected


def test_sampling_from_weights_that_are_not_a_runs(quick, workdir):
    """Weights in transformers' form, and a tokenizer whose ids are the characters' numbers."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=50257, bias=True)
    save_hf(init_params(config, jax.random.key(0)), config, workdir / "some" / "folder")
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=200, bias=True)
    save_hf(init_params(config, jax.random.key(0)), config, workdir / "small")
    (workdir / "tiktoken.py").write_text(TIKTOKEN_STAND_IN)
    common = ("sample_jax.py", "--start=Hi", "--num_samples=2", "--max_new_tokens=5")
    done = quick(*common, "--init_from=some/folder", PYTHONPATH=str(workdir))
    assert [len(text) for text in samples(done.stdout.split("some/folder\n")[-1], "Hi")] == [5, 5]
    refused = quick(*common, "--init_from=nowhere", PYTHONPATH=str(workdir), expect=2)
    assert refused.stderr.startswith("error: 'nowhere' is neither a GPT-2 nor a directory or file that is there")
    assert refused.stderr.count("\n") == 1
    refused = quick(*common, "--init_from=small", PYTHONPATH=str(workdir), expect=2)
    assert refused.stderr == (
        "error: small has a vocabulary of 200, and the gpt2 tokenizer one of 50257: put the meta.json or meta.pkl of "
        "its training data beside the weights\n"
    )


def test_an_exported_char_model_is_sampled_with_its_own_characters(quick, workdir, finished):
    nothing = {"TIKTOKEN_CACHE_DIR": str(workdir / "empty"), "HTTPS_PROXY": "http://127.0.0.1:9"}  # no GPT-2 tokenizer
    quick("export_jax.py", "--out_dir=finished", "--hf_dir=mine")
    common = ("sample_jax.py", "--start=the cat", "--num_samples=3", "--max_new_tokens=20")
    exported = quick(*common, "--init_from=mine", **nothing)
    texts = samples(exported.stdout.split("= 20\n")[-1], "the cat")
    assert texts == samples(quick(*common, "--out_dir=finished").stdout.split("= 20\n")[-1], "the cat")
    one_file = quick(*common, "--init_from=mine/model.safetensors", **nothing)
    assert samples(one_file.stdout.split("= 20\n")[-1], "the cat") == texts
    refused = quick(*common, "--init_from=data", **nothing, expect=2)  # before the tokenizer is asked for
    assert refused.stderr.startswith("error: data has no config.json") and refused.stderr.count("\n") == 1
    (workdir / "mine" / "meta.json").write_text('{"tokenizer": "char"')
    refused = quick(*common, "--init_from=mine", expect=2)
    assert refused.stderr.startswith("error: mine/meta.json cannot be read") and refused.stderr.count("\n") == 1


TIKTOKEN_STAND_IN = """
class Encoding:
    def encode(self, text, allowed_special): return [ord(c) for c in text]
    def decode(self, ids): return "".join(map(chr, ids))

def get_encoding(name): return Encoding()
"""


def test_gpt2s_tokenizer_offline_and_not_in_the_cache_is_one_line_that_says_how_to_fill_it(run, workdir):
    # where nobody listens: the connection is refused at once, as without a network
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = run("sample_jax.py", "--init_from=gpt2", TIKTOKEN_CACHE_DIR=str(workdir / "empty"), **nowhere, expect=2)
    (line,) = done.stderr.splitlines()
    assert "the gpt2 tokenizer could not fetch its two files" in line and "TIKTOKEN_CACHE_DIR=DIR python -c" in line


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--start=THE ö"], r"--start=THE ö: characters that are not in the vocabulary of 15: 'E', 'H', 'T', 'ö'"),
        (["--start="], "start is empty"),
        (["--start=FILE:none.txt"], r"start=FILE:none.txt: none.txt cannot be read"),
        (["--out_dir=nowhere"], "no checkpoint that verifies in nowhere/checkpoints"),
        (["--checkpoint=11"], "no checkpoint of step 11 in finished; there are: 10, 20"),
        (["--temperature=-1"], "temperature"),
        (["--temprature=1"], "temprature.*temperature"),
        (["--start=a", "--device=tpu"], "device=tpu"),
        (["--top_k=0"], "--top_k=0: top_k must be an int of at least 1 or None, not 0"),
        (["--top_p=0"], "--top_p=0: top_p must be a float of above 0 and at most 1 or None"),
        (["--top_p=1.01"], "--top_p=1.01: top_p must be a float of above 0 and at most 1 or None"),
        (["--min_p=-0.5"], "--min_p=-0.5: min_p must be a float of at least 0"),
        (["--max_new_tokens=-1"], "max_new_tokens must be an int of at least 0"),
        (["--stop=['a', '']"], "must be a text, or a list of texts that are not empty"),
        (["--start=a", "--prompt_per_line=True"], "prompt_per_line=True is for --start=FILE:path"),
        (["--start=FILE:blank.txt", "--prompt_per_line=True"], "blank.txt has no line with a prompt"),
        (["--init_from=gpt2", "--checkpoint=best"], "--checkpoint=best: checkpoint is for --init_from=resume"),
    ],
)
def test_mistake_is_one_line_and_exit_2(run, workdir, finished, args, expected):
    (workdir / "blank.txt").write_text("\n  \n")
    done = run("sample_jax.py", "--out_dir=finished", *args, expect=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and re.search(expected, line), line
