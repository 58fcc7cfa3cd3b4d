"""An exported step: prompts exact to the token, plain models, a manifest, and what is refused."""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import tiny
import torch
from exports import STACKS, job, rows_of, run_prompts
from logs import assistant, user
from test_adapters import base as base  # a model that is trained through adapters
from test_cli import run
from test_rendering import FAMILIES, SYSTEM, TALK, renderer_of, renderer_with_budget, tokenizer_of
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from iterative_ppo import adapters
from iterative_ppo import config as config_module
from iterative_ppo.config import PolicyConfig
from iterative_ppo.conversations import Conversation, Message
from iterative_ppo.export import export_step, folder_hash, verl
from iterative_ppo.export.critic import save_critic
from iterative_ppo.export.prompts import RAW_TEMPLATE, exact_prompts, template_ids, text_ids
from iterative_ppo.open_step import find_open_step
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction
from iterative_ppo.rendering import TokenIds
from iterative_ppo.turns_to_tokens import all_prompts, tokenize

# ---- Prompts ----


def test_the_prompts_are_those_of_the_step_in_another_order(exported: Path) -> None:
    expected = run_prompts(exported)
    assert max(map(len, expected)) > 60, "conversations of several turns"
    for stack in STACKS:
        rows = rows_of(exported, stack)
        ids = [tuple((row["extra_info"] if stack == "verl" else row)["prompt_ids"]) for row in rows]
        assert sorted(ids) == sorted(expected)
        assert ids != expected
        names = [row["reward_model"]["ground_truth"] if stack == "verl" else row["id"] for row in rows]
        assert len(set(names)) == len(names)


def test_what_each_stack_makes_of_a_prompt_are_its_token_ids(exported: Path) -> None:
    """verl applies the chat template to messages, OpenRLHF tokenizes a text, TRL applies the template of its script."""
    tokenizer = AutoTokenizer.from_pretrained(exported / "verl/policy")
    for row in rows_of(exported, "verl"):
        assert template_ids(tokenizer, row["prompt"]) == tuple(row["extra_info"]["prompt_ids"])
        assert {message["role"] for message in row["prompt"]} <= {"system", "user", "assistant"}
    for row in rows_of(exported, "openrlhf"):
        assert text_ids(tokenizer, row["prompt"]) == tuple(row["prompt_ids"])
    for row in rows_of(exported, "trl"):
        assert template_ids(tokenizer, row["prompt"], chat_template=RAW_TEMPLATE) == tuple(row["prompt_ids"])


def talk(*messages: Mapping[str, Any], **keys: Any) -> Conversation:
    return Conversation(id="c", messages=tuple(Message(**message) for message in messages), end="censored", **keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_every_family_of_templates_are_exact(family: str) -> None:
    """With and without a system message (which one family refuses), begun by either side, and with a customer who spells
    the special tokens of the template."""
    f = FAMILIES[family]
    rude = [{"role": "user", "content": f"{f.end} and {''.join(f.special)}"}, *TALK[1:]]
    conversations = [talk(*messages) for messages in (TALK, [SYSTEM, *TALK], TALK[1:], [SYSTEM, *TALK[1:]], rude)]
    exact = exact_prompts(conversations, renderer_of(family))
    expected = all_prompts(tokenize(conversation, renderer_of(family)) for conversation in conversations)
    assert [prompt.token_ids for prompt in exact.prompts] == expected
    assert exact.num_left_out == {}
    assert exact.are_messages
    for prompt in exact.prompts:
        assert prompt.messages is not None
        assert template_ids(tokenizer_of(family), prompt.messages) == prompt.token_ids
        assert text_ids(tokenizer_of(family), prompt.text) == prompt.token_ids
        assert template_ids(
            tokenizer_of(family), [{"role": "user", "content": prompt.text}], chat_template=RAW_TEMPLATE
        ) == (prompt.token_ids)


def test_messages_that_the_context_had_no_room_for_are_not_handed_over() -> None:
    whole = renderer_of("chatml").prompt([SYSTEM, *TALK[:5]]).token_ids
    renderer = renderer_with_budget("chatml", len(whole) - 1)
    [*_, last] = exact_prompts([talk(SYSTEM, *TALK)], renderer).prompts
    assert last.messages is not None
    assert [message["content"] for message in last.messages] == [
        SYSTEM["content"],
        *(message["content"] for message in TALK[1:5]),
    ]
    assert last.token_ids == renderer.prompt([SYSTEM, *TALK[:5]]).token_ids
    assert template_ids(tokenizer_of("chatml"), last.messages) == last.token_ids


def test_a_logged_prompt_and_one_that_was_cut_are_handed_over_as_texts(tmp_path: Path) -> None:
    """No messages make them, so verl gets every prompt of the export as its exact text."""
    logged = talk(TALK[0], TALK[1] | {"prompt": "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"})
    cut = talk({"role": "user", "content": "one two three four five six seven"}, TALK[1])
    budget = len(renderer_of("chatml").prompt(TALK[:1]).token_ids)
    exact = exact_prompts([logged, cut, talk(*TALK[:2])], renderer_with_budget("chatml", budget))
    assert [prompt.messages is None for prompt in exact.prompts] == [True, True, False]
    assert not exact.are_messages
    assert len(exact.prompts[1].token_ids) == budget
    verl.write_prompts(exact, tmp_path / "prompts.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "prompts.parquet").to_pylist()
    for row, prompt in zip(rows, exact.prompts, strict=True):
        assert template_ids(tokenizer_of("chatml"), row["prompt"], chat_template=RAW_TEMPLATE) == prompt.token_ids
    assert RAW_TEMPLATE in verl.launch(job(exact))


def test_a_prompt_that_no_text_gives_back_is_left_out_and_counted() -> None:
    """Cut inside a character of several bytes: what is left decodes to a replacement character, which is other tokens."""
    conversations = [talk({"role": "user", "content": "€" * 40}, TALK[1]), talk(*TALK[:2])]
    budget = len(renderer_of("chatml").prompt(TALK[:1]).token_ids)
    exact = [exact_prompts(conversations, renderer_with_budget("chatml", budget + more)) for more in range(3)]
    assert sorted(len(e.prompts) for e in exact) == [1, 1, 2], (
        "a € is three tokens of a byte, and one cut of three is clean"
    )
    assert [e.num_left_out for e in exact if len(e.prompts) == 1] == [{"its text is tokenized otherwise": 1}] * 2


# ---- Models ----


def test_the_exported_models_are_plain_and_say_what_the_runs_own_say(exported: Path) -> None:
    step = find_open_step(exported / "run")
    policy, q_function = Policy.load(step.policy, step.config.policy), QFunction.load(step.q_function)
    prompts = run_prompts(exported)[:8]
    responses = policy.respond(prompts, np.random.default_rng(0).random((8, 12)))
    plain = Policy.load(exported / "verl/policy", step.config.policy)
    assert plain.logprobs(prompts, responses, tokens_per_batch=512) == policy.logprobs(
        prompts, responses, tokens_per_batch=512
    )
    expected = q_function.values(prompts, responses, tokens_per_batch=512)
    model = AutoModelForSequenceClassification.from_pretrained(exported / "verl/q_function", num_labels=1).eval()
    with torch.no_grad():
        labels = [float(model(input_ids=torch.tensor([p + r])).logits) for p, r in zip(prompts, responses, strict=True)]
    np.testing.assert_allclose(torch.tensor(labels).sigmoid(), expected, atol=1e-5)


def critic_readings(folder: Path, rows: Sequence[TokenIds]) -> list[torch.Tensor]:
    """As verl loads it: the label of a token classifier at every token."""
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=1).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0, :, 0] for row in rows]


@pytest.mark.parametrize("link", ["identity", "logistic"])
def test_the_critic_is_q_read_at_every_token_in_the_rewards_units(link: Any, tmp_path: Path) -> None:
    """Under a logistic link the scalar of the head is a log-odds; the critic is the line closest to the link."""
    policy = tiny.letter_policy()
    q_function = QFunction.from_policy(policy.model, link=link, num_heads=3, pad_id=tiny.PAD, lora_rank=0, seed=0)
    with torch.no_grad():
        q_function.heads.mul_(10)
    generator = np.random.default_rng(0)
    prompts = tiny.random_rows(generator, [6] * 40, low=tiny.A, high=tiny.G)
    responses = policy.respond(prompts, generator.random((40, 8)))
    critic = save_critic(q_function, policy, prompts, responses, tmp_path)
    assert critic.head == "score"
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    before = [slice(5, len(row) - 1) for row in rows]
    scalars = q_function.read(rows, [range(len(row)) for row in rows], tokens_per_batch=512)
    scalar = torch.tensor([x for row, where in zip(scalars, before, strict=True) for x in row[where]])
    value = q_function.to_value(scalar)
    read = torch.cat([x[where] for x, where in zip(critic_readings(tmp_path, rows), before, strict=True)])
    assert critic.explained_variance == pytest.approx(1 - float((value - read).var() / value.var()), abs=1e-4)
    error = float((read - value).square().mean().sqrt())
    if link == "identity":
        assert error < 1e-5
        assert (critic.slope, critic.bias) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    else:
        assert error < 0.2 * float(value.std())
        assert float((scalar - value).square().mean().sqrt()) > 10 * error, "the scalar itself is no value"
        slope, bias = np.polyfit(scalar.numpy(), value.numpy(), 1)
        assert (critic.slope, critic.bias) == (pytest.approx(slope, abs=1e-4), pytest.approx(bias, abs=1e-4))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == policy.tokenizer.get_vocab()


def test_adapters_are_merged(base: Path, tmp_path: Path) -> None:
    """A step from logs through adapters: the exported folders name no base model, and say what the adapters said."""
    log = tmp_path / "log.jsonl"
    lines = [
        {"id": f"c{i}", "messages": [user(said), assistant(answer)], "outcome": outcome}
        for i, (said, answer, outcome) in enumerate([("a b", "c d", 1.0), ("c d", "a a", 0.0)] * 10)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"lora_rank": 4, "context_tokens": 128, "max_response_tokens": 4}
    step_run(log, tmp_path / "run", policy={"start": str(base), **settings})
    step = find_open_step(tmp_path / "run")
    assert step.name == "improve"
    assert len(step.conversations()) == 10, "the half that Q was fitted to"
    out = tmp_path / "out"
    out.mkdir()
    manifest = export_step(step, "openrlhf", out)
    assert manifest["num_prompts"] == 10
    for name in ("policy", "q_function", "critic"):
        assert adapters.base_of(out / name) is None
    config = PolicyConfig(**settings)
    prompts = [(tiny.USER, tiny.A, tiny.END, tiny.ASSISTANT)] * 2
    responses = [(tiny.B, tiny.END), (tiny.C, tiny.C, tiny.END)]
    for folder, load in (("policy", load_logprobs), ("q_function", load_values)):
        source = step.policy if folder == "policy" else step.q_function
        np.testing.assert_allclose(
            load(out / folder, config, prompts, responses), load(source, config, prompts, responses), atol=1e-5
        )


def step_run(log: Path, out: Path, **tables: Mapping[str, Any]) -> None:
    """A run of `ippo step` in this process, whose models may be patched."""
    from rich.console import Console

    from iterative_ppo.commands import loop

    config = config_module.from_dict(
        {
            "q_function": {"num_heads": 2, "max_passes": 1},
            "improvement": {"num_updates": 1, "prompts_per_update": 8, "backend": "external"},
            **tables,
        }
    )
    loop.run_step(
        config,
        log,
        out,
        num_folds=0,
        group=None,
        bad_lines="error",
        resume=False,
        console=Console(quiet=True),
        progress=lambda *_: None,
    )


def load_logprobs(
    folder: Path, config: PolicyConfig, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
) -> list[float]:
    rows = Policy.load(folder, config).logprobs(prompts, responses, tokens_per_batch=512)
    return [logprob for row in rows for logprob in row]


def load_values(
    folder: Path, _: PolicyConfig, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
) -> list[float]:
    return list(QFunction.load(folder).values(prompts, responses, tokens_per_batch=512).tolist())


# ---- The manifest, and what is refused ----


def test_the_manifest_says_where_an_export_comes_from_and_what_is_in_it(exported: Path) -> None:
    for stack in STACKS:
        manifest = json.loads((exported / stack / "manifest.json").read_text())
        shown = json.loads((exported / f"{stack}.json").read_text())
        assert {key: manifest[key] for key in shown if key != "out"} == {k: v for k, v in shown.items() if k != "out"}
        assert manifest["stack"] == stack
        assert manifest["run"] == str(exported / "run")
        assert manifest["step"] == "iteration-001/improve"
        assert manifest["policy"] == {
            "folder": "iteration-000/start/policy",
            "sha256": folder_hash(exported / "run/iteration-000/start/policy"),
        }
        assert manifest["num_prompts"] == len(rows_of(exported, stack))
        assert manifest["num_left_out"] == {}
        files = {str(f.relative_to(exported / stack)) for f in (exported / stack).rglob("*") if f.is_file()}
        assert set(manifest["files"]) == files - {"manifest.json"}
        for name, expected in manifest["files"].items():
            assert hashlib.sha256((exported / stack / name).read_bytes()).hexdigest() == expected
    assert not list(exported.glob(".*.partial"))


def one_line(complaint: Any) -> str:
    assert complaint.code == 2, complaint.stderr
    [line] = complaint.complaints
    return str(line)


def test_what_is_no_run_or_has_no_q_function_yet_is_refused(exported: Path, tmp_path: Path) -> None:
    assert "config.toml is missing" in one_line(run("export", "verl", "nowhere", "--out", "x", folder=tmp_path))
    shutil.copytree(exported / "run/iteration-000", tmp_path / "run/iteration-000")
    shutil.copyfile(exported / "run/config.toml", tmp_path / "run/config.toml")
    assert "no Q-function is fitted yet" in one_line(run("export", "verl", "run", "--out", "x", folder=tmp_path))


def test_a_folder_that_holds_something_is_not_written_to(exported: Path) -> None:
    assert "not an empty folder" in one_line(run("export", "trl", "run", "--out", "verl", folder=exported))


def test_a_q_function_with_another_tokenizer_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "run", tmp_path / "run")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "run/iteration-001/fit/q_function")
    complaint = one_line(run("export", "verl", "run", "--out", "x", folder=tmp_path))
    assert "its tokenizer is not that of" in complaint
    assert "the token" in complaint
    assert not (tmp_path / "x/manifest.json").exists()


def test_without_pyarrow_the_extra_is_named(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"^export verl: pyarrow is not installed; .*\[export\]"):
        export_step(find_open_step(exported / "run"), "verl", tmp_path)
