"""What only some features need: the extras of pyproject.toml."""

import importlib.util
from typing import Literal

Extra = Literal["export", "ray", "serve", "trl"]

MODULES: dict[Extra, tuple[str, ...]] = {
    "export": ("pyarrow",),
    "ray": ("ray", "pandas", "pyarrow"),  # the last two for ray.data
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "trl": ("trl", "datasets"),
}
"""What a feature imports of its extra."""


def install_command(extra: Extra) -> str:
    """What installs an extra, as the README has it."""
    return f'pip install -c constraints.txt -e ".[{extra}]"'


def require_extra(extra: Extra, *, needed_by: str) -> None:
    """Checks that what a feature imports is installed, without importing it.

    Args:
        needed_by: the feature as the user asked for it, `serve-q` or `--ray`.

    Raises:
        ValueError: names the first package that is missing, its extra and the command that installs it.
    """
    for module in MODULES[extra]:
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"{needed_by}: {module} is not installed; the extra `{extra}` brings it: {install_command(extra)}"
            )
