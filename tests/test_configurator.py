"""Flags, defaults, sources and help, and what is said about bad flags (configurator.py).

python -m pytest tests/test_configurator.py
"""

import ast
import math
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
import jax_console
from configurator import Between, ConfigError
from tests.parsing import ROOT, Plain, bad, good, run
from train_jax import TrainConfig

# ---- flags: accepted


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        # nanoGPT takes these
        ("--batch_size=32", "batch_size", 32),
        ("--eval_iters=1_000", "eval_iters", 1000),
        ("--eval_iters=0x10", "eval_iters", 16),
        ("--learning_rate=1e-3", "learning_rate", 1e-3),
        ("--learning_rate=.5", "learning_rate", 0.5),
        ("--out_dir=out-x", "out_dir", "out-x"),
        ("--out_dir='out-x'", "out_dir", "out-x"),
        ('--out_dir="out-x"', "out_dir", "out-x"),
        ("--out_dir=\"'123'\"", "out_dir", "'123'"),
        ("--out_dir='123'", "out_dir", "123"),
        ("--out_dir='a\\nb'", "out_dir", "a\nb"),
        ("--out_dir=\\n", "out_dir", "\\n"),
        ("--out_dir=", "out_dir", ""),
        ("--compile=False", "compile", False),
        ("--wandb_log=True", "wandb_log", True),
        ("--device=cpu", "device", "cpu"),
        ("--dtype=float16", "dtype", "float16"),
        ("--dtype='float16'", "dtype", "float16"),
        # nanoGPT refuses these, without need
        ("--out_dir=a=b", "out_dir", "a=b"),
        ("--out_dir=x = 1", "out_dir", "x = 1"),
        ("--out_dir=123", "out_dir", "123"),
        ("--out_dir=True", "out_dir", "True"),
        ("--out_dir=None", "out_dir", "None"),
        ("--out_dir=--x", "out_dir", "--x"),
        ("--out_dir=a\nb", "out_dir", "a\nb"),
        ("--out_dir='a'b'", "out_dir", "'a'b'"),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=6e-4/10", "learning_rate", 6e-4 / 10),
        ("--grad_clip=inf", "grad_clip", math.inf),
        ("--max_iters=1e3", "max_iters", 1000),
        ("--max_iters=2.0", "max_iters", 2),
        ("--max_iters=5*8", "max_iters", 40),
        ("--max_iters=2**5", "max_iters", 32),
        ("--max_iters=(1+2)*3-4//2", "max_iters", 7),
        ("--batch-size=3", "batch_size", 3),
        ("--wandb_log=true", "wandb_log", True),
        ("--wandb_log=1", "wandb_log", True),
        ("--compile=false", "compile", False),
        ("--compile=0", "compile", False),
        ("--wandb_log", "wandb_log", True),
        ("--no_compile", "compile", False),
        ("--no-compile", "compile", False),
    ],
)
def test_a_flag_sets_its_option_and_nothing_else(argument, key, value):
    config = good(TrainConfig, [argument])
    assert asdict(config) == {**asdict(TrainConfig()), key: value}
    assert type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--batch_size", "32"], {"batch_size": 32}),
        (["--min_lr", "1e-5", "--batch_size", "4"], {"min_lr": 1e-5, "batch_size": 4}),
        (["--out_dir", "a b"], {"out_dir": "a b"}),
        (["--compile", "False", "--wandb_log", "true"], {"compile": False, "wandb_log": True}),
        (["--wandb_log", "--batch_size=2"], {"wandb_log": True, "batch_size": 2}),
        (["--batch_size=1", "--batch_size=2"], {"batch_size": 2}),
    ],
)
def test_the_space_form_and_repetition(argv, expected):
    assert asdict(good(TrainConfig, argv)) == {**asdict(TrainConfig()), **expected}


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--top_k=None", "top_k", None),
        ("--top_k=5", "top_k", 5),
        ("--top_p=None", "top_p", None),
        ("--top_p=1", "top_p", 1.0),
        ("--count=-1", "count", -1),
        ("--count=-5*8", "count", -40),
        ("--rate=-1", "rate", -1.0),
        ("--level=1", "level", 1.0),
        ("--mode=exact", "mode", "exact"),
    ],
)
def test_optional_negative_and_ranged_values(argument, key, value):
    config = good(Plain, [argument])
    assert asdict(config) == {**asdict(Plain()), key: value}
    assert type(getattr(config, key)) is type(value)


def test_an_escape_that_python_remarks_on_is_taken_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert good(TrainConfig, ["--out_dir='\\d'"]).out_dir == "\\d"


def test_a_bare_bool_does_not_swallow_the_config_file_after_it(write_config):
    config = good(TrainConfig, ["--eval_only", write_config("batch_size = 3")])
    assert (config.eval_only, config.batch_size) == (True, 3)


def test_the_command_for_a_laptop_in_nanogpts_readme_runs():
    options = (
        "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
        "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    )
    config = good(TrainConfig, [str(ROOT / "config/train_shakespeare_char.py"), *options.split()])
    assert (config.device, config.compile, config.n_embd, config.dropout) == ("cpu", False, 128, 0.0)
    assert (config.dataset, config.beta2) == ("shakespeare_char", 0.99)


def nanogpt_takes(text: str, default: Any) -> tuple[bool, Any]:
    """nanoGPT's rule: a literal, otherwise the text itself; its type must be the default's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        except (TypeError, MemoryError, RecursionError):
            return False, None
    return "=" not in text and type(value) is type(default), value


LITERALS = st.one_of(
    st.integers().map(str),
    st.integers(min_value=0).map(hex),
    st.floats().map(repr),
    st.booleans().map(repr),
    st.text().map(repr),
    st.text(),
    st.text(alphabet="'\"\\n1e-_.+* ()#", max_size=8),
)


@given(key=st.sampled_from(["name", "count", "rate", "flag"]), text=LITERALS)
@settings(max_examples=300, deadline=None)
def test_what_nanogpt_accepts_has_the_same_value_here(key, text):
    accepted, value = nanogpt_takes(text, getattr(Plain(), key))
    if accepted:
        assert repr(getattr(good(Plain, [f"--{key}={text}"]), key)) == repr(value)


@given(name=st.text(), count=st.integers(), rate=st.floats(), flag=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_value_survives_being_written_as_a_flag(name, count, rate, flag):
    config = good(Plain, [f"--name={name!r}", f"--count={count}", f"--rate={rate!r}", f"--flag={flag}"])
    assert repr((config.name, config.count, config.rate, config.flag)) == repr((name, count, rate, flag))


# ---- flags: rejected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--btch_size=3"], ["--btch_size=3", "unknown", "'batch_size'"]),
        (["--btch-size=3"], ["btch-size", "'batch_size'"]),
        (["--BATCH_SIZE=3"], ["BATCH_SIZE", "'batch_size'"]),
        (["--btch_size", "3"], ["btch_size", "'batch_size'"]),
        (["--no_batch_size"], ["no_batch_size", "'batch_size'"]),
        (["--zzzzzzzz=1"], ["zzzzzzzz", "--help"]),
        (["--__name__=x"], ["__name__"]),
        (["batch_size=3"], ["--batch_size=3"]),
        (["-batch_size=3"], ["--batch_size=3"]),
        (["--batch_size"], ["batch_size", "needs a value"]),
        (["--batch_size", "--wandb_log"], ["batch_size", "needs a value"]),
        (["32"], ["32", "config file"]),
        (["-x"], ["-x", "--key=value"]),
        (["--"], ["unknown"]),
        (["--batch_size=abc"], ["--batch_size=abc", "an int", "'abc'"]),
        (["--batch_size="], ["batch_size", "an int"]),
        (["--batch_size=2.5"], ["batch_size", "2.5"]),
        (["--batch_size=True"], ["batch_size", "'True'"]),
        (["--batch_size=None"], ["batch_size", "'None'"]),
        (["--batch_size=inf"], ["batch_size", "inf"]),
        (["--batch_size=9**9**9**9"], ["batch_size"]),
        (["--batch_size=(2**1000)**1000"], ["batch_size"]),
        (["--batch_size=1/0"], ["batch_size"]),
        (["--learning_rate=(-8)**0.5"], ["learning_rate"]),
        (["--batch_size=__import__('os').getpid()"], ["batch_size"]),
        (["--batch_size=" + "(" * 5000], ["batch_size"]),
        (["--batch_size=0"], ["batch_size", "at least 1", "not 0"]),
        (["--n_embd=1" + 30 * "0"], ["n_embd", "at least 1", "below 4294967296"]),
        (["--batch_size", "0"], ["--batch_size=0", "at least 1"]),
        (["--learning_rate=nan"], ["learning_rate", "nan"]),
        (["--learning_rate=-1"], ["learning_rate", "at least 0"]),
        (["--dropout=1"], ["dropout", "below 1"]),
        (["--seed=2**32"], ["seed", "below 4294967296"]),
        (["--compile=yes"], ["compile", "True or False", "'yes'"]),
        (["--compile=2"], ["compile", "True or False"]),
        (["--dtype=fp16"], ["dtype", "'float16'", "'fp16'"]),
        (["--out_dir=a\nb", "--batch_size=c\nd"], ["batch_size", "c\\nd"]),
    ],
)
def test_a_bad_command_line_is_one_line(argv, words):
    message = bad(TrainConfig, argv)
    assert all(word in message for word in words), message


def test_an_optional_number_says_that_none_would_do():
    assert "or None" in bad(Plain, ["--top_k=x"])
    assert "at least 1" in bad(Plain, ["--top_k=0"])
    assert "at most 1" in bad(Plain, ["--level=1.5"])


ARGUMENTS = st.one_of(
    st.text(max_size=8),
    st.text(max_size=8).map("--{}".format),
    st.builds("--{}={}".format, st.sampled_from([*asdict(Plain()), "nmae", "help"]), LITERALS),
    st.sampled_from([f"--{key}" for key in asdict(Plain())]),
    st.sampled_from(["--help", "-h", "--", "-", "None", "3", "--no_flag", str(ROOT / "config/train_gpt2.py")]),
)


@given(st.lists(ARGUMENTS, max_size=4))
@settings(max_examples=300, deadline=None)
def test_no_command_line_gives_a_traceback(argv):
    config, code, out, err = run(Plain, argv)
    if config is not None:
        assert code is None and err == ""
    elif code == 0:
        assert out and err == "" and ("--help" in argv or "-h" in argv)
    else:
        assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


def test_an_objection_of_the_dataclass_itself_is_one_line_too():
    @dataclass(frozen=True)
    class Heads:
        n_head: int = 4
        n_embd: int = 8

        def __post_init__(self):
            if self.n_embd % self.n_head:
                raise ValueError(
                    f"{self.n_head} heads do not divide {self.n_embd}, and this text is long enough to wrap"
                )

    assert "3 heads do not divide 8, and this text is long enough to wrap" in bad(Heads, ["--n_head=3"])


# ---- defaults, sources, help, entry


def test_options_start_from_the_given_default(write_config):
    saved = TrainConfig(batch_size=5, block_size=6, max_iters=7)
    config = good(TrainConfig, [write_config("block_size = block_size + 1"), "--max_iters=9"], default=saved)
    assert (config.batch_size, config.block_size, config.max_iters) == (5, 7, 9)


def test_sources_name_what_was_given_and_nothing_else(write_config):
    path = write_config("batch_size = 12\nblock_size = 8\nseed = 1")  # 12 is the default: given all the same
    argv = [path, "--seed=2", "--wandb_log", "--n_layer", "3", "--no_compile"]
    _, sources = configurator.parse_with_sources(TrainConfig, argv, quiet=True)
    assert sources == {
        "batch_size": path,
        "block_size": path,
        "seed": "--seed=2",
        "wandb_log": "--wandb_log",
        "n_layer": "--n_layer=3",
        "compile": "--no_compile",
    }


def test_print_sources_shows_every_option_and_where_it_came_from(capsys):
    configurator.print_sources(TrainConfig(batch_size=3), {"batch_size": "--batch_size=3"}, default_label="saved run")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(asdict(TrainConfig()))
    table = {line.split(" = ")[0].strip(): line for line in lines}
    assert table["batch_size"].split() == ["batch_size", "=", "3", "#", "--batch_size=3"]
    assert table["out_dir"].endswith("# saved run")
    assert len({line.index("#") for line in lines}) == 1


def test_argv_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_jax.py", "--batch_size=3"])
    assert configurator.parse_with_sources(TrainConfig, quiet=True)[0].batch_size == 3


def test_parse_with_sources_leaves_the_error_to_the_caller():
    with pytest.raises(ConfigError, match="batch_size"):
        configurator.parse_with_sources(TrainConfig, ["--btch_size=3"], quiet=True)


def test_help_shows_the_values_after_a_config_file_and_needs_no_jax():
    program = (
        "import sys, configurator, train_jax\n"
        "try:\n    configurator.parse(train_jax.TrainConfig)\n"
        "finally:\n    assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "config/train_shakespeare_char.py", "--help"],
        cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert "Overriding" not in done.stdout
    words = " ".join(done.stdout.replace("│", " ").split())
    entries = {entry.split()[0]: entry for entry in words.partition("-h, --help")[2].split(" --")[1:]}
    assert set(entries) == set(asdict(TrainConfig()))
    assert all("(default: " in entry for entry in entries.values())
    assert "(default: 64)" in entries["batch_size"] and "(default: shakespeare_char)" in entries["dataset"]
    assert "attention heads" in entries["n_head"]


def test_one_line_errors_takes_expected_errors_and_leaves_bugs(capsys):
    with pytest.raises(SystemExit) as stop, jax_console.one_line_errors(ConfigError, FileNotFoundError):
        raise FileNotFoundError("no\ndata")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no\\ndata\n"
    with pytest.raises(ZeroDivisionError), jax_console.one_line_errors(ConfigError, FileNotFoundError):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("between", "inside", "outside"),
    [
        (Between(1), [1, 10**30, math.inf], [0, -1, math.nan]),
        (Between(0, high=2), [0, 2], [-1, 3, math.nan, math.inf]),
        (Between(0.0, below=1.0), [0.0, 0.999], [1.0, -1e-9, math.nan]),
        (Between(above=0.0, high=1.0), [1e-9, 1.0], [0.0, 1.001, math.nan]),
        (Between(), [-1e9, 0, math.inf], [math.nan]),
    ],
)
def test_a_range_includes_its_ends_but_not_below(between, inside, outside):
    assert all(value in between for value in inside)
    assert not any(value in between for value in outside)
