"""A feature whose extra is not installed says so in one line, with the command, and before anything slow is loaded."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

import iterative_ppo
from iterative_ppo.extras import MODULES, Extra, install_command, require_extra

ROOT = Path(__file__).parent.parent
PACKAGE = Path(iterative_ppo.__file__).parent
BROUGHT = {"ray[data]": {"ray", "pandas", "pyarrow"}, "prometheus-client": {"prometheus_client"}}
"""Modules of a requirement that brings more than its name."""


def test_the_extras_are_those_of_the_project_and_bring_what_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {
        extra: {re.split(r"[>=<]", requirement)[0] for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
        if extra != "dev"
    }
    assert required.keys() == MODULES.keys() == set(get_args(Extra))
    for extra, modules in MODULES.items():
        assert set(modules) <= set.union(*(BROUGHT.get(name, {name}) for name in required[extra])), extra


def test_the_readme_has_the_command_of_every_extra():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [extra for extra in MODULES if install_command(extra) not in readme] == []


@pytest.mark.parametrize(("extra", "module"), [(extra, module) for extra in MODULES for module in MODULES[extra]])
def test_whatever_is_missing_is_named(extra: Extra, module: str, monkeypatch: pytest.MonkeyPatch):
    for other in MODULES[extra]:
        monkeypatch.setitem(sys.modules, other, sys)  # there
    require_extra(extra, needed_by="it")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="is not installed") as caught:
        require_extra(extra, needed_by="it")
    assert str(caught.value) == (
        f'it: {module} is not installed; the extra `{extra}` brings it: pip install -c constraints.txt -e ".[{extra}]"'
    )


@pytest.mark.parametrize(
    ("missing", "complaint", "arguments"),
    [
        ("fastapi", "serve-q: fastapi", ["serve-q", "run"]),
        ("ray", "--ray: ray", ["collect", "--policy", "p", "--out", "new.jsonl", "--ray", "local"]),
        ("ray", "--ray: ray", ["score", "--logs", "log.jsonl", "--q", "q", "--out", "new.jsonl", "--ray", "local"]),
    ],
)
def test_a_command_says_it_before_it_loads_torch(missing: str, complaint: str, arguments: list[str], tmp_path: Path):
    (tmp_path / "log.jsonl").touch()
    program = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['ippo', *sys.argv[1:]]\n"
        "from iterative_ppo.__main__ import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    command = [sys.executable, "-P", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ippo: {complaint} is not installed; ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == "False\n"


def test_it_is_said_in_one_place():
    texts = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in texts.items() if "find_spec" in text or "pip install" in text] == ["extras.py"]
