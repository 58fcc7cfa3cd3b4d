"""TRL 1.16: the prompts as JSON Lines; its script is `train.py`, which takes all settings from the export's manifest."""

import json
from pathlib import Path

from iterative_ppo.export.prompts import ExactPrompts


def write_prompts(prompts: ExactPrompts, file: Path) -> None:
    """A prompt a line: one message that holds its text, for a template that adds nothing, and its token ids."""
    with file.open("w", encoding="utf-8") as lines:
        for prompt in prompts.prompts:
            row = {
                "prompt": [{"role": "user", "content": prompt.text}],
                "prompt_ids": prompt.token_ids,
                "id": prompt.id,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
