"""The published PersuasionForGood files as conversations with outcomes, in the log format of `ippo`.

    git clone https://gitlab.com/ucdavisnlp/persuasionforgood
    python examples/persuasion/conversations.py persuasionforgood/data/FullData > conversations.jsonl

A participant persuades another one to donate a part of their pay to a charity; the outcome is whether they did, when
the conversation was over. Source: Wang et al. 2019, Persuasion for Good, arXiv 1906.06725 (data under Apache-2.0).
"""

import argparse
import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

TASK = "You persuade the other person to donate to the charity Save the Children."
_PERSUADER, _PERSUADEE = "0", "1"  # column B4; B2 is the conversation, B6 what was donated
_ROLES = {_PERSUADER: "assistant", _PERSUADEE: "user"}


def conversations(folder: Path) -> Iterator[dict[str, object]]:
    """One record a conversation, from `full_dialog.csv` and `full_info.csv`."""
    donations = {
        row["B2"]: float(row["B6"]) for row in _rows(folder / "full_info.csv") if row["B4"] == _PERSUADEE and row["B6"]
    }
    for id_, lines in itertools.groupby(_rows(folder / "full_dialog.csv"), key=lambda row: row["B2"]):
        messages = [{"role": "system", "content": TASK}]
        for role, turn in itertools.groupby(lines, key=lambda row: _ROLES[row["B4"]]):
            messages.append({"role": role, "content": " ".join(row["Unit"].strip() for row in turn)})
        dollars = donations.get(id_)
        outcome = None if dollars is None else float(dollars > 0)
        yield {"id": id_, "messages": messages, "outcome": outcome, "metadata": {"donation_dollars": dollars}}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def main() -> None:
    """Prints a line of JSON for each conversation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with full_dialog.csv and full_info.csv")
    folder = parser.parse_args().folder
    for name in ("full_dialog.csv", "full_info.csv"):
        if not (folder / name).is_file():
            parser.error(f"{folder / name}: no such file")
    for record in conversations(folder):
        print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main()
