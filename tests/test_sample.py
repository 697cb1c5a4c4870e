"""The sampler as its users meet it.

python -m pytest tests/test_sample.py
"""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_checkpoint
from jax_train_utils import make_mesh, replicated
from jax_transformer import GPTConfig, abstract_params, forward


def samples(stdout: str, prompt: str) -> list[str]:
    """The texts after the prompt, in nanoGPT's form: each followed by a line of dashes."""
    *texts, rest = stdout[stdout.index(prompt) :].split("\n---------------\n")
    assert rest == ""
    assert all(text.startswith(prompt) for text in texts)
    return [text.removeprefix(prompt) for text in texts]


def test_samples_are_text_of_the_vocabulary_in_nanogpts_form(run, workdir, finished):
    shutil.rmtree(workdir / "data")  # the codec is in the checkpoint
    done = run("sample_jax.py", "--out_dir=finished", "--start=the cat", "--num_samples=3", "--max_new_tokens=40")
    texts = samples(done.stdout[done.stdout.index("= 40") :], "the cat")
    assert [len(text) for text in texts] == [40, 40, 40]  # well past the window of 16 tokens
    assert len(set(texts)) == 3
    assert set("".join(texts)) <= set("the cat sat on a mat and dog ran to my house")


def test_a_sample_depends_on_seed_and_row_only(run, finished):
    def draw(*args: str) -> list[str]:
        common = ("--out_dir=finished", "--start=a dog", "--max_new_tokens=20")
        return samples(run("sample_jax.py", *common, *args).stdout.split("Overriding")[-1], "a dog")

    two = draw("--num_samples=2")
    assert draw("--num_samples=4")[:2] == two
    assert draw("--num_samples=2", "--seed=5") != two
    assert len(set(draw("--num_samples=2", "--top_k=1"))) == 1  # only the likeliest: no chance left


def test_greedy_continuation_is_the_argmax_of_the_forward_pass(run, workdir, finished):
    (workdir / "prompt.txt").write_text("the house ran to my mat and")  # longer than the window
    done = run("sample_jax.py", "--out_dir=finished", "--start=FILE:prompt.txt", "--temperature=0", "--num_samples=1",
               "--max_new_tokens=30")  # fmt: skip
    assert "the prompt has 27 tokens: only the last 16 fit in the model's window" in done.stdout
    (text,) = samples(done.stdout.split("window\n")[-1], "the house ran to my mat and")

    step_dir, _ = jax_checkpoint.find(finished)
    meta = jax_checkpoint.read_meta(step_dir)
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


def test_padded_vocabulary_is_never_sampled(run, workdir, finished, environment):
    """A model of 50304 rows knows 50257 tokens. Here: 15 rows, of which the codec is told it has 14."""
    import json

    step_dir = finished / "checkpoints" / "20"
    path = step_dir / "meta" / "metadata"
    meta = json.loads(path.read_text())
    dropped = meta["codec"]["itos"].pop()
    meta["codec"]["vocab_size"] -= 1
    path.write_text(json.dumps(meta))
    jax_checkpoint.write_manifest(step_dir)
    done = run("sample_jax.py", "--out_dir=finished", "--start=a", "--temperature=5", "--top_k=0", "--num_samples=5")
    texts = samples(done.stdout.split("num_samples = 5\n")[-1], "a")
    assert len("".join(texts)) == 5 * 500 and dropped not in "".join(texts)


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
    ],
)
def test_mistake_is_one_line_and_exit_2(run, finished, args, expected):
    done = run("sample_jax.py", "--out_dir=finished", *args, expect=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and re.search(expected, line), line
