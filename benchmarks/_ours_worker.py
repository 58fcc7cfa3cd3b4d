"""Our side of `ppo_update.py`: times the updates of one improvement step."""

import numpy as np
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

from iterative_ppo.config import ImprovementConfig, PolicyConfig
from iterative_ppo.improvement.native import improve
from iterative_ppo.memory import keep_freed_memory
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, TokenValue
from iterative_ppo.q_reward import q_reward

_TOKENS_PER_BATCH = 4096
_NO_LIMIT = 1e6


def main() -> None:
    """Runs as many updates as ordered."""
    order = Order.from_command_line()
    one_thread()
    keep_freed_memory()  # as `ippo` does
    stopwatch = Stopwatch()
    policy = Policy.load(order.folder / "policy", PolicyConfig(max_response_tokens=RESPONSE_TOKENS))
    never_end(policy.model, policy.tokenizer)
    q_function = QFunction.load(order.folder / "q_function")
    num_samples = 1 if order.algorithm == "ppo" else NUM_SAMPLES
    config = ImprovementConfig(
        algorithm=order.algorithm,
        num_updates=order.all_updates,
        prompts_per_update=NUM_RESPONSES // num_samples,
        num_samples=num_samples,
        num_passes=NUM_PPO_PASSES if order.algorithm == "ppo" else 1,
        num_minibatches=1,
        learning_rate=LEARNING_RATE,
        token_value_learning_rate=LEARNING_RATE,
        gae_lambda=GAE_LAMBDA,
        kl_coefficient=KL_COEFFICIENT,
        adaptive_kl=False,
        kl_in="loss" if order.algorithm == "grpo" else "reward",
        kl_target=_NO_LIMIT,
        early_stop_kl=_NO_LIMIT,
    )
    improvement = improve(
        policy,
        [tuple(policy.tokenizer(text).input_ids) for text in order.prompts()],
        q_reward(q_function, pessimism=0.0, tokens_per_batch=_TOKENS_PER_BATCH),
        config,
        token_value=TokenValue(q_function),
        generator=np.random.default_rng(0),
        tokens_per_batch=_TOKENS_PER_BATCH,
        on_update=lambda *_: stopwatch.update_done(),
    )
    assert improvement.stop_reason == "updates"
    assert all(update.response_tokens == RESPONSE_TOKENS for update in improvement.updates)
    assert all(update.num_passes == config.num_passes for update in improvement.updates)
    stopwatch.report()


if __name__ == "__main__":
    main()
