"""Run by verl's own interpreter: what verl 0.9 makes of an export, and its formulas beside ours on shared random arrays.

    python verl_checks.py EXPORT OVERRIDES.json      with IPPO_Q_URL set and this repository on PYTHONPATH

Nothing here needs a GPU: verl's configuration, data set class, prompt builder, reward manager and core algorithms do not.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import migrate_legacy_reward_impl
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.utils import create_rl_dataset, need_critic, need_reference_policy
from verl.utils import hf_tokenizer
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from iterative_ppo import losses


def composed(overrides: list[str]) -> DictConfig:
    """verl's configuration as its trainer composes it."""
    folder = str(Path(verl.__file__).parent / "trainer/config")
    with initialize_config_dir(config_dir=folder, version_base=None):
        config = compose(config_name="ppo_trainer", overrides=overrides)
    return migrate_legacy_reward_impl(config)


def check_configuration(overrides: list[str]) -> None:
    """Every override names a setting that verl knows, the whole is valid, and what a user adds comes last and wins."""
    config = composed([*overrides, "actor_rollout_ref.actor.optim.lr=1e-6"])
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6
    config = composed(overrides)
    OmegaConf.resolve(config)
    assert need_reference_policy(config), "the KL needs its anchor"
    assert need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=True)
    assert config.algorithm.kl_ctrl.kl_coef == core_algos.get_kl_controller(config.algorithm.kl_ctrl).value
    assert config.critic.loss_agg_mode == "token-mean"
    assert config.critic.ppo_epochs == config.actor_rollout_ref.actor.ppo_epochs


def check_prompts(config: DictConfig, policy: Path) -> list[dict[str, Any]]:
    """verl's data set class keeps every prompt, and its prompt builder makes the token ids that the policy read."""
    tokenizer = hf_tokenizer(str(policy))
    dataset = create_rl_dataset(config.data.train_files, config.data, tokenizer, None)
    builder = create_continuous_token_builder(
        tokenizer,
        hf_model_type=AutoConfig.from_pretrained(policy).model_type,
        chat_template_kwargs=OmegaConf.to_container(config.data.apply_chat_template_kwargs),
    )
    manifest = json.loads((policy.parent / "manifest.json").read_text())
    rows = [dataset[i] for i in range(len(dataset))]
    assert len(rows) == manifest["num_prompts"]
    for row in rows:
        assert builder.build_initial_tokens(row["raw_prompt"]) == list(row["extra_info"]["prompt_ids"])
        assert len(row["extra_info"]["prompt_ids"]) <= config.data.max_prompt_length
    validation = create_rl_dataset(config.data.val_files, config.data, tokenizer, None, max_samples=1)
    assert len(validation) == 1
    return rows


def check_models(export: Path) -> None:
    """verl's version of transformers loads the folders."""
    AutoModelForCausalLM.from_pretrained(export / "policy")
    critic = AutoModelForTokenClassification.from_pretrained(export / "critic", num_labels=1)
    expected = json.loads((export / "manifest.json").read_text())["critic"]
    assert abs(float(critic.score.bias) - expected["bias"]) < 1e-6
    assert float(critic.score.weight.abs().max()) > 0


def check_reward(config: DictConfig, policy: Path, rows: list[dict[str, Any]]) -> None:
    """verl's reward manager gets Q of each response, and pays it at the response's last token."""
    tokenizer = hf_tokenizer(str(policy))
    manager = load_reward_manager(config, tokenizer)
    texts = ["hello", "which size do you need?"]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    width = max(map(len, tokens)) + 2
    responses = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
    data = DataProto.from_dict(
        tensors={
            "prompts": torch.ones(2, 3, dtype=torch.long),
            "responses": responses,
            "attention_mask": torch.cat([torch.ones(2, 3, dtype=torch.long), mask], dim=1),
        },
        non_tensors={
            name: np.array([row[name] for row in rows[:2]], dtype=object)
            for name in ("data_source", "reward_model", "extra_info")
        },
    )
    scores = [
        manager.loop.run_until_complete(manager.run_single(data[i : i + 1]))["reward_score"] for i in range(len(texts))
    ]
    assert scores == [float(len(text)) for text in texts], "the server of the test says a response's length"
    token_rewards = manager.assemble_rm_scores(data, scores)
    expected = losses.terminal_token_reward(torch.tensor(scores), mask.bool())
    assert torch.equal(token_rewards, expected)


def check_losses(config: DictConfig) -> None:
    """GAE, clipped surrogate, value loss and KL of verl, as the export sets them, are ours; as verl sets them, some are not."""
    actor, critic = omega_conf_to_dataclass(config.actor_rollout_ref.actor), config.critic
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9)[None, :] < torch.tensor([9, 4, 1, 7, 2, 6])[:, None]

    def random(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(mask.shape, generator=generator)

    reward, value, new_value = random(), random(), random()
    for lambda_ in (config.algorithm.lam, 0.9):
        advantage, returns = core_algos.compute_gae_advantage_return(
            reward * mask, value * mask, mask.float(), config.algorithm.gamma, lambda_
        )
        ours = losses.generalized_advantage_estimation(reward, value, mask, lambda_=lambda_)
        close(((returns - value) * mask), ours)
        scaled = losses.normalize_advantages(ours, mask)
        ratio = advantage[mask] / scaled[mask]
        close(ratio, ratio[0].expand_as(ratio), tolerance=1e-3)  # the deviation with n - 1 in place of n

    logprob, old, anchor, advantage = random(0.8) - 3, random(0.8) - 3, random(0.8) - 3, random()
    ours = losses.clipped_surrogate(logprob, old, advantage, mask, clip=actor.clip_ratio)

    def surrogate(**changes: Any) -> torch.Tensor:
        changed = OmegaConf.merge(config.actor_rollout_ref.actor, changes)
        return core_algos.compute_policy_loss_vanilla(
            old, logprob, advantage, mask.float(), changed.loss_agg_mode, omega_conf_to_dataclass(changed)
        )[0]

    close(surrogate(), ours)
    differs(surrogate(loss_agg_mode="token-mean"), ours)
    differs(surrogate(clip_ratio_c=3.0), ours)

    def value_loss(cliprange: float, mode: str) -> torch.Tensor:
        return core_algos.compute_value_loss(new_value, returns, value, mask.float(), cliprange, mode)[0]

    ours = losses.token_value_loss(new_value, returns, mask)
    close(value_loss(critic.cliprange_value, critic.loss_agg_mode), ours)
    differs(value_loss(0.5, critic.loss_agg_mode), ours)
    differs(value_loss(critic.cliprange_value, "seq-mean-token-sum"), ours)

    close(core_algos.kl_penalty(logprob, anchor, config.algorithm.kl_penalty), losses.kl_k1(logprob, anchor))
    close(core_algos.kl_penalty(logprob, anchor, "k3"), losses.kl_k3(logprob, anchor))
    data = DataProto.from_dict(
        tensors={
            "response_mask": mask.float(),
            "token_level_scores": reward * mask,
            "old_log_probs": logprob,
            "ref_log_prob": anchor,
        }
    )
    controller = core_algos.get_kl_controller(config.algorithm.kl_ctrl)
    paid, _ = apply_kl_penalty(data, kl_ctrl=controller, kl_penalty=config.algorithm.kl_penalty)
    beta = config.algorithm.kl_ctrl.kl_coef
    close(paid.batch["token_level_rewards"], (reward - beta * losses.kl_k1(logprob, anchor)) * mask)
    assert controller.value == beta, "beta is fixed"


def close(theirs: torch.Tensor, ours: torch.Tensor, *, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)


def differs(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    assert abs(float(theirs) - float(ours)) > 1e-3, "another setting gives the same: this check shows nothing"


def main() -> None:
    export, overrides = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    check_configuration(overrides)
    config = composed(overrides)
    rows = check_prompts(config, export / "policy")
    checks: list[Callable[[], None]] = [
        lambda: check_models(export),
        lambda: check_reward(config, export / "policy", rows),
        lambda: check_losses(config),
    ]
    for check in checks:
        check()
    print("all checks passed")


if __name__ == "__main__":
    main()
