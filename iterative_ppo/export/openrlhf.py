"""OpenRLHF 0.11: the prompts as JSON Lines, and a launch script for its PPO."""

import json
import math
from pathlib import Path

from iterative_ppo.export.launch import GPUS, HERE, Group, Job, launch_script
from iterative_ppo.export.prompts import ExactPrompts

CANDIDATE = "candidate"
_NO_CLIP = "1000000"


def write_prompts(prompts: ExactPrompts, file: Path) -> None:
    """A prompt a line: its text, which is tokenized with nothing added, its id and its token ids."""
    with file.open("w", encoding="utf-8") as lines:
        for prompt in prompts.prompts:
            row = {"prompt": prompt.text, "id": prompt.id, "prompt_ids": prompt.token_ids}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def launch(job: Job) -> str:
    """The launch script: flags for what the paper needs and OpenRLHF's defaults do not give."""
    return launch_script(
        title="One improvement step of Iterative PPO by OpenRLHF 0.11: token-level PPO with Q as the reward.",
        command="python3 -m openrlhf.cli.train_ppo_ray",
        run=job.run,
        candidate=CANDIDATE,
        groups=[*_what(job), *_objective(job), *_updates(job), *_machines()],
    )


def _what(job: Job) -> list[Group]:
    return [
        Group(
            why="Start and anchor: the reference model is loaded from this folder too, so the KL is to the policy that wrote the prompts.",
            lines=(
                ("--actor.model_name_or_path", f"{HERE}/policy"),
                ("--critic.model_name_or_path", f"{HERE}/critic"),
                ("--ds.value_head_prefix", job.head),
            ),
        ),
        Group(
            why="Q is the reward, as it is: OpenRLHF's clip to (-10, 10) is opened. Or the server itself: $IPPO_Q_URL/get_reward",
            lines=(
                ("--reward.remote_url", f"{HERE}/reward.py"),
                ("--reward.clip_range", f"-{_NO_CLIP}", _NO_CLIP),
            ),
        ),
        Group(
            why="The exact texts that the policy read: no chat template is applied to them. The label is the prompt's id.",
            lines=(
                ("--data.prompt_dataset", f"{HERE}/prompts.jsonl"),
                ("--data.input_key", "prompt"),
                ("--data.label_key", "id"),
                ("--data.max_len", str(job.longest_prompt_tokens + job.policy.max_response_tokens)),
            ),
        ),
        Group(
            why="The policy is the softmax of its logits over this temperature: top-p would sample from another one.",
            lines=(
                ("--rollout.temperature", str(job.policy.temperature)),
                ("--rollout.top_p", "1.0"),
                ("--rollout.n_samples_per_prompt", str(job.improvement.num_samples)),
                ("--rollout.max_new_tokens", str(job.policy.max_response_tokens)),
            ),
        ),
    ]


def _objective(job: Job) -> list[Group]:
    improvement = job.improvement
    return [
        Group(
            why="Token discount 1: below 1 short responses win, and E[Q] is no longer what is maximised. GAE's lambda is ours.",
            lines=(
                ("--algo.advantage.estimator", "gae"),
                ("--algo.advantage.gamma", "1.0"),
                ("--algo.advantage.lambd", str(improvement.gae_lambda)),
            ),
        ),
        Group(
            why="E[Q] - beta KL(policy, anchor), beta fixed: the KL is paid in the reward (no --algo.kl.use_loss, no --algo.kl.target).",
            lines=(
                ("--algo.kl.init_coef", str(improvement.kl_coefficient)),
                ("--algo.kl.estimator", "k1"),
            ),
        ),
        Group(
            why="A mean over all tokens of a batch is the sum over each response's but for a factor; a mean a response would not be.",
            lines=(
                ("--actor.eps_clip", str(improvement.clip)),
                ("--actor.loss_agg_mode", "token-mean"),
            ),
        ),
        Group(
            why="The value loss is not clipped; a learning rate of 0 keeps Q's own reading.",
            lines=(
                ("--critic.value_clip", _NO_CLIP),
                ("--critic.adam.lr", str(improvement.token_value_learning_rate)),
                ("--critic.lr_scheduler", "constant"),
            ),
        ),
    ]


def _updates(job: Job) -> list[Group]:
    improvement = job.improvement
    num_prompts = len(job.prompts.prompts)
    return [
        Group(
            why="The updates of our own step: so many prompts (the file is shuffled), in batches of so many, in so many passes.",
            lines=(
                ("--data.max_samples", str(min(num_prompts, job.num_prompts_asked))),
                ("--train.num_episodes", str(math.ceil(job.num_prompts_asked / num_prompts))),
                ("--rollout.batch_size", str(job.num_prompts_per_update)),
                ("--train.batch_size", str(job.num_prompts_per_minibatch * improvement.num_samples)),
                ("--train.max_epochs", str(improvement.num_passes)),
                ("--train.seed", str(job.seed)),
            ),
        ),
        Group(
            why="Our AdamW: a constant learning rate. It is meant for all weights of a small model: lower it for a large one.",
            lines=(
                ("--actor.adam.lr", str(improvement.learning_rate)),
                ("--actor.adam.betas", "0.9", "0.999"),
                ("--actor.lr_scheduler", "constant"),
            ),
        ),
    ]


def _machines() -> list[Group]:
    return [
        Group(
            why="One node, all models on the same GPUs; the policy is saved once, at the end.",
            lines=(
                ("--actor.num_gpus_per_node", GPUS),
                ("--ref.num_gpus_per_node", GPUS),
                ("--critic.num_gpus_per_node", GPUS),
                ("--vllm.num_engines", GPUS),
                ("--vllm.gpu_memory_utilization", "0.5"),
                ("--vllm.enable_sleep",),
                ("--ds.enable_sleep",),
                ("--train.colocate_all",),
                ("--ckpt.output_dir", f"{HERE}/{CANDIDATE}"),
            ),
        ),
    ]
