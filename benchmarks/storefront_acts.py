"""What a seller of the storefront does once the customer is convinced, from logs: does it keep its options?

A late discount sells to those who like discounts, and most of them asked for a deal in their first message.

    ippo iterate --out runs/a
    python benchmarks/storefront_acts.py runs/a/iteration-00?/collect/conversations.jsonl

Prints a line for each log: how often the next message offers a first discount, after an opening that asked for a deal and after one that
did not. Last, one JSON object.
"""

import argparse
import json
from pathlib import Path

from iterative_ppo.conversation_log import read_conversations
from iterative_ppo.environments.storefront_customer import Act, Says
from iterative_ppo.environments.storefront_parser import read_reply, read_seller

ASKS_FOR_A_DEAL = (Says.OPENS_FOR_DEAL, Says.OPENS_WITH_NEED_FOR_DEAL)


def discount_shares(log: Path) -> dict[str, float]:
    """Share of first discounts among the answers to a convinced customer, by the opening."""
    offers: dict[bool, list[bool]] = {True: [], False: []}
    for conversation in read_conversations(log):
        opening, last, discounted = None, None, False
        for message in conversation.messages:
            if message.role == "user":
                last = read_reply(message.content).says
                opening = opening or last
            elif message.role == "assistant":
                is_offer = read_seller(message.content).act == Act.OFFER_DISCOUNT
                if last == Says.CONVINCED and not discounted:
                    offers[opening in ASKS_FOR_A_DEAL].append(is_offer)
                discounted = discounted or is_offer
    return {
        "asked_for_a_deal": sum(offers[True]) / max(len(offers[True]), 1),
        "did_not": sum(offers[False]) / max(len(offers[False]), 1),
    }


def main() -> None:
    """Reads the logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+")
    rows = []
    for log in parser.parse_args().logs:
        rows.append({"log": str(log), **discount_shares(log)})
        print(
            f"{log}: discount {rows[-1]['asked_for_a_deal']:.3f} after a question for a deal, {rows[-1]['did_not']:.3f} else"
        )
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
