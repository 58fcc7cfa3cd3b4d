"""The improvement step by TRL: its RLOO or GRPO trainer, with the reward handed in and the policy as its anchor.

TRL samples, rewards, pays the KL and takes the gradient steps; what it does not have is a KL budget. So after each update
the KL to the anchor is measured here, and the step ends where the native one would. RLOO pays for the KL in the reward
(k1), which has the right gradient; GRPO adds k3 to the loss of each token, which does not know that a token also decides
what is paid later: `ippo conformance` shows what that costs.

Prompts are handed over by their number and looked up as token ids, so that no text stands between them and the policy.
"""

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from iterative_ppo import adapters
from iterative_ppo.config import ImprovementConfig
from iterative_ppo.improvement.base import Improvement, RewardFunction, UpdateMetrics
from iterative_ppo.improvement.responses import (
    Responses,
    fresh_responses,
    num_responses_for_kl,
    paced_kl_coefficient,
    prompt_batches,
    stop_reason,
)
from iterative_ppo.policy import Policy
from iterative_ppo.rendering import TokenIds
from iterative_ppo.supervised import Progress, no_progress, restore_weights, trained_weights

_PEFT_PREFIX = "base_model.model."


def improve(
    policy: Policy,
    prompts: Sequence[TokenIds],
    reward: RewardFunction,
    config: ImprovementConfig,
    *,
    generator: np.random.Generator,
    tokens_per_batch: int,
    progress: Progress = no_progress,
) -> Improvement:
    """One single-turn improvement step from `policy`, which is also the anchor of the KL.

    Of the configuration, what belongs to a token value and to the passes' early stop is not used, and `kl_in` is
    `reward` for RLOO and `loss` for GRPO, whatever it says.

    Args:
        policy: start and anchor; not changed. TRL trains a copy of it and keeps another.
        prompts: token ids of each prompt.
        reward: scores whole responses, each with its end-of-response token.
        generator: all randomness of the step.
        tokens_per_batch: padded tokens in one forward and backward pass.

    Raises:
        ValueError: the algorithm is one that TRL does not have, or the reward is not finite.
    """
    [initialization] = generator.spawn(1)
    seed = int(initialization.integers(2**31))
    candidate = policy.branch(seed=seed)
    devices = [] if policy.device.type == "cpu" else [policy.device]
    with (
        tempfile.TemporaryDirectory() as scratch,
        torch.random.fork_rng(devices),
        warnings.catch_warnings(category=FutureWarning, action="ignore"),  # of names that TRL uses
    ):
        candidate.save(Path(scratch) / "policy")
        trainer = _trainer(
            candidate, prompts, reward, config, Path(scratch), seed=seed, tokens_per_batch=tokens_per_batch
        )
        watch = _Watch(trainer, candidate, policy, prompts, config, generator, tokens_per_batch, progress)
        trainer.add_callback(watch)
        trainer.train()
    return watch.result()


def _trainer(
    candidate: Policy,
    prompts: Sequence[TokenIds],
    reward: RewardFunction,
    config: ImprovementConfig,
    scratch: Path,
    *,
    seed: int,
    tokens_per_batch: int,
) -> RLOOTrainer | GRPOTrainer:
    """TRL's trainer of the policy that was saved in `scratch`, which it also takes as its reference model."""
    own: dict[str, Any] = {}
    match config.algorithm:
        case "rloo":
            trainer_class, config_class = RLOOTrainer, RLOOConfig
        case "grpo":
            trainer_class, config_class = GRPOTrainer, GRPOConfig
            # Tokens are summed and divided by a constant: a mean over each response's tokens would prefer some lengths.
            own = {"loss_type": "dr_grpo", "scale_rewards": "group"}
        case _:
            raise ValueError(
                'TRL has no PPO (its trainer ended with 1.12): set improvement.algorithm = "rloo" or "grpo"'
            )
    num_rows = config.prompts_per_update * config.num_samples // config.num_minibatches
    longest = max(map(len, prompts)) + candidate.config.max_response_tokens
    num_parts = _num_parts(num_rows, max(1, tokens_per_batch // longest))
    trainer = trainer_class(
        model=_model_from(scratch / "policy", candidate),
        processing_class=_tokenizer_of_numbers(candidate, prompts),
        reward_funcs=_reward_function(candidate, prompts, reward),
        train_dataset=Dataset.from_dict({"prompt": _numbers(prompts, config)}),
        args=config_class(
            output_dir=str(scratch / "trl"),
            seed=seed,
            max_steps=config.num_updates * config.num_passes * config.num_minibatches,
            per_device_train_batch_size=num_rows // num_parts,
            gradient_accumulation_steps=num_parts,
            steps_per_generation=num_parts * config.num_minibatches,
            num_iterations=config.num_passes,
            num_generations=config.num_samples,
            max_completion_length=candidate.config.max_response_tokens,
            temperature=candidate.temperature,
            beta=config.kl_coefficient,
            epsilon=config.clip,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            activation_checkpointing=candidate.model.is_activation_checkpointing,
            bf16=False,
            use_cpu=candidate.device.type == "cpu",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **own,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _num_parts(num_rows: int, most_rows: int) -> int:
    """The fewest equal parts of at most `most_rows` rows."""
    return next(parts for parts in range(1, num_rows + 1) if num_rows % parts == 0 and num_rows // parts <= most_rows)


def _numbers(prompts: Sequence[TokenIds], config: ImprovementConfig) -> list[str]:
    """The prompts' numbers, all equally often, at least as many as an update takes: TRL skips a batch that is not full."""
    return [str(number) for number in range(len(prompts))] * math.ceil(config.prompts_per_update / len(prompts))


def _model_from(folder: Path, candidate: Policy) -> PreTrainedModel | PeftModel:
    """The saved policy as TRL wants it: it makes its reference model from the same folder, or from the same adapter."""
    base = adapters.base_of(folder)
    dtype = candidate.model.dtype if base else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=dtype).to(candidate.device)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True) if base else model


def _tokenizer_of_numbers(policy: Policy, prompts: Sequence[TokenIds]) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, but for what it is called with: a prompt's number, for which it gives the prompt."""
    tokenizer = copy.deepcopy(policy.tokenizer)

    class TokenizerOfNumbers(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(prompts[int(number)]) for number in text]}

    tokenizer.__class__ = TokenizerOfNumbers
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(policy.pad_id)
    # TRL ends a response at the tokenizer's end-of-sequence token, too.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(policy.renderer.end_id)
    return tokenizer


def _reward_function(
    policy: Policy, all_prompts: Sequence[TokenIds], reward: RewardFunction
) -> Callable[..., list[float]]:
    """The reward as TRL calls it: with the prompts' numbers and the responses' tokens."""

    def reward_of_responses(
        prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: object
    ) -> list[float]:
        ended = [policy.renderer.ended(tuple(ids)) for ids in completion_ids]
        reward_B = reward([all_prompts[int(number)] for number in prompts], ended)
        if not torch.isfinite(reward_B).all():  # TRL would leave these responses out and go on
            raise ValueError("the reward function returned a value that is not finite")
        return reward_B.tolist()

    return reward_of_responses


class _Watch(TrainerCallback):
    """Measures the KL after each update and stops TRL at the budget, or where the policy collapses."""

    def __init__(
        self,
        trainer: RLOOTrainer | GRPOTrainer,
        candidate: Policy,
        anchor: Policy,
        prompts: Sequence[TokenIds],
        config: ImprovementConfig,
        generator: np.random.Generator,
        tokens_per_batch: int,
        progress: Progress,
    ) -> None:
        self.trainer = trainer
        self.candidate = candidate
        self.anchor = anchor
        self.config = config
        self.generator = generator
        self.tokens_per_batch = tokens_per_batch
        self.progress = progress
        self.batches = prompt_batches(prompts, config, generator)
        self.steps_per_update = config.num_passes * config.num_minibatches
        self.first_log: Mapping[str, float] = {}
        self.good_weights = trained_weights(candidate.model)
        self.responses = self._fresh()
        self.updates: list[UpdateMetrics] = []
        self.stop_reason = "updates"

    def on_log(
        self, _args: object, state: TrainerState, control: TrainerControl, logs: Mapping[str, float], **_: object
    ) -> None:
        """Called after every optimizer step, with its metrics."""
        if "reward" in logs:
            self.first_log = logs
        if "entropy" in logs and state.global_step % self.steps_per_update == 0:
            control.should_training_stop = self._update_done(logs)

    def result(self) -> Improvement:
        """The candidate and what is known about it."""
        self.candidate.model.eval()
        kl = self.responses.kl if self.stop_reason == "updates" else self._fresh().kl
        return Improvement(candidate=self.candidate, updates=tuple(self.updates), kl=kl, stop_reason=self.stop_reason)

    def _update_done(self, logs: Mapping[str, float]) -> bool:
        """Notes the update, looks at the policy that came of it, and says whether the step ends here."""
        before = self.responses
        self.updates.append(
            UpdateMetrics(
                update=len(self.updates),
                reward_mean=self.first_log["reward"],
                kl=before.kl,
                kl_k1=before.kl_k1,
                kl_coefficient=self.trainer.beta,
                entropy=logs["entropy"],
                clip_fraction=logs["clip_ratio/region_mean"],
                explained_variance=math.nan,
                response_tokens=self.first_log["completions/mean_length"],
                num_passes=self.config.num_passes,
            )
        )
        restore_weights(self.candidate.model, _trained_weights(self.trainer.model))
        self.responses = self._fresh()
        ended = stop_reason(
            self.candidate,
            self.responses,
            self.updates,
            self.config,
            good_weights=self.good_weights,
            fresh=self._fresh,
        )
        if ended:
            self.stop_reason = ended
        else:
            self.good_weights = trained_weights(self.candidate.model)
            if self.config.adaptive_kl:
                self.trainer.beta = paced_kl_coefficient(
                    self.trainer.beta, self.responses.kl, len(self.updates), self.config
                )
        last, done, total = self.updates[-1], len(self.updates), self.config.num_updates
        self.progress(f"improve (reward {last.reward_mean:.3f}, KL {self.responses.kl:.3f})", done, total)
        return self.stop_reason != "updates"

    def _fresh(self) -> Responses:
        return fresh_responses(
            self.candidate,
            self.anchor,
            self.batches,
            num_responses_for_kl(self.config),
            generator=self.generator,
            tokens_per_batch=self.tokens_per_batch,
        )


def _trained_weights(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """The weights that TRL trains, under the names that they have in the policy."""
    return {name.removeprefix(_PEFT_PREFIX): weight for name, weight in trained_weights(model).items()}
