"""Where in a run the Q-function to serve is, and the settings that it was fitted with; without loading it."""

import json
from pathlib import Path
from typing import Any

from iterative_ppo import config as config_module
from iterative_ppo.config import ConfigError


def find_q_function(path: Path) -> Path:
    """The folder of the Q-function in a run (the newest), in a stage, or the path itself; ValueError where there is none."""
    iterations = sorted(path.glob("iteration-*"), key=lambda folder: (len(folder.name), folder.name), reverse=True)
    for folder in (path, path / "q_function", *(i / "fit/q_function" for i in (*iterations, path))):
        if (folder / "q_function.json").is_file():
            return folder
    raise ValueError(
        f"{path}: holds no Q-function (no q_function.json here, in q_function, fit/q_function or iteration-*/fit/q_function)"
    )


def settings_beside(path: Path, q_function: Path) -> dict[str, Any]:
    """The settings with which a Q-function was fitted, from its run's `config.toml` or its stage's manifest; else none."""
    if (path / "config.toml").is_file():
        return config_module.load(path / "config.toml")
    manifest = q_function.resolve().parent / "manifest.json"
    if not manifest.is_file():
        return {}
    try:
        settings = json.loads(manifest.read_text(encoding="utf-8"))["config"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{manifest}: not a stage's manifest: {error}") from error
    return dict(settings)
