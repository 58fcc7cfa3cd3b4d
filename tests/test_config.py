"""Settings: in and out without loss, and every mistake named in one line."""

import dataclasses
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterative_ppo import config as config_module
from iterative_ppo.config import (
    SECTIONS,
    Config,
    ConfigError,
    EnvironmentConfig,
    ImprovementConfig,
    PolicyConfig,
    QFunctionConfig,
    documentation,
    from_dict,
    load,
    to_dict,
    to_toml,
    with_setting,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
number = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
value = st.recursive(
    st.booleans() | number | text, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3)
)


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# --- in and out ---------------------------------------------------------------------------------------------


def test_the_defaults_come_back_with_and_without_documentation():
    for documented in (False, True):
        written = to_toml(Config(), documented=documented)
        assert from_dict(tomllib.loads(written)) == Config()
    assert from_dict({}) == Config()
    assert from_dict(to_dict(Config())) == Config()


@given(
    st.dictionaries(text, value, max_size=4),
    text,
    st.integers(0, 2**63 - 1),
    st.floats(1e-30, 1e30),
    st.integers(1, 10**9),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_settings_come_back(arguments: dict[str, Any], start: str, seed: int, temperature: float, count: int):
    """Quotes, control characters, emoji and huge numbers, in values and in the keys of the environment's arguments."""
    config = Config(
        seed=seed,
        environment=EnvironmentConfig(entry_point=start, arguments=arguments),
        policy=PolicyConfig(start=start, temperature=temperature),
        iterations=config_module.IterationsConfig(count=count),
    )
    assert from_dict(tomllib.loads(to_toml(config))) == config


def test_every_setting_is_written_and_documented():
    """The string under a field is its documentation; there is no other list."""
    written = tomllib.loads(to_toml(Config()))
    documented = to_toml(Config(), documented=True)
    names = [name for name, _, _ in config_module.settings()]
    assert len(names) == len(set(names))
    by_section = {
        "": [f.name for f in dataclasses.fields(Config) if f.name not in SECTIONS],
        **{f"{name}.": [f.name for f in dataclasses.fields(section)] for name, section in SECTIONS.items()},
    }
    assert sorted(names) == sorted(f"{prefix}{name}" for prefix, fields in by_section.items() for name in fields)
    for name, default, explanation in config_module.settings():
        section, _, key = name.rpartition(".")
        assert (written[section] if section else written)[key] == default
        assert len(explanation) > 20, f"{name} is not explained"
        assert explanation[-1] in ".)", f"{name}: a whole sentence"
        assert explanation.split()[0] in documented
    assert len(names) < 60, "derive rather than expose"


def test_documentation_belongs_to_its_field():
    assert documentation(PolicyConfig)["temperature"].startswith("Divides the logits")
    assert documentation(QFunctionConfig)["gamma"].startswith("Turn discount")
    assert set(documentation(ImprovementConfig)) == {f.name for f in dataclasses.fields(ImprovementConfig)}


def test_a_file_is_read_and_what_is_no_toml_is_named(tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text('seed = 3\n[policy]\nstart = "tiny"\n[iterations]\ncount = 2\n', encoding="utf-8")
    config = from_dict(load(path))
    assert (config.seed, config.policy.start, config.iterations.count) == (3, "tiny", 2)
    for broken in (b"seed = ", b"seed = 1\nseed = 2\n", b"[policy\n", b'a = "\xff"'):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"c\.toml: not a TOML file") as caught:
            load(path)
        one_line(caught)


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "nearest"),
    [
        ({"polcy": {}}, "policy"),
        ({"sed": 1}, "seed"),
        ({"iterations": {"cuont": 1}}, "iterations.count"),
        ({"policy": {"temprature": 1.0}}, "policy.temperature"),
        ({"improvement": {"kl_coef": 0.1}}, "improvement.kl_coefficient"),
        ({"q_function": {"max_pases": 3}}, "q_function.max_passes"),
        ({"compute": {"zzz": 1}}, "compute."),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tables: dict[str, Any], nearest: str):
    with pytest.raises(ConfigError, match="unknown setting") as caught:
        from_dict(tables)
    assert f"the nearest known one is {nearest}" in one_line(caught)


@pytest.mark.parametrize(
    ("section", "key", "bad", "wanted"),
    [
        ("", "seed", 1.5, "a whole number"),
        ("", "seed", True, "a whole number"),
        ("", "seed", -1, "at least 0"),
        ("", "seed", "1", "a whole number"),
        ("policy", "start", 3, "a string"),
        ("policy", "hidden_size", 0, "at least 1"),
        ("policy", "vocabulary_size", 299, "at least 300"),
        ("policy", "temperature", 0.0, "more than 0"),
        ("policy", "temperature", math.nan, "a finite number"),
        ("policy", "temperature", math.inf, "a finite number"),
        ("policy", "temperature", True, "a finite number"),
        pytest.param("policy", "temperature", 10**400, "a finite number", id="policy-temperature-huge"),
        ("q_function", "gamma", 1.1, "from 0 to 1"),
        ("q_function", "link", "probit", "'identity', 'logistic'"),
        ("q_function", "link", ["logistic"], "'identity', 'logistic'"),
        ("q_function", "held_out_share", 0.95, "from 0.01 to 0.9"),
        ("improvement", "algorithm", "reinforce", "'ppo', 'grpo', 'rloo'"),
        ("improvement", "kl_coefficient", -0.1, "at least 0"),
        ("environment", "arguments", "a=1", "a table"),
        ("compute", "device", None, "a string"),
    ],
)
def test_a_wrong_value_names_the_setting_and_what_it_must_be(section: str, key: str, bad: object, wanted: str):
    with pytest.raises(ConfigError) as caught:
        from_dict({section: {key: bad}} if section else {key: bad})
    message = one_line(caught)
    assert message.startswith(f"{section}.{key}: must be " if section else f"{key}: must be ")
    assert wanted in message


def test_a_section_must_be_a_table():
    with pytest.raises(ConfigError, match=r"policy: must be a table, as in \[policy\], not 'tiny'") as caught:
        from_dict({"policy": "tiny"})
    one_line(caught)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match=r'needs q_function\.link = "logistic"'):
        from_dict({"q_function": {"loss": "binary_cross_entropy", "link": "identity"}})
    for algorithm in ("grpo", "rloo"):
        with pytest.raises(ConfigError, match=r"improvement.num_samples.*at least 2"):
            from_dict({"improvement": {"algorithm": algorithm, "num_samples": 1}})
        assert from_dict({"improvement": {"algorithm": algorithm, "num_samples": 2}}).improvement.num_samples == 2
    from_dict({"q_function": {"loss": "squared_error", "link": "identity"}})


def test_a_configuration_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
    with pytest.raises(ConfigError):
        dataclasses.replace(PolicyConfig(), temperature=-1.0)


# --- --set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("iterations.count=2", {"iterations": {"count": 2}}),
        (" policy.temperature = 0.7 ", {"policy": {"temperature": 0.7}}),
        ("policy.temperature=1e-3", {"policy": {"temperature": 1e-3}}),
        ("policy.start=tiny", {"policy": {"start": "tiny"}}),
        ('policy.start="tiny"', {"policy": {"start": "tiny"}}),
        ("policy.start=org/model-1.5B", {"policy": {"start": "org/model-1.5B"}}),
        ("policy.start=/a b/c=d", {"policy": {"start": "/a b/c=d"}}),
        ("policy.logs=", {"policy": {"logs": ""}}),
        ("environment.arguments.max_turns=5", {"environment": {"arguments": {"max_turns": 5}}}),
        ("environment.arguments={a = [1, true]}", {"environment": {"arguments": {"a": [1, True]}}}),
    ],
)
def test_an_assignment_is_toml_and_a_bare_word_is_a_string(assignment: str, expected: dict[str, Any]):
    tables: dict[str, Any] = {}
    assert with_setting(tables, assignment) == expected
    assert tables == {}, "the tables handed in stay as they are"


def test_assignments_add_up_and_the_last_one_wins():
    tables = {"policy": {"start": "tiny", "temperature": 1.0}}
    for assignment in ("policy.temperature=0.5", "seed=1", "seed=2"):
        tables = with_setting(tables, assignment)
    assert tables == {"policy": {"start": "tiny", "temperature": 0.5}, "seed": 2}
    config = from_dict(tables)
    assert (config.seed, config.policy.temperature) == (2, 0.5)


@pytest.mark.parametrize("assignment", ["seed", "=3", "policy.=3", ".seed=3", "", "policy..start=a"])
def test_an_assignment_without_name_or_value_is_refused(assignment: str):
    with pytest.raises(ConfigError, match=r"write section\.key=value") as caught:
        with_setting({}, assignment)
    one_line(caught)


def test_an_assignment_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="seed is no table"):
        with_setting({"seed": 1}, "seed.deeper=2")


def test_dates_are_values_that_other_settings_survive():
    """TOML has dates and times; an environment may want one, and a name may look like one."""
    tables = with_setting({}, "policy.logs=2026-08-01")
    tables = with_setting(tables, "seed=1")
    with pytest.raises(ConfigError, match=r"policy\.logs: must be a string") as caught:
        from_dict(tables)
    one_line(caught)


# --- weight -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["iterative_ppo.config", "iterative_ppo.__main__"])
def test_reading_a_configuration_imports_no_torch(module: str):
    """Nor anything else that takes seconds: `ippo --help` and a mistyped setting answer at once."""
    heavy = ("torch", "transformers", "gymnasium", "scipy", "sklearn")
    code = f"import {module}, sys; sys.exit(', '.join(m for m in {heavy!r} if m in sys.modules) or None)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{module} imports {result.stderr}"


def test_the_configuration_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import iterative_ppo.config;"
        "names = {m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "sys.exit(str(names)) if names - {'iterative_ppo'} else None"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
