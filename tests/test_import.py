"""A policy that another stack trained goes back into its run: measured, gated like any other; what does not fit is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from logs import write_lines
from test_cli import Finished, run, sets, shop, synthetic_log
from transformers import AutoTokenizer

from iterative_ppo.config import PolicyConfig
from iterative_ppo.open_step import find_open_step
from iterative_ppo.policy import Policy

CONFIG = PolicyConfig(max_response_tokens=12)
EXTERNAL = sets(
    environment__entry_point="shop:Shop",
    improvement__backend="external",
    iterations__count=2,
    iterations__conversations=64,
    evaluation__conversations=64,
)
STEP = "iteration-001/improve"


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that waits for its first improvement step, and that step's export."""
    folder = shop(tmp_path_factory.mktemp("external"))
    finished = run("iterate", "--out", "run", "--json", *EXTERNAL, folder=folder)
    assert finished.code == 0, finished.stderr
    assert finished.json["waiting_for"] == STEP
    assert run("export", "openrlhf", "run", "--out", "export", folder=folder).code == 0
    return folder


@pytest.fixture
def copy(waiting: Path, tmp_path: Path) -> Path:
    shutil.copytree(waiting, tmp_path / "copy")
    return tmp_path / "copy"


def train(folder: Path, out: str) -> Path:
    """What another stack does: here our own step, on what the export names, saved as a plain folder."""
    log = "run/iteration-001/collect/conversations.jsonl"
    q_function = "run/iteration-001/fit/q_function"
    command = ("improve", "--logs", log, "--policy", "export/policy", "--q", q_function, "--out", out)
    more = sets(environment__entry_point="shop:Shop", improvement__num_updates=4, improvement__learning_rate=2e-3)
    finished = run(*command, *more, folder=folder)
    assert finished.code == 0, finished.stderr
    return folder / out


def refused(finished: Finished) -> str:
    assert finished.code == 2, finished.stdout + finished.stderr
    [complaint] = finished.complaints
    return complaint


# ---- The loop with another stack in it ----


def test_a_run_stops_before_the_step_and_says_what_comes_next(waiting: Path) -> None:
    finished = run("iterate", "run/config.toml", "--out", "run", "--resume", "--json", folder=waiting)
    assert finished.code == 0, finished.stderr
    assert "ippo export verl|openrlhf|trl run --out EXPORT" in finished.stdout
    assert "ippo import run --policy CANDIDATE" in finished.stdout
    assert "ippo iterate run/config.toml --out run --resume" in finished.stdout
    assert finished.json["waiting_for"] == STEP
    assert [record["iteration"] for record in finished.json["iterations"]] == [0]
    assert not (waiting / "run" / STEP).exists()


def test_the_loop_goes_on_with_the_imported_policy_to_the_gate_and_to_the_next_step(copy: Path) -> None:
    candidate = train(copy, "export/candidate")
    imported = run("import", "run", "--policy", candidate, "--json", folder=copy)
    assert imported.code == 0, imported.stderr
    assert "ippo iterate run/config.toml --out run --resume" in imported.stdout
    assert imported.json["kl"] > 0.001
    # 64 conversations give a Q that hardly tells responses apart: the candidate's figure is another, not always a higher one.
    assert 0 < imported.json["reward_last"] < 1
    assert imported.json["reward_last"] != imported.json["reward_first"]
    manifest = json.loads((copy / "run" / STEP / "manifest.json").read_text())
    assert manifest["metrics"]["source"] == str(candidate / "policy")
    assert list(manifest["parents"]) == ["policy", "q_function", "batch_0", "batch_1"]
    taken = Policy.load(copy / "run" / STEP / "policy", CONFIG)
    given = Policy.load(candidate / "policy", CONFIG)
    assert tiny.largest_difference(tiny.weights(taken.model), tiny.weights(given.model)) == 0

    resumed = run("iterate", "run/config.toml", "--out", "run", "--resume", "--json", folder=copy)
    assert resumed.code == 0, resumed.stderr
    [_, first] = resumed.json["iterations"]
    assert first["decision"] in ("promote", "hold")
    assert first["kl"] == imported.json["kl"]
    assert resumed.json["waiting_for"] == "iteration-002/improve"
    assert find_open_step(copy / "run").name == "iteration-002/improve"

    assert "was exported for iteration-001/improve" in refused(
        run("import", "run", "--policy", "export/candidate", folder=copy)
    )
    assert run("export", "trl", "run", "--out", "second", folder=copy).code == 0
    assert run("import", "run", "--policy", "second/policy", folder=copy).code == 0
    final = run("iterate", "run/config.toml", "--out", "run", "--resume", "--json", folder=copy)
    assert final.code == 0, final.stderr
    assert [record["iteration"] for record in final.json["iterations"]] == [0, 1, 2]
    assert final.json["iterations"][2]["decision"] == "hold", "the policy itself is no better than it"
    assert final.json["final"]["outcome_rate"] >= 0


def test_an_import_of_the_policy_itself_measures_no_kl(copy: Path) -> None:
    imported = run("import", "run", "--policy", "export/policy", "--json", folder=copy)
    assert imported.code == 0, imported.stderr
    assert imported.json["kl"] == pytest.approx(0, abs=1e-6)
    assert imported.json["reward_first"] == imported.json["reward_last"]
    assert "beyond the budget" not in imported.stdout
    assert "is made already" in refused(run("import", "run", "--policy", "export/policy", folder=copy))


def test_the_same_import_gives_the_same_figures_and_one_beyond_the_budget_is_said(copy: Path) -> None:
    noisy = Policy.load(copy / "export/policy", CONFIG)
    with torch.no_grad():
        for weight in noisy.model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    noisy.save(copy / "noisy")
    first = run("import", "run", "--policy", "noisy", "--json", folder=copy)
    assert first.code == 0, first.stderr
    assert first.json["kl"] > first.json["kl_target"]
    assert "beyond the budget of 0.3" in first.stdout
    shutil.rmtree(copy / "run" / STEP)
    assert run("import", "run", "--policy", "noisy", "--json", folder=copy).json == first.json


def test_a_run_whose_settings_make_the_step_here_can_be_handed_over_too(copy: Path) -> None:
    """Interrupted before the step: the import takes its place."""
    config = copy / "run/config.toml"
    config.write_text(config.read_text().replace('backend = "external"', 'backend = "native"'))
    assert run("export", "openrlhf", "run", "--out", "again", folder=copy).code == 0
    assert run("import", "run", "--policy", "again/policy", folder=copy).code == 0


def test_a_step_from_logs_waits_and_goes_on_to_its_evidence(tmp_path: Path) -> None:
    synthetic_log(tmp_path / "log.jsonl", 40)
    command = ("step", "--logs", "log.jsonl", "--policy", "tiny", "--out", "run", "--folds", 0, "--json")
    first = run(*command, *sets(improvement__backend="external"), folder=tmp_path)
    assert first.code == 0, first.stderr
    assert first.json["waiting_for"] == "improve"
    assert run("export", "trl", "run", "--out", "export", folder=tmp_path).code == 0
    assert run("import", "run", "--policy", "export/policy", folder=tmp_path).code == 0
    [next_command] = [line.strip() for line in first.stdout.splitlines() if line.strip().startswith("ippo step")]
    resumed = run(*next_command.split()[1:], "--json", folder=tmp_path)
    assert resumed.code == 0, resumed.stderr
    assert resumed.json["grade"]["q_gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert "improvement: imported, KL" in resumed.stdout


def test_the_single_command_names_the_setting(waiting: Path, tmp_path: Path) -> None:
    log, q_function = "run/iteration-001/collect/conversations.jsonl", "run/iteration-001/fit/q_function"
    command = ("improve", "--logs", log, "--policy", "export/policy", "--q", q_function, "--out", tmp_path / "out")
    assert "improvement.backend" in refused(run(*command, *EXTERNAL, folder=waiting))


# ---- What is refused ----


def refused_policy(folder: Path, policy: Any) -> str:
    policy.save(folder / "other")
    complaint = refused(run("import", "run", "--policy", "other", folder=folder))
    assert complaint.startswith("ippo: other: is not a policy of the kind that the step started from: ")
    assert not (folder / "run" / STEP).exists(), "the run can still be resumed and imported into"
    return complaint


def test_a_policy_of_another_architecture_is_refused(copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy / "export/policy")
    other = Policy(tiny.gpt2(len(tokenizer)), tokenizer, CONFIG)
    assert "the architecture is GPT2Config, not LlamaConfig" in refused_policy(copy, other)
    assert run("import", "run", "--policy", "export/policy", folder=copy).code == 0


def test_a_policy_of_another_size_is_refused(copy: Path) -> None:
    policy = Policy.load(copy / "export/policy", CONFIG)
    texts = ["a red hat?", "a blue hat?", "hello, i like red", "hello, i like blue", "you sell hats"]
    config = PolicyConfig(hidden_size=64, num_layers=1, vocabulary_size=400, max_response_tokens=12)
    wider = Policy(Policy.tiny(texts, config, seed=0).model, policy.tokenizer, CONFIG)
    assert "the weight model.embed_tokens.weight has shape" in refused_policy(copy, wider)


def test_a_policy_with_another_vocabulary_or_template_is_refused(copy: Path) -> None:
    policy = Policy.load(copy / "export/policy", CONFIG)
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("<|end|>", "<|end|> ")
    assert "the chat template is another" in refused_policy(copy, policy)
    shutil.rmtree(copy / "other")
    policy = Policy.load(copy / "export/policy", CONFIG)
    policy.tokenizer.add_tokens(["shoes and hats"])
    assert "the token 'shoes and hats' has id" in refused_policy(copy, policy)


def test_a_policy_that_has_diverged_is_refused(copy: Path) -> None:
    policy = Policy.load(copy / "export/policy", CONFIG)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    policy.save(copy / "other")
    assert "not finite" in refused(run("import", "run", "--policy", "other", folder=copy))
    assert not (copy / "run" / STEP).exists()


@pytest.mark.parametrize("model", ["q_function", "critic"])
def test_a_q_function_or_a_critic_is_not_taken_for_the_policy(model: str, copy: Path) -> None:
    """Stacks save the critic beside the policy; with tied embeddings its trunk is a whole language model."""
    shutil.copytree(copy / "export" / model, copy / "other")
    assert "Classification, which scores texts" in refused(run("import", "run", "--policy", "other", folder=copy))
    assert not (copy / "run" / STEP).exists()


def test_what_is_no_policy_or_no_run_is_refused(copy: Path) -> None:
    assert "cannot be loaded" in refused(run("import", "run", "--policy", "nowhere", folder=copy))
    assert "config.toml is missing" in refused(run("import", "export", "--policy", "export/policy", folder=copy))


@pytest.mark.parametrize("edited", ["launch.sh", "reward.py", "prompts.jsonl", "policy/generation_config.json"])
def test_an_export_edited_by_hand_is_refused_by_the_name_of_the_file(edited: str, copy: Path) -> None:
    shutil.copytree(copy / "export/policy", copy / "export/candidate")
    with (copy / "export" / edited).open("a") as file:
        file.write("\n")
    complaint = refused(run("import", "run", "--policy", "export/candidate", folder=copy))
    assert edited in complaint
    assert "is not as `ippo export` wrote it" in complaint
    shutil.move(copy / "export/candidate", copy / "candidate")
    assert run("import", "run", "--policy", "candidate", folder=copy).code == 0, "outside of an export nobody can tell"


def test_an_export_with_other_settings_or_a_file_less_is_refused(copy: Path) -> None:
    shutil.copytree(copy / "export/policy", copy / "export/candidate")
    path = copy / "export/manifest.json"
    original = path.read_text()
    manifest = json.loads(original)
    manifest["settings"]["improvement"]["kl_coefficient"] = 0.0
    path.write_text(json.dumps(manifest))
    assert "manifest.json" in refused(run("import", "run", "--policy", "export/candidate", folder=copy))
    path.write_text(original)
    (copy / "export/reward.py").unlink()
    assert "reward.py" in refused(run("import", "run", "--policy", "export/candidate", folder=copy))


def test_an_export_of_another_run_is_refused(copy: Path, tmp_path: Path) -> None:
    folder = shop(tmp_path / "another")
    assert run("iterate", "--out", "run", *EXTERNAL, "--set", "seed=1", folder=folder).code == 0
    complaint = refused(run("import", folder / "run", "--policy", "export/policy", folder=copy))
    assert "was exported for iteration-001/improve" in complaint


def test_a_stack_is_chosen_by_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "log.jsonl", {"id": "a", "messages": [{"role": "user", "content": "hi"}]})
    assert run("export", "nemo", "run", "--out", "x", folder=tmp_path).code == 2
