"""TRL's side of `ppo_update.py`, in an environment of its own: times the updates of one of its trainers.

What costs time and is not the update is off: logging to services, checkpoints, gradient checkpointing, dropout.
"""

import importlib
import tempfile
from typing import Any

from _ppo_task import (
    GAE_LAMBDA,
    KL_COEFFICIENT,
    LEARNING_RATE,
    NUM_PPO_PASSES,
    NUM_RESPONSES,
    NUM_SAMPLES,
    RESPONSE_TOKENS,
    Order,
    Stopwatch,
    never_end,
    one_thread,
)
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


class _EndOfUpdate(TrainerCallback):
    """Tells the stopwatch."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stopwatch.update_done()


def main() -> None:
    """Runs as many updates as ordered."""
    order = Order.from_command_line()
    one_thread()
    is_ppo = order.algorithm == "ppo"
    module = importlib.import_module("trl.experimental.ppo" if is_ppo else "trl")
    name = order.algorithm.upper()
    trainer_class, config_class = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    stopwatch = Stopwatch()
    tokenizer = AutoTokenizer.from_pretrained(order.folder / "policy", padding_side="left")
    model, anchor = (AutoModelForCausalLM.from_pretrained(order.folder / "policy") for _ in range(2))
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(order.folder / "q_function", num_labels=1) for _ in range(2)
    )
    never_end(model, tokenizer)
    never_end(anchor, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        common = {
            "output_dir": scratch,
            "per_device_train_batch_size": NUM_RESPONSES,
            "gradient_accumulation_steps": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "temperature": 1.0,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        if is_ppo:
            trainer = trainer_class(
                args=config_class(
                    **common,
                    num_ppo_epochs=NUM_PPO_PASSES,
                    num_mini_batches=1,
                    total_episodes=order.all_updates * NUM_RESPONSES,
                    response_length=RESPONSE_TOKENS,
                    kl_coef=KL_COEFFICIENT,
                    lam=GAE_LAMBDA,
                    num_sample_generations=0,
                ),
                processing_class=tokenizer,
                model=model,
                ref_model=anchor,
                reward_model=reward_model,
                value_model=value_model,
                train_dataset=Dataset.from_dict({"input_ids": tokenizer(order.prompts()).input_ids}),
                callbacks=[_EndOfUpdate(stopwatch)],
            )
        else:
            trainer = trainer_class(
                model=model,
                reward_funcs=reward_model,
                args=config_class(
                    **common,
                    num_generations=NUM_SAMPLES,
                    max_completion_length=RESPONSE_TOKENS,
                    max_steps=order.all_updates,
                    beta=KL_COEFFICIENT,
                ),
                train_dataset=Dataset.from_dict({"prompt": order.prompts()}),
                processing_class=tokenizer,
                reward_processing_classes=tokenizer,
                callbacks=[_EndOfUpdate(stopwatch)],
            )
        trainer.train()
    stopwatch.report()


if __name__ == "__main__":
    main()
