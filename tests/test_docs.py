"""The documents against the code: option tables, commands, names of files and functions, links.

python -m pytest tests/test_docs.py

A failing option table prints the one to paste.
"""

import ast
import dataclasses
import functools
import io
import re
import shlex
import tokenize
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import configurator
from bench_jax import BenchConfig
from examples.compare_with_transformers import CompareConfig
from examples.gpt2_next_token import ExampleConfig
from export_jax import ExportConfig
from sample_jax import SampleConfig
from test_jax_transformer import CheckConfig
from train_jax import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "data/*/*.md", "microgpt/*.md", "microgpt/*/*.md")
    for path in ROOT.glob(pattern)
)
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.py",
        "data/*.py",
        "data/*/*.py",
        "config/*.py",
        "examples/*.py",
        "microgpt/*/main.py",
        "benchmarks/*.py",
    )
    for path in ROOT.glob(pattern)
)
CONFIGS: dict[str, Any] = {
    "train_jax.py": TrainConfig,
    "sample_jax.py": SampleConfig,
    "bench_jax.py": BenchConfig,
    "export_jax.py": ExportConfig,
    "examples/gpt2_next_token.py": ExampleConfig,
    "examples/compare_with_transformers.py": CompareConfig,
    "test_jax_transformer.py": CheckConfig,
}
NANOGPT_SCRIPTS = {"train.py", "sample.py", "bench.py"}  # for comparison, run in its own checkout
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:home|root|work|workspace|Users|tmp|mnt|opt|srv|var|private|nix)/\S*")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# the option tables


def help_texts(script: str, class_name: str) -> dict[str, str]:
    """The comment at the end of each field's line."""
    source = read(script)
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (config_class,) = (node for node in ast.parse(source).body if getattr(node, "name", None) == class_name)
    assert isinstance(config_class, ast.ClassDef)
    fields = [node for node in config_class.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(field.target): comments[field.end_lineno or field.lineno] for field in fields}


def option_table(script: str) -> list[str]:
    """Every option of a script, its default, what it may be and its help: the lines of a Markdown table."""
    config_class = CONFIGS[script]
    helps = help_texts(script, config_class.__name__)
    hints = typing.get_type_hints(config_class, include_extras=True)
    lines = ["| option | default | may be | what it is |", "|---|---|---|---|"]
    for field in dataclasses.fields(config_class):
        kind, text = str(configurator.kind_of(hints[field.name])), helps[field.name]
        cells = [f"`{field.name}`", f"`{field.default!r}`", kind, text]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


@pytest.mark.parametrize(
    "script", ["train_jax.py", "sample_jax.py", "export_jax.py"]
)  # bench_jax.py's are the trainer's and a few
def test_option_table_of_the_manual_is_the_dataclass(script):
    table = "\n".join(option_table(script))
    assert f"\n{table}\n\n" in read("JAX_README.md"), f"JAX_README.md lacks this table of {script}:\n\n{table}\n"


# ----------------------------------------------------------------------------------------------------------------------
# commands


def python_commands(text: str) -> Iterator[list[str]]:
    """[script, argument, ...] of every `python script.py ...`, without the words of an explanation after it."""
    text = text.replace("\\\n", " ")
    for command in re.findall(r"(?<![\w.])python3? +([\w./-]+\.py\b[^\n`]*)", text):
        command = re.split(r"  +#|  +[a-zA-Z]|&&|\)|[|;>]", command)[0]
        yield shlex.split(command, comments=True)


def documents_and_docstrings() -> dict[str, str]:
    texts = {name: read(name) for name in DOCUMENTS}
    for name in SCRIPTS:
        in_comments = name.startswith("config/")
        texts[name] = read(name) if in_comments else ast.get_docstring(ast.parse(read(name)), clean=False) or ""
    return texts


COMMANDS = {
    f"{name}: {' '.join(command)}": command
    for name, text in documents_and_docstrings().items()
    for command in python_commands(text)
    if command[0] not in NANOGPT_SCRIPTS
}


@functools.cache
def argparse_flags(script: str) -> set[str]:
    calls = [node for node in ast.walk(ast.parse(read(script))) if isinstance(node, ast.Call)]
    return {
        argument.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_command_names_a_script_config_files_and_options_that_exist(command, monkeypatch):
    script, *arguments = command
    if "--" in arguments:  # benchmarks/compare.py: what follows goes to the trainer
        cut = arguments.index("--")
        test_command_names_a_script_config_files_and_options_that_exist(
            ["train_jax.py", *arguments[cut + 1 :]], monkeypatch
        )
        del arguments[cut:]
    assert (ROOT / script).is_file(), f"there is no script {script}"
    flags = [argument for argument in arguments if argument.startswith("--") and argument != "--help"]
    if script in CONFIGS:
        monkeypatch.chdir(ROOT)  # config files are named from here
        config_files = [argument for argument in arguments if argument.startswith("config/")]
        # a ConfigError here says which option is unknown, or which value is not allowed
        configurator.parse_with_sources(CONFIGS[script], [*config_files, *flags], quiet=True)
    else:
        assert {flag.partition("=")[0] for flag in flags} <= argparse_flags(script)


def test_the_commands_are_found():
    # so that the test above cannot pass for want of commands
    text = "x `python a.py --b=c` y\n$ python d/e.py f.py --g='h i' \\\n    --j=k  and so on\npython l.py  # m\n"
    assert list(python_commands(text)) == [
        ["a.py", "--b=c"],
        ["d/e.py", "f.py", "--g=h i", "--j=k"],
        ["l.py"],
    ]
    found = {name.partition(":")[0] for name in COMMANDS}
    assert found >= {"JAX_README.md", "train_jax.py", "sample_jax.py", "plot_jax.py", "data/prepare_text.py"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`|&& )make ([a-z-]+)", read(name), re.MULTILINE)) <= targets


# ----------------------------------------------------------------------------------------------------------------------
# names of files and functions, written `file.py` or `file.py: name`


@functools.cache
def names_defined(path: Path) -> set[str]:
    """Every function, class, method, field and module constant, as `GPT`, `GPT.__call__`, `main.evaluate`."""

    def names(node: ast.AST, prefix: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield prefix + child.name
                yield from names(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                if isinstance(node, ast.Module | ast.ClassDef):
                    targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                    yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))
            else:  # an if or a try does not open a scope
                yield from names(child, prefix)

    return set(names(ast.parse(path.read_text(encoding="utf-8")), ""))


def references(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w./-]+\.py)(?:: ([\w.]+))?`", text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_names_in_code_exist(name):
    missing = []
    for file, qualified_name in references(read(name)):
        path = ROOT / file
        if not path.is_file():
            missing.append(file)
        elif qualified_name and qualified_name not in names_defined(path):
            missing.append(f"{file}: {qualified_name}")
    assert not missing


def test_a_wrong_name_would_be_noticed():
    assert references("`a.py`, `b/c.py: D.e` and `x = 1`") == [("a.py", ""), ("b/c.py", "D.e")]
    names = names_defined(ROOT / "train_jax.py")
    assert names >= {"TrainConfig", "TrainConfig.dtype", "main", "main.save", "EVAL_SEED"}
    assert "StopRequest.__init__" in names_defined(ROOT / "jax_processes.py")
    assert not names & {"evaluate", "dtype", "no_such_name"}
    assert len(references(read("TORCH_TO_JAX_MAPPING.md"))) > 50


@pytest.mark.parametrize("name", DOCUMENTS)
def test_config_files_exist(name):
    assert [path for path in re.findall(r"\bconfig/\w+\.py\b", read(name)) if not (ROOT / path).is_file()] == []


# ----------------------------------------------------------------------------------------------------------------------
# links and paths


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_resolve(name):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_path_of_a_machine(name):
    assert MACHINE_PATH.findall(read(name)) == []


def test_a_path_of_a_machine_would_be_noticed():
    assert MACHINE_PATH.findall("see /home/me/x, (/tmp/y) and `/Users/me`")
    assert not MACHINE_PATH.findall("data/tmp/x, #!/bin/bash, https://a.org/home/b, ~/home/x, and/or")


def test_every_module_is_in_the_package():
    """Installed without the folder it came from, a module that pyproject.toml forgets would be missing."""
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert set(packaged) == {"configurator", *(path.stem for path in ROOT.glob("jax_*.py"))}
