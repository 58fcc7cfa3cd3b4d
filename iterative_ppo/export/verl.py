"""verl 0.9: the prompts as parquet, and a launch script for its token-level PPO with a critic."""

from pathlib import Path
from typing import Any

from iterative_ppo.export.launch import GPUS, HERE, Group, Job, launch_script
from iterative_ppo.export.prompts import RAW_TEMPLATE, ExactPrompts

CHECKPOINTS = "checkpoints"
_NO_CLIP = "1000000.0"
_MOST_TOKENS_PER_GPU = 16384


def candidate_folder(job: Job) -> str:
    """Where verl leaves the policy that it trained, below the export's folder."""
    return f"{CHECKPOINTS}/global_step_{job.improvement.num_updates}/actor/huggingface"


def write_prompts(prompts: ExactPrompts, file: Path) -> None:
    """Writes the rows that verl's data set class reads.

    Where not every prompt is what the chat template makes of its messages, each is one message that holds its text, and
    `launch` sets a template that writes it as it stands.
    """
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = [
        {
            "data_source": "iterative_ppo",
            "prompt": [dict(message) for message in prompt.messages]
            if prompts.are_messages and prompt.messages
            else [{"role": "user", "content": prompt.text}],
            "ability": "conversation",
            "reward_model": {"style": "rule", "ground_truth": prompt.id},
            "extra_info": {"index": index, "id": prompt.id, "prompt_ids": list(prompt.token_ids)},
        }
        for index, prompt in enumerate(prompts.prompts)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def launch(job: Job) -> str:
    """The launch script: Hydra overrides for what the paper needs and verl's defaults do not give."""
    return launch_script(
        title="One improvement step of Iterative PPO by verl 0.9: token-level PPO with Q as the reward.",
        command="python3 -m verl.trainer.main_ppo",
        run=job.run,
        candidate=candidate_folder(job),
        groups=[*_what(job), *_objective(job), *_sampling(job), *_updates(job), *_housekeeping(job)],
    )


def _what(job: Job) -> list[Group]:
    prompts = job.prompts
    return [
        Group(
            why="Start and anchor: verl's reference model is this folder too, so the KL is to the policy that wrote the prompts.",
            lines=(
                (f"actor_rollout_ref.model.path={HERE}/policy",),
                (f"critic.model.path={HERE}/critic",),
            ),
        ),
        Group(
            why="Q is the reward, paid once a response at its last token; it holds the future, so no turn is simulated.",
            lines=(
                (f"reward.custom_reward_function.path={HERE}/reward.py",),
                ("reward.custom_reward_function.name=compute_score",),
            ),
        ),
        Group(
            why="The prompts that the policy saw. verl wants a validation file: ippo's gate validates, so here nothing is.",
            lines=(
                (f"data.train_files={HERE}/prompts.parquet",),
                (f"data.val_files={HERE}/prompts.parquet",),
                ("data.val_max_samples=1",),
                ("trainer.val_before_train=False",),
                (f"data.max_prompt_length={job.longest_prompt_tokens}",),
                (f"data.seed={job.seed}",),
            ),
        ),
        *(
            []
            if prompts.are_messages
            else [
                Group(
                    why="Each prompt is the exact text that the policy read, as one message: this template adds nothing to it.",
                    lines=((f'+data.apply_chat_template_kwargs.chat_template="{RAW_TEMPLATE}"',),),
                )
            ]
        ),
    ]


def _objective(job: Job) -> list[Group]:
    improvement = job.improvement
    return [
        Group(
            why="Token discount 1: below 1 short responses win, and E[Q] is no longer what is maximised. GAE's lambda is ours.",
            lines=(
                ("algorithm.adv_estimator=gae",),
                ("algorithm.gamma=1.0",),
                (f"algorithm.lam={improvement.gae_lambda}",),
            ),
        ),
        Group(
            why="E[Q] - beta KL(policy, anchor), beta fixed: the KL is paid in the reward, by the estimator whose mean it is.",
            lines=(
                ("algorithm.use_kl_in_reward=True",),
                ("algorithm.kl_penalty=kl",),
                ("algorithm.kl_ctrl.type=fixed",),
                (f"algorithm.kl_ctrl.kl_coef={improvement.kl_coefficient}",),
                ("actor_rollout_ref.actor.use_kl_loss=False",),
                ("actor_rollout_ref.actor.entropy_coeff=0",),
            ),
        ),
        Group(
            why="PPO's clip alone, without verl's second clip of negative advantages, as the mean over responses of token sums.",
            lines=(
                (f"actor_rollout_ref.actor.clip_ratio={improvement.clip}",),
                (f"actor_rollout_ref.actor.clip_ratio_low={improvement.clip}",),
                (f"actor_rollout_ref.actor.clip_ratio_high={improvement.clip}",),
                (f"actor_rollout_ref.actor.clip_ratio_c={_NO_CLIP}",),
                ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",),
            ),
        ),
        Group(
            why="The value loss is not clipped and is a mean over tokens; a learning rate of 0 keeps Q's own reading.",
            lines=(
                (f"critic.cliprange_value={_NO_CLIP}",),
                ("critic.loss_agg_mode=token-mean",),
                (f"critic.optim.lr={improvement.token_value_learning_rate}",),
                ("critic.optim.weight_decay=0.0",),
            ),
        ),
    ]


def _sampling(job: Job) -> list[Group]:
    return [
        Group(
            why="The policy is the softmax of its logits over this temperature: top-k or top-p would sample from another one.",
            lines=(
                ("actor_rollout_ref.rollout.name=vllm",),
                (f"actor_rollout_ref.rollout.temperature={job.policy.temperature}",),
                ("actor_rollout_ref.rollout.top_p=1.0",),
                ("actor_rollout_ref.rollout.top_k=-1",),
                (f"actor_rollout_ref.rollout.n={job.improvement.num_samples}",),
                (f"actor_rollout_ref.rollout.seed={job.seed}",),
                ("actor_rollout_ref.rollout.tensor_model_parallel_size=1",),
                (f"data.max_response_length={job.policy.max_response_tokens}",),
            ),
        ),
    ]


def _updates(job: Job) -> list[Group]:
    improvement = job.improvement
    tokens_per_gpu = max(_MOST_TOKENS_PER_GPU, job.longest_prompt_tokens + job.policy.max_response_tokens)
    return [
        Group(
            why="The updates of our own step: so many, of so many prompts, in so many passes and minibatches (in prompts).",
            lines=(
                (f"trainer.total_training_steps={improvement.num_updates}",),
                (f"trainer.total_epochs={improvement.num_updates}",),
                (f"data.train_batch_size={job.num_prompts_per_update}",),
                (f"actor_rollout_ref.actor.ppo_mini_batch_size={job.num_prompts_per_minibatch}",),
                (f"actor_rollout_ref.actor.ppo_epochs={improvement.num_passes}",),
                ("actor_rollout_ref.actor.shuffle=True",),
                (f"actor_rollout_ref.actor.data_loader_seed={job.seed}",),
                (f"critic.data_loader_seed={job.seed}",),
            ),
        ),
        Group(
            why="Our learning rate, without weight decay. It is meant for all weights of a small model: lower it for a large one.",
            lines=(
                (f"actor_rollout_ref.actor.optim.lr={improvement.learning_rate}",),
                ("actor_rollout_ref.actor.optim.weight_decay=0.0",),
            ),
        ),
        Group(
            why="Micro-batches by tokens: their size is left to verl.",
            lines=(
                ("actor_rollout_ref.actor.use_dynamic_bsz=True",),
                (f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens_per_gpu}",),
            ),
        ),
    ]


def _housekeeping(job: Job) -> list[Group]:
    return [
        Group(
            why="One node; the policy is saved once, after the last update, as a transformers folder too.",
            lines=(
                (f"trainer.n_gpus_per_node={GPUS}",),
                ("trainer.nnodes=1",),
                ("trainer.logger=[console]",),
                ("trainer.project_name=iterative_ppo",),
                (f"trainer.default_local_dir={HERE}/{CHECKPOINTS}",),
                (f"trainer.save_freq={job.improvement.num_updates}",),
                ("actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",),
                ("actor_rollout_ref.actor.checkpoint.load_contents=[model,optimizer,extra]",),
            ),
        ),
    ]
