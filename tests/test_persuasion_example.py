"""The example's converter of the published files, on files of their form."""

import json
import subprocess
import sys
from pathlib import Path

from iterative_ppo.conversation_log import read_conversations

SCRIPT = Path(__file__).parent.parent / "examples" / "persuasion" / "conversations.py"
DIALOG = """,Unit,Turn,B4,B2
0,Good evening,0,0,one_live
1,"Hello, who is ""there""?",0,1,one_live
2,I collect for children. ,1,0,one_live
3,Will you give?,1,0,one_live
4,$1,1,1,one_live
0,Hi,0,0,two_live
1,No,0,1,two_live
0,Hi,0,0,three_live
"""
INFO = """B2,B3,B4,B6,B7
one_live,user_1,0,0.0,2
one_live,user_2,1,1.0,2
two_live,user_3,0,2.0,1
two_live,user_4,1,0.0,1
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)


def test_the_published_files_become_conversations_with_what_the_persuaded_one_gave(tmp_path: Path):
    (tmp_path / "full_dialog.csv").write_text(DIALOG)
    (tmp_path / "full_info.csv").write_text(INFO)
    log = tmp_path / "conversations.jsonl"
    log.write_text(run(tmp_path).stdout)
    one, two, three = (json.loads(line) for line in log.read_text().splitlines())
    assert [(m["role"], m["content"]) for m in one["messages"][1:]] == [
        ("assistant", "Good evening"),
        ("user", 'Hello, who is "there"?'),
        ("assistant", "I collect for children. Will you give?"),
        ("user", "$1"),
    ]
    assert (one["id"], one["outcome"], one["metadata"]) == ("one_live", 1.0, {"donation_dollars": 1.0})
    assert two["outcome"] == 0.0, "what the persuader gave is not the outcome"
    assert three["outcome"] is None, "nothing is known of it"
    assert [conversation.outcome for conversation in read_conversations(log)] == [1.0, 0.0, None]


def test_a_folder_without_the_files_is_refused_by_name(tmp_path: Path):
    result = run(tmp_path)
    assert result.returncode == 2
    assert "full_dialog.csv: no such file" in result.stderr
