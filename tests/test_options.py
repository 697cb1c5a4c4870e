"""jax_options: any values of the options are a config to go on with, or one line.

python -m pytest tests/test_options.py
"""

import dataclasses

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_data
import jax_options
import jax_weights
from configurator import ConfigError
from train_jax import TrainConfig

FIELDS = {field.name: getattr(TrainConfig(), field.name) for field in dataclasses.fields(TrainConfig)}
LETTERS = st.characters(exclude_categories=["C", "Z"])
NOT_A_HUB_NAME = st.text(LETTERS, max_size=12).filter(
    lambda text: text not in jax_weights.HUB
)  # those may be downloaded


def any_value(default):
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(1, 2**40)
    if isinstance(default, float):
        return st.floats(0, allow_nan=False, allow_infinity=False)
    return (
        st.sampled_from(["scratch", "resume", "latest", "best", "", ".", "..", "/", "a\0b", "x" * 300]) | NOT_A_HUB_NAME
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_values_of_the_options_are_fine_or_one_line(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    names = data.draw(st.sets(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=6))
    values = {name: data.draw(any_value(FIELDS[name]), label=name) for name in sorted(names)}
    config = dataclasses.replace(TrainConfig(), **values)
    sources = {name: f"--{name}" for name in names}
    try:
        jax_options.check_options(config, sources)
        jax_options.open_data(config, None, None)
    # OSError: of a name that is too long for the file system; run_script has a line for it, too
    except (ConfigError, jax_data.DataError, jax_weights.WeightsError, OSError) as error:
        assert "\n" not in str(error)
    assert list(tmp_path.iterdir()) == []
