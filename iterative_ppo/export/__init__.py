"""An improvement step as a folder that another RLHF stack can make: models, prompts, reward, launch script, manifest."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoTokenizer

from iterative_ppo import config as config_module
from iterative_ppo.compatibility import tokenizer_difference
from iterative_ppo.conversations import Conversation
from iterative_ppo.export import openrlhf, trl, verl
from iterative_ppo.export.critic import Critic, save_critic
from iterative_ppo.export.launch import Job
from iterative_ppo.export.prompts import ExactPrompts, exact_prompts
from iterative_ppo.extras import require_extra
from iterative_ppo.loading import resolve_device
from iterative_ppo.open_step import OpenStep
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, load_card
from iterative_ppo.run_directory import git_commit, library_versions, to_json, write_json, write_text
from iterative_ppo.turns_to_tokens import tokenize

Stack = Literal["verl", "openrlhf", "trl"]
SCHEMA = 1
_MANIFEST = "manifest.json"
_SETTINGS = ("seed", "policy", "q_function", "improvement")
_NUM_PROBES = 100
_NUM_CRITIC_CONVERSATIONS = 512


def export_step(step: OpenStep, stack: Stack, out: Path) -> dict[str, Any]:
    """Writes the folder, whole or not at all, and returns its manifest.

    Args:
        step: where the run stands.
        out: an empty folder.

    Raises:
        ValueError: policy and Q-function do not share a tokenizer, no prompt can be handed over exactly, the stack cannot
            read such a Q-function, or it needs what is not installed.
    """
    if load_card(step.q_function).read_out == "mean":
        raise ValueError(
            f"{step.q_function}: reads a mean over the conversation from a frozen model, and no checkpoint of {stack} can: "
            'fit Q with q_function.trunk = "trained"; as it is, `ippo serve-q` gives its rewards over HTTP'
        )
    if stack == "verl":
        require_extra("export", needed_by="export verl")
    device = resolve_device(step.config.compute.device)
    policy = Policy.load(step.policy, step.config.policy, device=device)
    q_function = QFunction.load(step.q_function, device=device).merged()
    conversations = step.conversations()
    prompts = _in_random_order(exact_prompts(conversations, policy.renderer), step.config.seed)
    if not prompts.prompts:
        raise ValueError(f"{step.run}: no prompt can be handed over exactly: {prompts.num_left_out}")
    _require_one_tokenizer(policy, step, prompts)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.merged().save(partial / "policy")
    q_function.save(partial / "q_function", load_card(step.q_function), policy.tokenizer)
    critic = None
    if stack == "trl":
        trl.write_prompts(prompts, partial / "prompts.jsonl")
        shutil.copyfile(Path(__file__).with_name("train.py"), partial / "train.py")
    else:
        critic = _write_critic(q_function, policy, conversations, partial / "critic")
        _write_launch(stack, step, prompts, critic, partial)
    manifest = _manifest(stack, step, prompts, critic, partial)
    write_json(partial / _MANIFEST, manifest)
    out.rmdir()
    partial.rename(out)
    return manifest


def require_unchanged(folder: Path, step: OpenStep) -> None:
    """Checks that a folder inside an export comes from this step, and that the export is as it was written.

    A folder that is in no export is not checked.

    Raises:
        ValueError: names the step that the export belongs to, or what in it was changed.
    """
    export, manifest = next(
        ((p, m) for p in (folder.resolve(), *folder.resolve().parents) if (m := _read_manifest(p))), (None, {})
    )
    if export is None:
        return
    if manifest["step"] != step.name or manifest["policy"]["sha256"] != folder_hash(step.policy):
        raise ValueError(
            f"{export}: was exported for {manifest['step']} of {manifest['run']}; {step.run} stands at {step.name}, "
            "with a policy of its own"
        )
    changed = [
        name
        for name, expected in manifest["files"].items()
        if not (export / name).is_file() or file_hash(export / name) != expected
    ]
    settings = to_json(config_module.to_dict(step.config))
    changed += [_MANIFEST for name in _SETTINGS if manifest["settings"][name] != settings[name]]
    if changed:
        raise ValueError(
            f"{export / changed[0]}: is not as `ippo export` wrote it, so the manifest does not say what was trained; "
            "export again, and give other settings as arguments of the script"
        )


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and hashes of a folder's files."""
    return hashlib.sha256(json.dumps(_file_hashes(folder)).encode()).hexdigest()


def _file_hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file_hash(file) for file in files}


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export; empty where the folder is none."""
    file = folder / _MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("kind") == "export" else {}


def _in_random_order(prompts: ExactPrompts, seed: int) -> ExactPrompts:
    """A stack that takes the first of them takes an even sample."""
    order = np.random.default_rng(seed).permutation(len(prompts.prompts)).tolist()
    return dataclasses.replace(prompts, prompts=tuple(prompts.prompts[i] for i in order))


def _require_one_tokenizer(policy: Policy, step: OpenStep, prompts: ExactPrompts) -> None:
    texts = [prompt.text for prompt in prompts.prompts[:_NUM_PROBES]]
    difference = tokenizer_difference(policy.tokenizer, AutoTokenizer.from_pretrained(step.q_function), texts=texts)
    if difference:
        raise ValueError(f"{step.q_function}: its tokenizer is not that of {step.policy}: {difference}")


def _write_critic(q_function: QFunction, policy: Policy, conversations: Sequence[Conversation], folder: Path) -> Critic:
    turns = [tokenize(conversation, policy.renderer) for conversation in conversations[:_NUM_CRITIC_CONVERSATIONS]]
    return save_critic(
        q_function,
        policy,
        [prompt for t in turns for prompt in t.prompts],
        [response for t in turns for response in t.responses],
        folder,
    )


def _write_launch(
    stack: Literal["verl", "openrlhf"], step: OpenStep, prompts: ExactPrompts, critic: Critic, folder: Path
) -> None:
    """Prompts, reward and launch script of a stack that asks the Q server."""
    job = Job(
        run=str(step.run.resolve()),
        improvement=step.config.improvement,
        policy=step.config.policy,
        prompts=prompts,
        head=critic.head,
        seed=step.config.seed,
    )
    match stack:
        case "verl":
            verl.write_prompts(prompts, folder / "prompts.parquet")
            script = verl.launch(job)
        case "openrlhf":
            openrlhf.write_prompts(prompts, folder / "prompts.jsonl")
            script = openrlhf.launch(job)
    shutil.copyfile(Path(__file__).with_name("reward.py"), folder / "reward.py")
    write_text(folder / "launch.sh", script)


def _manifest(
    stack: Stack, step: OpenStep, prompts: ExactPrompts, critic: Critic | None, folder: Path
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": "export",
        "stack": stack,
        "run": str(step.run.resolve()),
        "step": step.name,
        "policy": {"folder": str(step.policy.relative_to(step.run)), "sha256": folder_hash(step.policy)},
        "q_function": {"folder": str(step.q_function.relative_to(step.run)), "sha256": folder_hash(step.q_function)},
        "num_prompts": len(prompts.prompts),
        "num_left_out": prompts.num_left_out,
        "prompts_are_messages": stack == "verl" and prompts.are_messages,
        "critic": critic,
        "settings": config_module.to_dict(step.config),
        "versions": library_versions(),
        "git_commit": git_commit(),
        "files": _file_hashes(folder),
    }
