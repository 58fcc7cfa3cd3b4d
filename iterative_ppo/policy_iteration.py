"""Iterative PPO: policy iteration for conversations, each improvement an ordinary single-turn RLHF problem.

Jiang, Bhandari, Yang, Munos and Lu 2025, arXiv 2511.21638, Algorithm 1, with a gate on the true outcome.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from iterative_ppo.intervals import Interval
from iterative_ppo.run_directory import Stage
from iterative_ppo.stages import Stages


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationRecord:
    """What one iteration did. Iteration 0 is the start policy.

    Example:
        IterationRecord(iteration=1, outcome=Interval(mean=.5, low=.47, high=.53), candidate=Interval(...),
            difference=Interval(...), decision="promote", kl=0.29, num_conversations=2048, stages={"collect": ...})
    """

    iteration: int
    outcome: Interval
    """Mean total reward of the policy in force after the decision, on this iteration's evaluation conversations."""
    candidate: Interval | None
    difference: Interval | None
    decision: str
    """`start`, `promote` or `hold`."""
    kl: float
    """KL(candidate ‖ current policy) in nats a response."""
    num_conversations: int
    """Conversations so far, the gate's included."""
    stages: dict[str, Stage]
    policy: Stage
    """Whose folder holds the policy in force after the decision."""


def iterate(stages: Stages, *, count: int) -> Iterator[IterationRecord]:
    """Collect, fit, improve, evaluate, promote or hold; `count` times. Yields a record after each iteration.

    Q learns from all conversations that the policy in force has had: those collected, and those by which the gate chose
    it, since a test of a policy is data for its Q-function. After a hold the next fit goes on with those it has not read.
    """
    policy = stages.start()
    evaluation = stages.evaluate(0, policy, None)
    num_conversations = evaluation.metrics["num_conversations"]
    yield _record(0, policy, num_conversations, {"start": policy, "evaluate": evaluation})

    q_function = policy  # what the next Q starts from
    read: tuple[Stage, ...] = ()  # the conversations of the policy in force that Q has been fitted to
    for iteration in range(1, count + 1):
        batch = stages.collect(iteration, policy)
        unread = (evaluation, batch)
        q_function = stages.fit(iteration, policy, read, unread, q_function)
        read = (*read, *unread)
        candidate = stages.improve(iteration, policy, q_function, read)
        evaluation = stages.evaluate(iteration, policy, candidate)
        if evaluation.metrics["decision"] == "promote":
            policy, read = candidate, ()
        num_conversations += batch.metrics["num_conversations"] + evaluation.metrics["num_conversations"]
        done = {"collect": batch, "fit": q_function, "improve": candidate, "evaluate": evaluation}
        yield _record(iteration, policy, num_conversations, done)


def _record(iteration: int, policy: Stage, num_conversations: int, stages: dict[str, Stage]) -> IterationRecord:
    metrics = stages["evaluate"].metrics
    decision = metrics.get("decision", "start")
    return IterationRecord(
        iteration=iteration,
        outcome=Interval(**metrics["candidate" if decision == "promote" else "current"]),
        candidate=Interval(**metrics["candidate"]) if "candidate" in metrics else None,
        difference=Interval(**metrics["difference"]) if "difference" in metrics else None,
        decision=decision,
        kl=stages["improve"].metrics["kl"] if "improve" in stages else 0.0,
        num_conversations=num_conversations,
        stages=stages,
        policy=policy,
    )
