"""Config files and --key=value, in nanoGPT's manner, onto a frozen dataclass.

    config = configurator.parse(TrainConfig)

    python train_jax.py config/train_gpt2.py --batch_size=32

An argument without dashes is a config file: Python that assigns options by name, and may import, compute and read the
values so far. All files run first, in order; then the flags, so a flag wins wherever it stands. What nanoGPT accepts
means the same here. What it lets pass in silence (a typo, a wrong type, an impossible value) is one line and exit 2.
"""

import ast
import contextlib
import difflib
import io
import math
import operator
import re
import symtable
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import tyro

import jax_console

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


class ConfigError(ValueError):
    """What is wrong with the options, in one line."""


@dataclass(frozen=True)
class Between:
    """A range for a number: `Annotated[int, Between(1)]`. `low` and `high` are inclusive, `above` and `below` not."""

    low: float = -math.inf
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        # NaN fails the first comparison, and so every range.
        high_enough = self.low <= value and (self.above is None or value > self.above)
        return high_enough and (self.high is None or value <= self.high) and (self.below is None or value < self.below)

    def __str__(self) -> str:
        text = f"at least {self.low:.12g}" if self.above is None else f"above {self.above:.12g}"
        if self.high is not None:
            text += f" and at most {self.high:.12g}"
        return text if self.below is None else f"{text} and below {self.below:.12g}"


# Counts and sizes: none is larger, and JAX would end in a traceback.
AtLeast0 = Annotated[int, Between(0, below=2**32)]
AtLeast1 = Annotated[int, Between(1, below=2**32)]


def parse(config_class: type[Config], argv: Sequence[str] | None = None, default: Config | None = None) -> Config:
    """The options of this run. Bad input is one line on stderr and exit code 2."""
    with jax_console.one_line_errors(ConfigError):
        return parse_with_sources(config_class, argv, default)[0]


def parse_with_sources(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    default: Config | None = None,
    quiet: bool = False,
) -> tuple[Config, dict[str, str]]:
    """The options, and for each one given where it came from: 'config/x.py' or '--batch_size=32'."""
    kinds = {key: kind_of(hint) for key, hint in _field_hints(config_class).items()}
    files, flags, wants_help = split_argv(sys.argv[1:] if argv is None else argv, kinds)
    shows = [value_of(flag.text, kinds[flag.key]) for flag in flags if flag.key == "print_config"]
    prints_config = shows[-1:] == [True]  # and nothing beside it, as that is a config file
    say = (lambda text: None) if quiet or wants_help or prints_config else print
    config = config_class() if default is None else default
    sources: dict[str, str] = {}

    last_file: dict[str, int] = {}  # which file had the last word on a key
    for index, path in enumerate(files):
        text = read_config_file(path)
        say(f"Overriding config with {path}:\n{text}")
        given = run_config_file(path, text, {key: getattr(config, key) for key in kinds}, kinds)
        config = replace(config, **given)
        sources.update(dict.fromkeys(given, path))
        last_file.update(dict.fromkeys(given, index))
    if wants_help:
        shown = {key: jax_console.one_line(value) for key, value in asdict(config).items() if isinstance(value, str)}
        tyro_cli(config_class, ["--help"], replace(config, **shown))

    options = {}
    for flag in flags:
        options[flag.key] = coerce(flag.source, flag.key, value_of(flag.text, kinds[flag.key]), kinds[flag.key])
        sources[flag.key] = flag.source
        say(f"Overriding: {flag.key} = {options[flag.key]}")
        if last_file.get(flag.key, -1) >= flag.files_before:
            say(f"note: {flag.source} wins over {files[last_file[flag.key]]}, although the file comes after it")
    return tyro_cli(config_class, [f"--{key}={value}" for key, value in options.items()], config), sources


def print_sources(
    config: "DataclassInstance",
    sources: Mapping[str, str],
    default_label: str = "default",
    undecided: Collection[str] = (),
) -> None:
    """Every option with its value and where that came from; what is printed is itself a config file.

    Options that something else will decide, the `undecided`, are comments in it.
    """
    rows = [
        (f"# {key}" if key in undecided else key, _literal(value), sources.get(key, default_label))
        for key, value in asdict(config).items()
    ]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = min(40, max(len(value) for _, value, _ in rows))  # one long prompt should not push all else away
    for key, value, source in rows:
        print(f"{key:<{key_width}} = {value:<{value_width}}  # {jax_console.one_line(source)}")


def _literal(value: Any) -> str:
    """The value as a config file has it."""
    return f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)


class Kind(NamedTuple):
    """What an option's annotation allows."""

    base: type
    optional: bool = False
    choices: tuple[Any, ...] = ()
    between: Between | None = None

    def __str__(self) -> str:
        text = {bool: "True or False", int: "an int", float: "a float", str: "a str"}[self.base]
        if self.choices:
            text = "one of " + ", ".join(map(repr, self.choices))
        if self.between is not None:
            text += f" of {self.between}"
        return text + " or None" * self.optional


def kind_of(hint: Any) -> Kind:
    """The kind behind any nesting of Annotated, Optional and Literal around a bool, int, float or str."""
    optional, between = False, None
    while (origin := typing.get_origin(hint)) is not None:
        args = typing.get_args(hint)
        if origin is typing.Literal:
            return Kind(type(args[0]), optional, args, between)
        if origin is typing.Annotated:
            hint, *metadata = args
            between = next((item for item in metadata if isinstance(item, Between)), between)
        elif origin in (typing.Union, types.UnionType) and len(args) == 2 and types.NoneType in args:
            optional, hint = True, args[0] if args[1] is types.NoneType else args[1]
        else:
            break
    if hint not in (bool, int, float, str):
        raise TypeError(f"an option cannot be of type {hint}")
    return Kind(hint, optional, (), between)


def coerce(source: str, key: str, value: Any, kind: Kind) -> Any:
    """The value as its option's type: ints and whole floats pass for each other, nothing else does."""
    result = value
    if isinstance(value, Real) and not isinstance(value, bool) and kind.base in (int, float):
        with contextlib.suppress(ValueError, OverflowError):  # int(nan), int(inf), float(10**400)
            number: Any = kind.base(value)  # type: ignore[call-overload]
            result = number if kind.base is float or number == value else value
    if result is None and kind.optional:
        return None
    good = isinstance(result, kind.base) and isinstance(result, bool) == (kind.base is bool)
    if good and (not kind.choices or result in kind.choices) and (kind.between is None or result in kind.between):
        return result
    raise ConfigError(f"{source}: {key} must be {kind}, not {value!r}")


def checked(config_class: type["DataclassInstance"], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values of options, by name, that something else than a person wrote. Raises ConfigError naming the source."""
    kinds = {key: kind_of(hint) for key, hint in _field_hints(config_class).items()}
    return {key: coerce(source, key, value, kinds[key]) for key, value in values.items()}


def unknown_key(source: str, key: str, kinds: Mapping[str, Kind], hint: str = "") -> ConfigError:
    near = difflib.get_close_matches(key.lower(), kinds, 1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else "--help lists them all"
    return ConfigError(f"{source}: unknown key {key!r}; {advice}{hint}")


class Namespace(dict[str, Any]):
    """A config file's globals. Remembers what was assigned, also where the value stayed the same."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.assigned: set[str] = set()

    def __setitem__(self, name: str, value: Any) -> None:
        self.assigned.add(name)
        super().__setitem__(name, value)


def read_config_file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        candidates = {file.stem: file for folder in (Path("config"), Path(path).parent) for file in folder.glob("*.py")}
        near = difflib.get_close_matches(Path(path).stem, candidates, 1)
        advice = f"; did you mean {candidates[near[0]]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{advice}") from None
    except (OSError, ValueError) as error:  # a folder, no permission; not text
        raise ConfigError(f"{path or repr(path)}: cannot read this config file: {error}") from None


def run_config_file(path: str, text: str, values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Runs the file with the current values in sight and returns what it assigned, checked."""
    names = Namespace({**values, "__name__": "__main__", "__file__": path})
    try:
        exec(compile(text, path, "exec", dont_inherit=True), names)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        message = str(error)
        if isinstance(error, SyntaxError) and error.filename == path:
            lines, message = [error.lineno], error.msg
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ConfigError(f"{where}: {type(error).__name__}: {message}") from error

    given = {}
    for name, value in names.items():
        if name in kinds:
            # `global x` inside a function stores past __setitem__: hence also the comparison.
            if name in names.assigned or value is not values[name]:
                given[name] = coerce(path, name, value, kinds[name])
        elif not (name.startswith("_") or callable(value) or isinstance(value, types.ModuleType)):
            table = symtable.symtable(text, path, "exec")
            if name in table.get_identifiers() and table.lookup(name).is_imported():
                continue  # from math import pi
            raise unknown_key(path, name, kinds, f" (a name of your own begins with an underscore: _{name})")
    return given


class Flag(NamedTuple):
    key: str
    text: str  # the value as typed
    source: str  # the flag as typed
    files_before: int  # config files that stand before it


BOOL_WORDS = {"true": True, "1": True, "false": False, "0": False}


def split_argv(argv: Sequence[str], kinds: Mapping[str, Kind]) -> tuple[list[str], list[Flag], bool]:
    """Config files, flags, and whether help was asked for."""
    files: list[str] = []
    flags: list[Flag] = []
    wants_help = False
    waiting = list(argv)
    while waiting:
        arg = waiting.pop(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        follower = waiting[0] if waiting else None
        if arg in ("--help", "-h"):
            wants_help = True
        elif not arg.startswith("--"):
            if arg.startswith("-") or (equals and key.isidentifier()):
                raise ConfigError(f"{arg}: options are written --key=value; did you mean --{arg.lstrip('-')}?")
            files.append(arg)
        elif key not in kinds:
            if equals or kinds.get(key.removeprefix("no_"), Kind(str)).base is not bool:
                raise unknown_key(arg, name, kinds)
            flags.append(Flag(key.removeprefix("no_"), "False", arg, len(files)))
        elif equals:
            flags.append(Flag(key, text, arg, len(files)))
        elif kinds[key].base is bool and (follower is None or follower.lower() not in BOOL_WORDS):
            flags.append(Flag(key, "True", arg, len(files)))
        elif follower is None or follower.startswith("--"):
            raise ConfigError(f"{arg}: {key} needs a value: --{key}=...")
        else:
            flags.append(Flag(key, waiting.pop(0), f"{arg}={follower}", len(files)))
    return files, flags, wants_help


def value_of(text: str, kind: Kind) -> Any:
    """What a flag's text means for this kind of option: nanoGPT's reading first, then what people type anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's remarks on '\d' and the like are not about the option
        try:
            literal = ast.literal_eval(text)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            literal = text
        if literal is None and kind.optional:
            return None
        if kind.base is str:
            return literal if isinstance(literal, str) else text
        if kind.base is bool:
            return literal if isinstance(literal, bool) else BOOL_WORDS.get(text.strip().lower(), text)
        try:
            return arithmetic(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
            with contextlib.suppress(ValueError):
                return float(text)  # inf
            return text


OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip
MAX_BITS = 1024  # 9**9**9 would run for hours


def arithmetic(node: ast.AST) -> int | float:
    """The value of 5*8, 2**10, 1e3: numbers and operators only, so that nothing on a command line is ever run."""
    result: Any = None
    match node:
        case ast.Constant(value=value):
            result = value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](arithmetic(operand))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
            a, b = arithmetic(left), arithmetic(right)
            if not (isinstance(op, ast.Pow) and isinstance(a, int) and a.bit_length() * b > MAX_BITS):
                result = OPERATORS[type(op)](a, b)
    if type(result) not in (int, float) or (isinstance(result, int) and result.bit_length() > MAX_BITS):
        raise ValueError("not a number, or one of absurd size")
    return result


def tyro_cli(config_class: type[Config], args: list[str], default: Config) -> Config:
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                config_class,
                description=f"{config_class.__doc__}\n\nArguments without dashes are config files; --key=value wins.",
                args=args,
                default=default,
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        # tyro draws its errors as a box: lines, rulers and borders
        raise ConfigError(" ".join(re.sub(r"[\u2500-\u257f]+|-{3,}", " ", box.getvalue()).split())) from None


def _field_hints(config_class: type["DataclassInstance"]) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in fields(config_class)}
