"""What a seller of the storefront gives away, and where, from logs: each response against the best one.

The dynamic programme knows what every meaning is worth to a seller who has heard what this one has heard and is optimal
from there on. The best worth less that of what was said, added up over a conversation, is on average the optimum less the
seller's own rate (the performance difference lemma, Kakade and Langford 2002).

    ippo iterate --out runs/a
    python benchmarks/storefront_regret.py runs/a/iteration-005/collect/conversations.jsonl

Prints the sum a conversation, and its largest parts: what the customer had said, what the seller did, what was best. Last, one JSON object.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from iterative_ppo.conversation_log import read_conversations
from iterative_ppo.conversations import Conversation
from iterative_ppo.environments.storefront_customer import Act, Progress, Reply, Says, advance
from iterative_ppo.environments.storefront_optimum import Seller, canonical, openings, replies, values
from iterative_ppo.environments.storefront_parser import read_reply, read_seller

Situation = tuple[str, str, str]


def regrets(conversation: Conversation, *, max_turns: int) -> Iterator[tuple[Situation, float]]:
    """Of each response what had been said, what was done, what was best, and what the difference is worth."""
    exact = values(max_turns)
    belief, progress, heard, meaning, on_table = None, Progress(), Reply(Says.OTHER_WORRY), None, None
    for message in conversation.messages:
        if message.role == "user":
            heard = read_reply(message.content)
            if heard.says in (Says.BUYS, Says.LEAVES):
                return
            if belief is None:
                belief = openings()[heard].belief
            else:
                assert meaning is not None
                belief = replies(belief, progress, meaning)[heard].belief
                progress = advance(progress, heard)
        elif message.role == "assistant":
            assert belief is not None
            meaning = read_seller(message.content, on_table)
            if meaning.act == Act.RECOMMEND:
                on_table = meaning
            best = exact.best_meaning(Seller.OPTIMAL, canonical(belief), progress)
            regret = exact.value(Seller.OPTIMAL, belief, progress) - exact.q_value(
                Seller.OPTIMAL, belief, progress, meaning
            )
            done: str = meaning.act
            if meaning.act == best.act == Act.RECOMMEND and regret > 1e-9:
                needs = {customer.need for customer, _ in belief}
                done += " the wrong kind" if len(needs) == 1 and meaning.need not in needs else " another shoe"
            yield (heard.says, done, best.act), regret


def main() -> None:
    """Reads the logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--max-turns", type=int, default=10, help="of the environment")
    parser.add_argument("--lines", type=int, default=12, help="largest parts shown")
    arguments = parser.parse_args()
    rows = []
    for log in arguments.logs:
        lost: Counter[Situation] = Counter()
        times: Counter[Situation] = Counter()
        num_conversations = 0
        for conversation in read_conversations(log):
            num_conversations += 1
            for situation, regret in regrets(conversation, max_turns=arguments.max_turns):
                lost[situation] += regret
                times[situation] += 1
        total = sum(lost.values()) / num_conversations
        print(f"{log}: {total:.3f} a conversation given away, in {num_conversations:,} conversations")
        parts = []
        for situation, regret in lost.most_common(arguments.lines):
            said, done, best = situation
            parts.append({"said": said, "done": done, "best": best, "times": times[situation]})
            parts[-1]["regret"] = regret / num_conversations
            print(f"  {regret / num_conversations:.4f} in {times[situation]:5,}: {said}; {done}; best: {best}")
        rows.append({"log": str(log), "regret": total, "conversations": num_conversations, "parts": parts})
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
