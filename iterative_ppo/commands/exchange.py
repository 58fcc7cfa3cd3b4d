"""Exchange with other stacks: an improvement step out and its policy back, plain models, Q as a service."""

from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from iterative_ppo.adapters import base_of
from iterative_ppo.commands.arguments import empty_folder, policy_folder
from iterative_ppo.config import Config
from iterative_ppo.export import Stack, export_step
from iterative_ppo.import_candidate import import_candidate
from iterative_ppo.open_step import OpenStep, find_open_step
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, backbone_of, load_card
from iterative_ppo.q_scoring import QScorer
from iterative_ppo.run_directory import to_json


def run_export(stack: Stack, run: Path, out: Path, *, console: Console) -> dict[str, Any]:
    """A folder from which another stack makes the improvement step at which a run stands."""
    step = find_open_step(run)
    empty_folder(out)
    manifest = export_step(step, stack, out)
    console.print(f"{out}: {step.name} of {run} for {stack}, {manifest['num_prompts']:,} prompts", highlight=False)
    for reason, count in manifest["num_left_out"].items():
        console.print(f"! {count:,} prompts are left out: {reason}", style="yellow", highlight=False, markup=False)
    train, launch = quote(str(out / "train.py")), quote(str(out / "launch.sh"))
    start = f"python {train}" if stack == "trl" else f"ippo serve-q {quote(str(run))}, and bash {launch}"
    console.print(f"next: {start}, in the environment of {stack}", highlight=False, markup=False)
    return {"out": str(out), **to_json({key: value for key, value in manifest.items() if key != "files"})}


def run_import(run: Path, source: Path, *, console: Console) -> dict[str, Any]:
    """The policy that another stack trained, as the candidate of the step at which a run stands."""
    step = find_open_step(run)
    metrics = import_candidate(step, Path(policy_folder(str(source)))).metrics
    console.print(
        f"candidate {run / step.name / 'policy'}: Q reward {metrics['reward_first']:.4f} to {metrics['reward_last']:.4f}, "
        f"KL {metrics['kl']:.3f} nats a response",
        highlight=False,
    )
    if metrics["kl"] > metrics["kl_target"]:
        console.print(
            f"! beyond the budget of {metrics['kl_target']:g} (improvement.kl_target): Q was not fitted to such responses",
            style="yellow",
            highlight=False,
            markup=False,
        )
    console.print(f"next: {resume_command(step)}", highlight=False, markup=False)
    return {"run": str(run), "step": step.name, **metrics}


def wait_for_import(step: OpenStep, console: Console) -> dict[str, Any]:
    """Says what hands the improvement step to another stack and what takes its result back."""
    console.print(
        f"{step.run / step.name} is to be made by another stack:\n"
        f"  ippo export verl|openrlhf|trl {quote(str(step.run))} --out EXPORT\n"
        f"  ippo import {quote(str(step.run))} --policy CANDIDATE\n"
        f"  {resume_command(step)}",
        highlight=False,
        markup=False,
    )
    return {"run": str(step.run), "waiting_for": step.name}


def resume_command(step: OpenStep) -> str:
    """What goes on with a run."""
    run, settings = quote(str(step.run)), quote(str(step.run / "config.toml"))
    command = f"ippo iterate {settings}"
    if step.is_from_logs:
        arguments = step.arguments()
        command = f"ippo step --logs {quote(str(step.run / 'conversations.jsonl'))} --config {settings}"
        command += f" --folds {arguments['folds']}" + (
            f" --group {quote(arguments['group'])}" if arguments["group"] else ""
        )
    return f"{command} --out {run} --resume"


def run_merge(config: Config, source: Path, out: Path, *, console: Console) -> dict[str, Any]:
    """A plain folder from a policy's or a Q-function's adapter folder."""
    is_q_function = (source / "q_function.json").is_file()
    folder = str(source) if is_q_function else policy_folder(str(source))
    base = backbone_of(folder) if is_q_function else base_of(folder)
    if base is None:
        raise ValueError(f"{folder}: holds no adapter: there is nothing to merge")
    if is_q_function:
        q_function, tokenizer = QFunction.load(folder).merged(), AutoTokenizer.from_pretrained(folder)
        empty_folder(out)
        q_function.save(out, load_card(folder), tokenizer)
    else:
        empty_folder(out)
        Policy.load(folder, config.policy).merged().save(out)
    console.print(f"{out}: {folder} merged into {base}", highlight=False)
    return {"out": str(out), "base": base}


def run_serve_q(config: Config, folder: Path, *, host: str, port: int, console: Console) -> dict[str, Any]:
    """A Q-function over HTTP until the process is told to stop; the extra `serve` must be installed."""
    from iterative_ppo import q_server

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    num_answered = q_server.serve(folder, lambda: QScorer.load(folder, config), host=host, port=port, say=say)
    say(f"stopped: {num_answered:,} items answered")
    return {"q_function": str(folder), "num_answered": num_answered}
