"""The arithmetic of docs/scaling.md, by hand, and that the page holds what the script prints."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from iterative_ppo.activation_checkpointing import gradient_pass, keep_no_activations
from iterative_ppo.adapters import add_adapter

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "scaling_arithmetic.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_arithmetic", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_arithmetic"] = module
    spec.loader.exec_module(module)
    return module


arithmetic = _script()
ASSUMED = arithmetic.Assumptions()
ONE, EIGHT, SEVENTY = arithmetic.SHAPES
SMALL = replace(ONE, width=128, heads=4, kv_heads=2, head_width=32, feed_forward=512, vocabulary=16)
TOKENS = torch.ones(4, 8, dtype=torch.long)


def small_model(shape: Any) -> LlamaForCausalLM:
    """A model of a shape."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )
    return LlamaForCausalLM(config).eval()


def test_parameters_are_those_of_the_published_models():
    assert ONE.parameters == 1_235_814_400
    assert EIGHT.parameters == 8_030_261_248
    assert SEVENTY.parameters == 70_553_706_496


def test_a_conversation_of_8b_by_hand():
    """8 turns of 40 + 60 tokens after 200 of the system: 1,000, of which 480 are sampled, twice over in two new responses.

    A layer: 2 · 4096² (queries, output) + 2 · 4096 · 1024 (keys, values) + 3 · 4096 · 14336 = 218,103,808 parameters.
    Attention of a token: 4 · 32 layers · 4096 · 500 tokens of context on average = 262,144,000 FLOP.
    """
    assert (ASSUMED.conversation_tokens, ASSUMED.sampled_tokens, ASSUMED.tree_tokens) == (1000, 480, 1960)
    token = 2 * 32 * 218_103_808 + 262_144_000
    assert arithmetic.forward_flop(EIGHT, ASSUMED, tokens=1000, predicted=0) == 1000 * token
    head = 2 * 480 * 128_256 * 4096
    assert arithmetic.forward_flop(EIGHT, ASSUMED, tokens=1000, predicted=480) == 1000 * token + head
    assert EIGHT.kv_bytes == 2 * 2 * 32 * 8 * 128 == 131_072
    # 16 · (in + out): queries and output 2 · 8192, keys and values 2 · 5120, gate, up and down 3 · 18432; 32 layers
    assert EIGHT.adapter_parameters(16) == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) == 41_943_040


def test_two_four_and_six_flop_a_parameter():
    """Forward 2, all weights 6, an adapter 4 and, with activations computed again, 6."""
    per_parameter = 32 * EIGHT.layer_matrices
    short = replace(ASSUMED, turns=0, system_tokens=0)  # no context, no attention
    forward = arithmetic.forward_flop(EIGHT, short, tokens=1, predicted=0)
    assert forward / per_parameter == 2
    for lora, checkpointing, flop in ((False, False, 6), (True, False, 4), (True, True, 6), (False, True, 8)):
        training = arithmetic.training_flop(EIGHT, short, tokens=1, predicted=0, lora=lora, checkpointing=checkpointing)
        assert training / per_parameter == flop


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_takes_two_forward_passes_and_with_checkpointing_three(checkpointing: bool):
    """Counted as it runs, on 8 layers; the adapter itself takes 4 %, and the first layer's input needs no gradient."""
    shape = replace(SMALL, layers=8)
    model = small_model(shape)
    add_adapter(model, rank=1, seed=0)
    if checkpointing:
        keep_no_activations(model)
    with FlopCounterMode(display=False) as counter, gradient_pass(model):
        model.base_model(input_ids=TOKENS, use_cache=False).last_hidden_state.sum().backward()
    expected = arithmetic.training_flop(
        shape,
        replace(ASSUMED, turns=0, system_tokens=0),
        tokens=32,
        predicted=0,
        lora=True,
        checkpointing=checkpointing,
    )
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("trained", ["adapter", "bfloat16", "float32"])
def test_activations_are_those_that_a_backward_pass_keeps(trained: str):
    """Counted as they are kept, two layers of eight against none: within 3 %, for adapters of rank 1 and statistics of norms."""

    def kept_bytes(layers: int) -> int:
        model = small_model(replace(SMALL, layers=layers)).to(torch.float32 if trained == "float32" else torch.bfloat16)
        if trained == "adapter":
            add_adapter(model, rank=1, seed=0)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=TOKENS, use_cache=False).last_hidden_state.sum()
        return sum(storage.nbytes() for storage in kept.values())

    measured = (kept_bytes(4) - kept_bytes(2)) / 2 / TOKENS.numel()
    assert measured == pytest.approx(SMALL.layer_activation_bytes(trained), rel=0.03)


def test_memory_of_8b_by_hand():
    """GB: 16.06 of weights; an adapter of 0.04194: 16 bytes where trained (0.6711), 4 elsewhere (0.1678).

    Of a token a layer keeps 8 · 4096 + 2 · (2 · 4096 + 2 · 1024 + 3 · 14336) + 4 · (5 · 4096 + 4096 + 14336) = 294,912 bytes, 32
    layers 9,437,184, and 4,096 tokens 38.7 GB. Recomputed: 32 · 8,192 + 294,912 = 557,056 bytes, 2.28 GB. Logits: 4,096 · 960 /
    1,960 tokens of 128,256 in float32, three times: 3.09.
    """
    lora, whole, mixed = arithmetic.layouts(EIGHT, ASSUMED)
    memory = lora.memory
    parts = [memory.weights, memory.policy, memory.anchor, memory.token_value, memory.q_function]
    assert [part / 1e9 for part in parts] == pytest.approx([16.06, 0.6711, 0.1678, 0.1678, 0.1678], rel=1e-3)
    assert memory.activations == 4096 * 557_056
    assert lora.kept == 4096 * 9_437_184
    assert memory.logits / 1e9 == pytest.approx(3.0877, rel=1e-4)
    for layout, factor in ((whole, 16 + 4 + 4 + 4), (mixed, 16 + 2 + 16 + 2)):
        own = layout.memory
        assert own.policy + own.anchor + own.token_value + own.q_function == factor * EIGHT.parameters


def test_decoding_of_8b_by_hand():
    """One GPU: (72 - 16.06) GB over 0.131072 GB a conversation are 426. A step reads 16.06 + 426 · 0.065536 = 43.98 GB at
    1.675 TB/s: 26.3 ms for 426 tokens, 61.6 microseconds a token. Arithmetic alone would take 39."""
    decoding = arithmetic.replica(EIGHT, ASSUMED)
    assert (decoding.gpus, decoding.conversations) == (1, 426)
    assert decoding.seconds_per_token == pytest.approx(61.6e-6, rel=1e-3)
    assert arithmetic.replica(SEVENTY, ASSUMED).gpus == 4
    slow = replace(ASSUMED, mfu=0.1)
    flop = arithmetic.forward_flop(EIGHT, slow, tokens=1, predicted=1)
    assert arithmetic.replica(EIGHT, slow).seconds_per_token == pytest.approx(flop / 98.9e12), "bound by arithmetic"


def test_gpu_hours_of_8b_by_hand():
    """10^4 conversations, 14.221 TFLOP to read one. Collecting: 52 % of that at 395.6 TFLOP/s, 18.69 ms, and 480 tokens of 61.6
    microseconds, 29.58 ms: 0.134 hours. Fit: three times 14.221 TFLOP, 107.8 ms: 0.300 hours."""
    stages = arithmetic.stages(EIGHT, ASSUMED, 10_000)
    assert stages["collect"].gpu_hours == pytest.approx(10_000 * (0.01869 + 0.02958) / 3600, rel=1e-3)
    assert stages["fit"].gpu_hours == pytest.approx(10_000 * 0.1078 / 3600, rel=1e-3)
    assert stages["evaluate"].gpu_hours == pytest.approx(stages["collect"].gpu_hours / 5), "twice 1,000 conversations"
    ratio = stages["improve all"].gpu_hours / stages["improve"].gpu_hours
    assert ratio == pytest.approx(10_000 / (6 * 512 / 8)), "3,072 prompts are those of 384 conversations"
    million = arithmetic.stages(EIGHT, ASSUMED, 1_000_000)
    assert million["improve"] == stages["improve"], "the step does not grow with the log"
    assert million["fit"].flop == pytest.approx(100 * stages["fit"].flop)


def test_bytes_of_a_log_by_hand():
    """1,000 tokens of 4 bytes and 17 messages of 80: 5,360 bytes."""
    assert arithmetic.log_bytes(ASSUMED, 10_000) == 10_000 * 5_360


@pytest.mark.parametrize(
    ("x", "text"), [(0.0134, "0.013"), (6.52, "6.5"), (15.7, "16"), (131.07, "131"), (39_950.0, "40,000"), (0.0, "0")]
)
def test_figures_have_two_digits_or_three(x: float, text: str):
    assert arithmetic.figure(x) == text


def test_the_page_holds_what_the_script_prints():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    printed = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True).stdout
    *tables, last = re.split(r"\n\n|\n(?=\{)", printed.strip())
    assert len(tables) == 4
    for table in tables:
        assert table in page, table
    rows = json.loads(last)["rows"]
    assert {row["bottleneck"] for row in rows} == {"fit"}, "the page says so"


def test_slower_decoding_makes_collecting_the_longest_stage():
    """As the page says of 1B and 8B."""
    rows = arithmetic.stage_rows(replace(ASSUMED, bandwidth_share=0.1))
    longest = {row["policy"]: row["bottleneck"] for row in rows}
    assert longest == {"1B": "collect", "8B": "collect", "70B": "fit"}
