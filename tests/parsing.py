"""What the tests of the configurator share: a configuration with an option of each type, parsed well or badly."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import configurator
from configurator import Between

ROOT = Path(configurator.__file__).parent


@dataclass(frozen=True)
class Plain:
    """One option of each type."""

    name: str = "x"  # a text
    count: int = 1  # a whole number
    rate: float = 0.5  # a number
    flag: bool = False  # a switch
    top_k: Annotated[int, Between(1)] | None = 200  # may be nothing
    top_p: Optional[float] = None  # noqa: UP045 - the older spelling works too
    level: Annotated[float, Between(0.0, high=1.0)] = 0.0  # a closed range
    mode: Literal["fast", "exact"] = "fast"  # a choice


def run(config_class: Any, argv: list[str], **options: Any) -> tuple[Any, int | None, str, str]:
    """The config or None, the exit code or None, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return configurator.parse(config_class, argv, **options), None, out.getvalue(), err.getvalue()
        except SystemExit as stop:
            return None, stop.code, out.getvalue(), err.getvalue()  # type: ignore[return-value]


def good(config_class: Any, argv: list[str], **options: Any) -> Any:
    config, code, _, err = run(config_class, argv, **options)
    assert code is None and err == "", err
    return config


def bad(config_class: Any, argv: list[str]) -> str:
    """The one line said about bad input."""
    config, code, _, err = run(config_class, argv)
    assert config is None and code == 2
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and err.endswith("\n")
    return err
