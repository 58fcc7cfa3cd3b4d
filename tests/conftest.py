"""For all tests: no network, and one thread, since a second one only waits for the first on models this small."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `run`, and its exports in `verl`, `openrlhf` and `trl`. Not to be changed."""
    from exports import export_everything

    folder = tmp_path_factory.mktemp("exported")
    export_everything(folder)
    return folder
