"""One improvement step of Iterative PPO by TRL's RLOO trainer: `python train.py`, then `ippo import RUN --policy candidate`.

`ippo export` writes this file as it is, beside the policy, the Q-function and the prompts. Needs `trl` 1.16. Other
settings of its `RLOOConfig` are given as arguments: `python train.py bf16=true learning_rate=1e-6`.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from trl import RLOOConfig, RLOOTrainer

HERE = Path(__file__).resolve().parent
EXACT_TEXT = "{{ messages[0].content }}"
MOST_ROWS_AT_ONCE = 16


def main() -> None:
    """Trains from `policy` and writes `candidate`."""
    settings = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))["settings"]
    prompts = load_dataset("json", data_files=str(HERE / "prompts.jsonl"), split="train")
    trainer = RLOOTrainer(
        model=str(HERE / "policy"),  # the reference model is loaded from it too: the anchor is the policy itself
        reward_funcs=q_reward(settings["q_function"]["pessimism"]),
        args=RLOOConfig(**{**arguments(settings, num_prompts=len(prompts)), **given(sys.argv[1:])}),
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(HERE / "policy", padding_side="left"),
    )
    trainer.train()
    trainer.save_model(str(HERE / "candidate"))


def given(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words; a value is JSON, and a string where it is none."""
    values: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def arguments(settings: dict[str, Any], *, num_prompts: int) -> dict[str, Any]:
    """The step's settings, as those of the trainer."""
    step = settings["improvement"]
    num_samples = max(2, step["num_samples"])
    num_minibatches = step["num_minibatches"]
    rows = math.ceil(min(step["prompts_per_update"], num_prompts) / num_minibatches) * num_samples  # of a minibatch
    rows_at_once = max(size for size in range(1, MOST_ROWS_AT_ONCE + 1) if rows % size == 0)
    return {
        "output_dir": str(HERE / "checkpoints"),
        # Each prompt is the text that the policy read, as one message: this template adds nothing to it.
        "chat_template_kwargs": {"chat_template": EXACT_TEXT},
        # E[Q] - beta KL(policy, anchor): the KL is paid in the reward, a response's as one sum.
        "beta": step["kl_coefficient"],
        # The policy is the softmax of its logits over this temperature: top-k or top-p would sample from another one.
        "temperature": settings["policy"]["temperature"],
        "top_p": 1.0,
        "top_k": 0,
        "max_completion_length": settings["policy"]["max_response_tokens"],
        "num_generations": num_samples,
        "epsilon": step["clip"],
        "normalize_advantages": True,
        # As many updates, of as many prompts, in as many passes and minibatches as in our own step.
        "max_steps": step["num_updates"] * num_minibatches * step["num_passes"],
        "num_iterations": step["num_passes"],
        "per_device_train_batch_size": rows_at_once,
        "gradient_accumulation_steps": rows // rows_at_once,
        "steps_per_generation": rows // rows_at_once * num_minibatches,
        "learning_rate": step["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "seed": settings["seed"],
        "disable_dropout": True,
        "bf16": False,  # log-probabilities in float32; True is faster on a large model
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def q_reward(pessimism: float) -> Callable[..., list[float]]:
    """Q of each response, link included: the ensemble's mean minus `pessimism` standard deviations."""
    folder = HERE / "q_function"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).to(device)
    heads = load_file(folder / "heads.safetensors")["heads"].to(device)
    is_logistic = json.loads((folder / "q_function.json").read_text(encoding="utf-8"))["link"] == "logistic"
    end_id = GenerationConfig.from_pretrained(HERE / "policy").eos_token_id

    @torch.no_grad()
    def reward(
        prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **_: object
    ) -> list[float]:
        rewards: list[float] = []
        for start in range(0, len(prompt_ids), MOST_ROWS_AT_ONCE):
            batch = slice(start, start + MOST_ROWS_AT_ONCE)
            rows = [
                # A response cut at the cap is judged as it would be sent: ended.
                [*prompt, *response, *([] if response[-1] == end_id else [end_id])]
                for prompt, response in zip(prompt_ids[batch], completion_ids[batch], strict=True)
            ]
            width = max(map(len, rows))
            tokens = torch.tensor([[*row, *[end_id] * (width - len(row))] for row in rows], device=device)
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # padding comes after
            scalars = hidden[range(len(rows)), [len(row) - 1 for row in rows]].float() @ heads.T
            values = scalars.sigmoid() if is_logistic else scalars
            deviation = values.std(1) if heads.shape[0] > 1 else 0.0
            rewards += (values.mean(1) - pessimism * deviation).tolist()
        return rewards

    return reward


if __name__ == "__main__":
    main()
