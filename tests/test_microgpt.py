"""The teaching programs in JAX: equal to the pure-Python microGPT, and to each other. MLX: tests/test_microgpt_mlx.py.

python -m pytest tests/test_microgpt.py
"""

import functools
import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.running import QUICKLY

pytestmark = pytest.mark.usefixtures("exact_and_quick")

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROGRAMS = ["jax", "jax_batched", "mlx", "mlx_batched"]
NAMES_TXT = [ROOT / "microgpt" / "names.txt", ROOT.parent / "shared" / "data" / "names.txt"]  # not in the repository
FEW_NAMES = ["emma", "olivia", "ava", "zoe", "maximiliana", "bo", "jacqueline", "kit", LETTERS[:15], LETTERS[:16]]


def load(path: Path) -> Any:
    """A Python file as a module, by its path: four of them are named main.py."""
    spec = importlib.util.spec_from_file_location("_".join(path.relative_to(ROOT).with_suffix("").parts), path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load_program(name: str) -> Any:
    if name.startswith("mlx"):
        pytest.importorskip(
            "mlx.core", reason="no MLX here: pip install -r microgpt/mlx/requirements.txt", exc_type=ImportError
        )
    return load(ROOT / "microgpt" / name / "main.py")


oracle = load(ROOT / "tests" / "fixtures" / "microgpt.py")
single, batched = load_program("jax"), load_program("jax_batched")
FIXTURE = json.loads(oracle.FILE.read_text())


def names_of_the_fixture() -> list[str]:
    """As good as names.txt for 1000 steps with seed 42: the names that these come to stand where they stand there."""
    docs = ["anna"] * FIXTURE["num_docs"]
    order, _ = oracle.shuffled(range(len(docs)), 42)
    for place, name in zip(order, FIXTURE["docs"].split(), strict=False):
        docs[place] = name
    return docs


@pytest.fixture
def names_txt(tmp_path: Path) -> Path:
    (tmp_path / "names.txt").write_text("\n".join(names_of_the_fixture()))
    return tmp_path / "names.txt"


@pytest.fixture
def few_names(tmp_path: Path) -> Path:
    (tmp_path / "few.txt").write_text("\n".join(FEW_NAMES) + "\n\n")
    return tmp_path / "few.txt"


def run_main(module: Any, monkeypatch: pytest.MonkeyPatch, *args: str) -> list[float]:
    """module.main() as the command line starts it; the losses as they were, not as they are printed."""
    kept: list[float] = []

    def train(*arguments: Any) -> Any:
        params, losses = plain_train(*arguments)
        kept.extend(losses)
        return params, losses

    plain_train = module.train
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", train)
        patch.setattr(sys, "argv", ["main.py", *args])
        module.main()
    return kept


def printed_losses(out: str) -> list[tuple[int, str]]:
    return [(int(step), loss) for step, loss in re.findall(r"step +(\d+) / +\d+ \| loss (\d+\.\d{4})(?=\s)", out)]


def printed_names(out: str) -> list[str]:
    names = re.findall(r"^sample +(\d+): (.*)$", out, re.MULTILINE)
    assert [int(i) for i, _ in names] == list(range(1, len(names) + 1))
    return [name for _, name in names]


def random_params(module: Any) -> dict[str, jax.Array]:
    """Weights wide enough for every part of the model to matter."""
    params = module.init_params(jax.random.key(0), 27)
    return {name: 8 * p / module.N_EMBD**0.5 for name, p in params.items()}


batch_grad, single_grad = (jax.jit(jax.value_and_grad(module.loss_fn)) for module in (batched, single))


# ----------------------------------------------------------------------------------------------------------------------
# the algorithm


def test_reference_losses_and_names_are_those_of_the_pure_python_program(names_txt, monkeypatch, capsys):
    losses = run_main(single, monkeypatch, f"--input={names_txt}", "--reference=True")
    out = capsys.readouterr().out
    np.testing.assert_allclose(losses, FIXTURE["losses"], rtol=0, atol=1e-5)
    assert printed_names(out) == FIXTURE["names"].split()
    assert printed_losses(out) == [(i + 1, f"{loss:.4f}") for i, loss in enumerate(losses)]
    assert out.startswith("num docs: 32033\nvocab size: 27\nnum params: 4192\n")
    assert "step 1000 / 1000 | loss 2.6497\r\n--- inference (new, hallucinated names) ---\nsample  1: kamon\n" in out


def test_the_fixture_is_what_its_recipe_makes():
    first = list(itertools.islice(oracle.microgpt(names_of_the_fixture(), 42, 1000, 20), 5))
    assert first == FIXTURE["losses"][:5]


@pytest.mark.parametrize(("seed", "steps"), [(0, 30), (7, 33), (1337, 41)])  # also where the last ten are fewer
def test_reference_agrees_with_the_oracle_for_other_seeds_and_documents(seed, steps, few_names, monkeypatch, capsys):
    # a vocabulary, and a name that is too long by one letter, that names.txt has not
    args = [f"--input={few_names}", "--reference=True", f"--seed={seed}", f"--steps={steps}", "--samples=4"]
    losses = run_main(single, monkeypatch, *args)
    *expected, name1, name2, name3, name4 = oracle.microgpt(FEW_NAMES, seed, steps, 4)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    assert len(losses) == steps
    assert printed_names(capsys.readouterr().out) == [name1, name2, name3, name4]


def test_weights_are_drawn_with_a_key_for_each_matrix():
    params = single.init_params(jax.random.key(3), 27)
    assert {name: p.shape for name, p in params.items()} == {
        "wte": (27, 16), "wpe": (16, 16), "lm_head": (27, 16),
        **{f"layer0.attn_{w}": (16, 16) for w in ("wq", "wk", "wv", "wo")},
        "layer0.mlp_fc1": (64, 16), "layer0.mlp_fc2": (16, 64),
    }  # fmt: skip
    numbers = np.concatenate([np.ravel(p) for p in params.values()])
    assert abs(numbers.mean()) < 0.005 and abs(numbers.std() / 0.08 - 1) < 0.05
    assert len(set(numbers.tolist())) > 0.99 * numbers.size


def test_adam_is_adam_in_float64_and_changes_nothing_in_place():
    random = np.random.default_rng(0)
    params: Any = {"a": random.normal(size=(3, 4)), "b": {"c": random.normal(size=5)}}
    p, m, v = params["b"]["c"].copy(), np.zeros(5), np.zeros(5)
    ours: Any = jax.tree.map(jnp.float32, params)
    m_state = v_state = jax.tree.map(jnp.zeros_like, ours)
    for step in range(5):
        g, lr = random.normal(size=5), 0.01 * (1 - step / 5)
        m, v = 0.85 * m + 0.15 * g, 0.99 * v + 0.01 * g**2
        p = p - lr * (m / (1 - 0.85 ** (step + 1))) / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8)
        grads = {"a": jnp.zeros((3, 4)), "b": {"c": jnp.float32(g)}}
        before = jax.tree.map(np.array, (ours, m_state, v_state))
        new = single.adam_update(ours, grads, m_state, v_state, step, lr)
        jax.tree.map(np.testing.assert_array_equal, before, (ours, m_state, v_state))
        ours, m_state, v_state = new
        np.testing.assert_allclose(ours["b"]["c"], p, rtol=1e-5)
        np.testing.assert_allclose(m_state["b"]["c"], m, rtol=1e-5)
        np.testing.assert_allclose(v_state["b"]["c"], v, rtol=1e-5)
    np.testing.assert_array_equal(ours["a"], np.float32(params["a"]))  # no gradient, no change


@pytest.mark.parametrize("t", range(16))
def test_no_position_looks_ahead_and_each_looks_back(t):
    params, ids = random_params(single), np.arange(16)
    changed = ids.copy()
    changed[t] = 20
    before, after = (jax.jit(single.forward)(params, i) for i in (ids, changed))
    np.testing.assert_array_equal(before[:t], after[:t])
    assert (np.abs(before[t:] - after[t:]).max(axis=-1) > 1e-4).all()


def test_targets_of_minus_one_do_not_count():
    params = random_params(single)
    ids, targets = map(np.array, single.encode("olivia", LETTERS))
    assert (ids[:7].tolist(), targets[:7].tolist()) == ([26, 14, 11, 8, 21, 8, 0], [14, 11, 8, 21, 8, 0, 26])
    assert targets[7:].tolist() == [-1] * 9
    short, _ = single_grad(params, ids[:7], targets[:7])
    logits = np.asarray(single.forward(params, ids[:7]), np.float64)
    by_hand = np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(7), targets[:7]])
    np.testing.assert_allclose(short, by_hand, rtol=1e-6)
    np.testing.assert_allclose(single_grad(params, ids, targets)[0], short, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# the batch


@settings(max_examples=50, deadline=None)
@given(
    docs=st.lists(st.text("abcxyz", min_size=1, max_size=20), min_size=1, max_size=9),
    step=st.integers(0, 1000),
    batch_size=st.integers(1, 8),
)
def test_a_batch_holds_the_next_documents_padded_to_one_shape(docs, step, batch_size):
    input_ids, targets, pad_mask, target_mask = batched.make_batch(docs, step, batch_size)
    for array, kind in [(input_ids, "i"), (targets, "i"), (pad_mask, "b"), (target_mask, "f")]:
        assert array.shape == (batch_size, 16) and array.dtype.kind == kind
    np.testing.assert_array_equal(target_mask, 1 - pad_mask)
    for row in range(batch_size):
        doc = docs[(step * batch_size + row) % len(docs)]
        tokens = [26, *(LETTERS.index(c) for c in doc), 26][:17]
        n = len(tokens) - 1
        assert target_mask[row].tolist() == [1.0] * n + [0.0] * (16 - n)
        assert input_ids[row, :n].tolist() == tokens[:-1] and targets[row, :n].tolist() == tokens[1:]
        assert input_ids.min() >= 0 and max(input_ids.max(), targets.max()) <= 26


def test_the_loss_of_a_batch_is_the_mean_of_single_losses_weighted_by_length(monkeypatch):
    # the single program's own functions, on unpadded names, with the size of the batched model
    monkeypatch.setattr(single, "N_LAYER", 2)
    monkeypatch.setattr(single, "N_EMBD", 64)
    params = random_params(batched)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random_params(single))
    names = ["bo", "emma", LETTERS[:15], LETTERS[:16], "ruby"]
    loss, grads = batch_grad(params, *batched.make_batch(names, 0, len(names)))
    total: Any = 0.0, jax.tree.map(jnp.zeros_like, params)
    count = 0
    for name in names:
        tokens = np.array([26, *map(LETTERS.index, name), 26][:17])
        n = len(tokens) - 1
        one = single_grad(params, tokens[:-1], tokens[1:])
        total = jax.tree.map(lambda sum_, x, n=n: sum_ + n * x, total, one)
        count += n
    np.testing.assert_allclose(loss, total[0] / count, rtol=0, atol=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, total[1][name] / count, rtol=0, atol=1e-6, err_msg=name)


def test_padding_changes_nothing_that_counts():
    params = random_params(batched)
    input_ids, targets, pad_mask, target_mask = batched.make_batch(FEW_NAMES, 0, len(FEW_NAMES))
    loss, grads = batch_grad(params, input_ids, targets, pad_mask, target_mask)
    noise = np.random.default_rng(0).integers(0, 27, (2, *input_ids.shape))
    noisy = np.where(pad_mask, noise[0], input_ids), np.where(pad_mask, noise[1], targets)
    assert (noisy[0] != input_ids).any() and (noisy[1] != targets).any()
    for mask in (pad_mask, np.zeros_like(pad_mask)):  # what is padded lies ahead: the causal mask hides it already
        other, other_grads = batch_grad(params, *noisy, mask, target_mask)
        np.testing.assert_allclose(other, loss, rtol=0, atol=1e-6)
        for name, grad in grads.items():
            np.testing.assert_allclose(other_grads[name], grad, rtol=0, atol=1e-6, err_msg=name)
    everything = batched.loss_fn(params, *noisy, pad_mask, np.ones_like(target_mask))
    assert abs(everything - loss) > 1e-2  # so that the comparisons above can fail


def test_the_padding_mask_hides_where_the_future_does_not():
    # in the middle of a sequence, where no program puts padding, the mask is all that hides it
    params, ids = random_params(batched), np.arange(16)
    mask = np.arange(16) == 3
    changed = np.where(mask, 20, ids)
    before, after = (batched.forward_single(params, i, mask) for i in (ids, changed))
    others = np.arange(16) != 3
    np.testing.assert_array_equal(before[others], after[others])
    assert np.abs(batched.forward_single(params, changed, mask & False) - after).max() > 1e-3


def test_a_batch_of_sequences_is_each_of_them():
    params = random_params(batched)
    input_ids, _, pad_mask, _ = batched.make_batch(FEW_NAMES, 0, 8)
    logits_BTV = batched.forward_batch(params, input_ids, pad_mask)
    for row in range(8):
        one = jax.jit(batched.forward_single)(params, input_ids[row], pad_mask[row])
        np.testing.assert_allclose(logits_BTV[row], one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batched_program_reaches_the_loss_it_should(seed, monkeypatch, capsys):
    names = next((path for path in NAMES_TXT if path.exists()), None)
    if names is None:
        pytest.skip("names.txt is not here: python microgpt/jax/main.py downloads it")
    losses = run_main(batched, monkeypatch, f"--input={names}", f"--seed={seed}")
    assert len(losses) == 1000 and np.mean(losses[-100:]) <= 2.12
    out = capsys.readouterr().out
    means = [(10 * i + 10, f"{np.mean(losses[10 * i : 10 * i + 10]):.4f}") for i in range(100)]
    assert printed_losses(out) == means
    names_drawn, known = printed_names(out), set(names.read_text().split())
    assert len(set(names_drawn)) >= 18 and all(re.fullmatch("[a-z]{1,16}", name) for name in names_drawn)
    assert known & set(names_drawn)  # some of what it invents exists


# ----------------------------------------------------------------------------------------------------------------------
# the programs


@pytest.mark.parametrize("program", ["jax", "jax_batched"])
def test_the_step_is_compiled_once_whatever_the_documents(program, few_names, environment):
    # in its own folder, as a reader starts it; 45 steps are four tens and a half
    done = subprocess.run(
        [sys.executable, "main.py", f"--input={few_names}", "--steps=45", "--samples=3"],
        cwd=ROOT / "microgpt" / program, env=environment | QUICKLY | {"JAX_LOG_COMPILES": "1"},
        text=True, capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    compiled = re.findall(r"Compiling jit\((\w+)\)", done.stderr)
    assert compiled.count("train_steps") == 1
    assert len(printed_names(done.stdout)) == 3
    assert [step for step, _ in printed_losses(done.stdout)][-1] == 45


@pytest.mark.parametrize("program", PROGRAMS)
def test_importing_a_program_runs_nothing(program, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--no-such-option"])
    monkeypatch.setattr(urllib.request, "urlopen", None)
    load_program.__wrapped__(program)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_seed_says_everything(program, few_names, monkeypatch, capsys):
    module = load_program(program)

    def output(seed: int) -> str:
        run_main(module, monkeypatch, f"--input={few_names}", f"--seed={seed}", "--steps=3", "--samples=3")
        return capsys.readouterr().out

    assert output(1) == output(1) != output(2)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_steps_and_no_samples_are_possible(program, few_names, monkeypatch, capsys):
    assert run_main(load_program(program), monkeypatch, f"--input={few_names}", "--steps=0", "--samples=0") == []
    assert capsys.readouterr().out.endswith("\n--- inference (new, hallucinated names) ---\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_are_downloaded_once_and_offline_says_what_to_do(program, tmp_path, monkeypatch, capsys):
    module = load_program(program)
    assert module.NAMES == ROOT / "microgpt" / "names.txt"
    monkeypatch.setattr(module, "NAMES", tmp_path / "names.txt")

    def offline(url: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(SystemExit, match="2"):
        run_main(module, monkeypatch, "--steps=0", "--samples=0")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    for word in ("no network", module.URL, str(tmp_path / "names.txt"), "--input=FILE"):
        assert word in err

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"emma\nbo\n"))
    run_main(module, monkeypatch, "--steps=0", "--samples=0")
    assert (tmp_path / "names.txt").read_text() == "emma\nbo\n"
    assert capsys.readouterr().out.startswith("num docs: 2\nvocab size: 6\n")  # a b e m o, and BOS
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    run_main(module, monkeypatch, "--steps=0", "--samples=0")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--input=missing.txt"], ["missing.txt", "No such file"]),
        (["--input=empty.txt"], ["empty.txt is empty"]),
        (["--input=binary.txt"], ["utf-8"]),
        (["--steps=-1"], ["--steps"]),
        (["--seed=99999999999999999999"], ["--seed"]),
    ],
)
def test_bad_input_is_one_line(program, args, words, tmp_path, few_names, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match="2"):
        run_main(load_program(program), monkeypatch, f"--input={few_names}", *args)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_mark_that_some_editors_put_first_is_no_letter(program, tmp_path, monkeypatch, capsys):
    (tmp_path / "names.txt").write_text("\ufeffemma\nbo\n", encoding="utf-8")
    run_main(load_program(program), monkeypatch, f"--input={tmp_path / 'names.txt'}", "--steps=0", "--samples=0")
    assert capsys.readouterr().out.startswith("num docs: 2\nvocab size: 6\n")


# ----------------------------------------------------------------------------------------------------------------------
# the page


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(heading, code) of every Python block of a document that stands under the name of a file."""
    return re.findall(r"`(microgpt/\w+/main\.py)`[^\n]*\n+```python\n(.*?)```", text, re.DOTALL)


def test_the_lines_side_by_side_are_those_of_the_programs():
    blocks = code_blocks((ROOT / "microgpt" / "README.md").read_text())
    assert [file for file, _ in blocks] == [f"microgpt/{program}/main.py" for program in PROGRAMS]
    for file, code in blocks:
        assert len(code.splitlines()) >= 10
        assert code in (ROOT / file).read_text(), file


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_can_be_read_in_one_sitting_and_needs_nothing_of_the_rest(program):
    source = (ROOT / "microgpt" / program / "main.py").read_text()
    assert len(source.splitlines()) < 150
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)) - sys.stdlib_module_names
    assert imported == ({"mlx"} if program.startswith("mlx") else {"jax", "numpy"})


def test_requirements_of_mlx_are_the_same_everywhere():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (requirement,) = extras["mlx"]
    for program in ("mlx", "mlx_batched"):
        folder = ROOT / "microgpt" / program
        assert (folder / "requirements.txt").read_text().split("#")[0].strip() == requirement
        assert f'# dependencies = ["{requirement}"]\n' in (folder / "main.py").read_text()
