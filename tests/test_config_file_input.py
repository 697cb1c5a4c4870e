"""Config files as people write them, and what is said about bad ones (configurator.py).

python -m pytest tests/test_config_file_input.py
"""

import contextlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
from tests.parsing import ROOT, Plain, bad, good, run
from train_jax import TrainConfig

# ---- config files: accepted


def test_a_config_file_may_do_what_nanogpts_do(write_config):
    path = write_config(
        "# comment\n"
        "import time\n"
        "from math import pi\n"
        "from pathlib import Path\n"
        "wandb_run_name = 'ft-' + str(time.time())\n"
        "gradient_accumulation_steps = 5 * 8\n"
        "batch_size: int = 8\n"
        "_tokens = batch_size * block_size\n"
        "def per_update(): return _tokens * gradient_accumulation_steps\n"
        "max_iters = int(1e9 // per_update())\n"
        "lr_decay_iters = max_iters\n"
        "learning_rate = 1\n"
        "warmup_iters = 1e2\n"
        "class Helper: pass\n"
    )
    config = good(TrainConfig, [path])
    assert config.wandb_run_name.startswith("ft-1")
    assert config.gradient_accumulation_steps == 40
    assert config.max_iters == config.lr_decay_iters == 10**9 // (8 * 1024 * 40)
    assert config.learning_rate == 1.0 and type(config.learning_rate) is float
    assert config.warmup_iters == 100 and type(config.warmup_iters) is int


def test_a_later_file_reads_and_overrides_an_earlier_one(write_config):
    first, second = (
        write_config("batch_size = 3\nblock_size = 7", "a.py"),
        write_config("batch_size = batch_size * 2", "b.py"),
    )
    config = good(TrainConfig, [first, second])
    assert (config.batch_size, config.block_size) == (6, 7)
    assert good(TrainConfig, [second, first]).batch_size == 3


def test_a_file_may_run_another_file(write_config):
    base = write_config("batch_size = 3", "base.py")
    config, sources = configurator.parse_with_sources(
        TrainConfig, [write_config(f"exec(open({base!r}).read())\nblock_size = batch_size * 2", "b.py")], quiet=True
    )
    assert (config.batch_size, config.block_size) == (3, 6)
    assert set(sources) == {"batch_size", "block_size"}


def test_a_file_saved_with_a_byte_order_mark_is_read(write_config):
    assert good(TrainConfig, [write_config("\ufeffbatch_size = 5")]).batch_size == 5


def test_a_global_statement_in_a_function_counts(write_config):
    path = write_config("def go():\n    global batch_size\n    batch_size = 5\ngo()")
    assert good(TrainConfig, [path]).batch_size == 5


@pytest.mark.parametrize("order", [0, 1])
def test_a_flag_wins_over_a_file_wherever_it_stands(write_config, order):
    path = write_config("batch_size = 3\nblock_size = 8\nmax_iters = batch_size")
    argv = ["--batch_size=32", path] if order else [path, "--batch_size=32"]
    config, _, out, _ = run(TrainConfig, argv)
    assert (config.batch_size, config.block_size) == (32, 8)
    assert config.max_iters == 3  # files do not see flags
    assert ("note: " in out) == bool(order)


def test_the_override_lines_are_nanogpts(write_config):
    path = write_config("batch_size = 3 # why\n")
    _, _, out, _ = run(TrainConfig, [path, "--learning_rate=1e-3", "--out_dir='x'"])
    assert out == (
        f"Overriding config with {path}:\nbatch_size = 3 # why\n\n"
        "Overriding: learning_rate = 0.001\nOverriding: out_dir = x\n"
    )


def test_quiet_prints_nothing(write_config, capsys):
    configurator.parse_with_sources(TrainConfig, [write_config("batch_size = 3"), "--seed=1"], quiet=True)
    assert capsys.readouterr() == ("", "")


@given(st.builds(Plain, name=st.text(), count=st.integers(), rate=st.floats(), flag=st.booleans()))
@settings(max_examples=50, deadline=None)
def test_what_print_sources_prints_is_a_config_file(tmp_path_factory, plain):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        configurator.print_sources(plain, {})
    path = tmp_path_factory.mktemp("printed") / "c.py"
    path.write_text(out.getvalue(), encoding="utf-8")
    assert repr(good(Plain, [str(path)])) == repr(plain)


# ---- config files: rejected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learnin_rate = 1e-3", ["learnin_rate", "'learning_rate'"]),
        ("tokens = batch_size * 2", ["tokens", "underscore"]),
        ("from pathlib import Path\nroot = Path('x')", ["root"]),
        ("batch_size = '12'", ["batch_size", "'12'"]),
        ("batch_size = 1.5", ["batch_size", "1.5"]),
        ("batch_size = True", ["batch_size", "True"]),
        ("batch_size = None", ["batch_size", "None"]),
        ("batch_size = [1,\n 2]", ["batch_size", "[1, 2]"]),
        ("batch_size = 0", ["batch_size", "at least 1"]),
        ("batch_size = float('inf')", ["batch_size", "inf"]),
        ("import time as batch_size", ["batch_size"]),
        ("def batch_size(): pass", ["batch_size"]),
        ("learning_rate = float('nan')", ["learning_rate", "nan"]),
        ("learning_rate = '1e-3'", ["learning_rate", "'1e-3'"]),
        ("dropout = 1", ["dropout", "below 1"]),
        ("compile = 1", ["compile", "True or False"]),
        ("compile = 'False'", ["compile", "True or False"]),
        ("out_dir = 3", ["out_dir", "a str"]),
        ("out_dir = None", ["out_dir", "a str"]),
        ("from pathlib import Path\nout_dir = Path('x')", ["out_dir", "a str"]),
        ("dtype = 'fp16'", ["dtype", "'fp16'", "'float16'"]),
        ("batch_size = 3\n\nfoo(bar", ["line 3", "SyntaxError"]),
        ("\nbatch_size = undefined_name", ["line 2", "NameError", "undefined_name"]),
        ("def f():\n    return 1 / 0\nf()", ["line 2", "ZeroDivisionError"]),
        ("import no_such_module_here", ["line 1", "no_such_module_here"]),
        ("raise ValueError('two\\nlines')", ["line 1", "two\\nlines"]),
        ("raise SystemExit(0)", ["line 1", "SystemExit"]),
        ("batch_size = 3\x00", [""]),
    ],
)
def test_a_bad_config_file_is_one_line_that_names_the_file(write_config, text, words):
    path = write_config(text)
    message = bad(TrainConfig, [path])
    assert path in message and all(word in message for word in words), message


def test_a_file_may_clear_only_an_optional_option(write_config):
    assert good(Plain, [write_config("top_k = None")]).top_k is None
    assert "top_k" in bad(Plain, [write_config("top_k = 0")])


def test_a_missing_file_is_named_with_its_nearest_neighbour(write_config, tmp_path, monkeypatch):
    neighbour = write_config("", "train_small.py")
    assert neighbour in bad(TrainConfig, [str(tmp_path / "train_smal.py")])
    monkeypatch.chdir(ROOT)
    assert "did you mean config/train_gpt2.py?" in bad(TrainConfig, ["train_gpt2"])
    assert "did you mean" not in bad(TrainConfig, ["zzzzzzzzzz"])


def test_a_folder_and_a_binary_file_are_one_line(tmp_path):
    (tmp_path / "b.py").write_bytes(b"\xff\xfe\x00")
    for path in (str(tmp_path), str(tmp_path / "b.py"), "", "nul\x00"):
        assert "config file" in bad(TrainConfig, [path])
