"""Every setting of a run: frozen dataclasses, TOML in and out, standard library only.

The string under a field is its documentation: `ippo config` prints it, and there is no other list of settings.
"""

import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import json
import math
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that the user must change; the message is one line and names the setting."""


@dataclass(frozen=True, slots=True)
class _Range:
    low: float = -math.inf
    high: float = math.inf


Count = Annotated[int, _Range(1)]
Share = Annotated[float, _Range(0, 1)]
_SMALLEST = 1e-30
Positive = Annotated[float, _Range(_SMALLEST)]
NonNegative = Annotated[float, _Range(0)]


def _problem(value: object, annotation: Any) -> str | None:
    """What is wrong with a value, in words that follow 'must be'; None when nothing is."""
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return None if value in choices else "one of " + ", ".join(map(repr, choices))
    bounds = _Range()
    if get_origin(annotation) is Annotated:
        annotation, bounds = get_args(annotation)
    base = get_origin(annotation) or annotation
    if base is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            return "a finite number"
    elif base is int:
        if isinstance(value, bool) or not isinstance(value, int):
            return "a whole number"
    elif not isinstance(value, base):
        return {bool: "true or false", str: "a string", dict: "a table"}[base]
    if isinstance(value, (int, float)) and not bounds.low <= value <= bounds.high:
        if bounds.high == math.inf:
            return "more than 0" if bounds.low == _SMALLEST else f"at least {bounds.low:g}"
        return f"from {bounds.low:g} to {bounds.high:g}"
    return None


@dataclass(frozen=True, slots=True)
class _Section:
    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            problem = _problem(value, annotation)
            if problem:
                raise ConfigError(f"{section_name(type(self))}{name}: must be {problem}, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentConfig(_Section):
    entry_point: str = "storefront"
    """`storefront`, `suggested_response`, or `package.module:ClassName` of a Gymnasium text environment (the current folder is importable)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment's constructor."""
    max_turns: Count = 20
    """Turns after which a conversation is cut and logged as truncated, if the environment has not ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig(_Section):
    start: str = "tiny"
    """`tiny` (a small Llama made from scratch, its tokenizer trained on the logs), a hub id, or a folder of a causal language model with a chat template."""
    logs: str = ""
    """Conversations (JSON Lines) from which the start policy is cloned. Empty: the environment's own scripted seller writes them for `tiny`; a pretrained start is left as it is."""
    scripted_conversations: Count = 6144
    """How many conversations the scripted seller writes."""
    hidden_size: Count = 96
    """Width of the tiny model."""
    num_layers: Count = 2
    """Layers of the tiny model."""
    vocabulary_size: Annotated[int, _Range(300)] = 4096
    """Largest vocabulary of the tiny model's byte-level BPE tokenizer."""
    context_tokens: Annotated[int, _Range(16)] = 1024
    """Most tokens of prompt and response together; older messages are dropped whole from longer prompts. A model's own limit is kept if smaller."""
    max_response_tokens: Count = 32
    """A response is cut after this many tokens."""
    temperature: Positive = 1.0
    """Divides the logits. The policy *is* the resulting distribution: nothing else (top-k, top-p) changes it."""
    lora_rank: Annotated[int, _Range(0)] = 16
    """Rank of the LoRA adapters through which a pretrained policy and its Q-function are trained, on frozen weights that they share. 0 trains all weights; models of less than 10 million parameters are always trained whole."""
    clone_passes: Annotated[int, _Range(0)] = 3
    """Most passes over the logs when the start policy is cloned; stops earlier when the held-out loss rises."""
    clone_learning_rate: Positive = 2e-3
    """Peak learning rate of cloning (AdamW, cosine; Muon for the matrices of a model made from scratch)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationsConfig(_Section):
    count: Count = 6
    """Rounds of collect, fit, improve, evaluate, promote or hold."""
    conversations: Count = 2048
    """Conversations collected in each iteration, beside those of the gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QFunctionConfig(_Section):
    gamma: Share = 1.0
    """Turn discount of the returns. Below 1, an outcome is worth less the more turns it took. (The token discount is always 1.)"""
    return_lambda: Share = 1.0
    """Lambda of the TD(lambda) returns that Q is fitted to after its first pass: 1 is Monte Carlo, which is unbiased; below 1 the future beyond a turn is taken in part from Q itself, which is less noisy."""
    trunk: Literal["auto", "trained", "frozen"] = "auto"
    """`trained`: the transformer below Q is fitted with its heads, whole or through an adapter. `frozen`: heads alone, to the hidden states of a pretrained model and their means over the conversation so far and its recent part, which one pass over the logs gives; `hl_gauss` is squared error then, and learning rate, warm start and next message have no part in it. `auto`: frozen for policies that are trained through adapters, unless another stack makes the improvement step, since none can read a mean."""
    frozen_depth: Share = 0.5
    """Share of a frozen trunk's layers, from the first, that Q reads, one layer at least. The middle of a language model says as much of how a conversation ends as its last layer does."""
    link: Literal["identity", "logistic"] = "logistic"
    """From the scalar head to Q. `logistic` keeps Q in [0, 1] and needs returns in [0, 1]; `identity` fits any return."""
    loss: Literal["binary_cross_entropy", "squared_error", "hl_gauss"] = "binary_cross_entropy"
    """Regression loss. `binary_cross_entropy` goes with the logistic link, the other two with either."""
    next_message_weight: NonNegative = 3.0
    """Weight of two more tasks of the fit: to predict, from the end of a response, the words of the customer's next message, and, a third as much, at each word of the response whether it had been heard before. The answer is what tells good responses from bad ones long before the outcome; 0 turns both off."""
    num_heads: Count = 5
    """Ensemble members: linear heads on one trunk, each fitted to its own bootstrap of the conversations."""
    pessimism: NonNegative = 1.0
    """The reward of a response is the ensemble's mean minus this many standard deviations."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the fit (AdamW, cosine)."""
    max_passes: Count = 4
    """Most passes over the conversations when Q starts from a policy's weights."""
    refit_passes: Count = 1
    """Most passes when Q starts from the previous iteration's Q-function, which has to follow one step of the policy only."""
    patience_passes: Count = 1
    """Passes without a better held-out loss after which the fit stops, the first pass not counted; the best pass is kept."""
    held_out_share: Annotated[float, _Range(0.01, 0.9)] = 0.15
    """Share of the conversations that the fit never trains on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImprovementConfig(_Section):
    backend: Literal["native", "trl", "external"] = "native"
    """Who does the single-turn improvement step: `native`; `trl`, TRL's RLOO or GRPO trainer (extra `trl`; `ppo` it does not have); or `external`, another stack: the run stops before the step, and `ippo export` and `ippo import` hand it over and take it back."""
    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    """`ppo` has a token-level value baseline; `grpo` and `rloo` compare `num_samples` responses to the same prompt."""
    num_updates: Count = 6
    """Batches of fresh responses, at most; the step ends earlier when the KL budget is spent."""
    prompts_per_update: Count = 512
    """Logged prompts answered in each update."""
    num_samples: Count = 2
    """Responses to each prompt in an update."""
    num_passes: Count = 2
    """Gradient passes over each batch of responses."""
    num_minibatches: Count = 4
    """Optimizer steps in each pass."""
    learning_rate: Positive = 3e-4
    """Learning rate of the policy (AdamW)."""
    token_value_learning_rate: NonNegative = 0.0
    """Learning rate of the token value, which starts as Q's own token-level reading. 0 freezes it there."""
    clip: Positive = 0.2
    """PPO's clip range of the token ratio."""
    gae_lambda: Share = 1.0
    """GAE's lambda on the token clock: 1 is unbiased, below 1 trusts the token value."""
    kl_target: Positive = 0.3
    """KL budget of one iteration: the mean over responses of KL(candidate || anchor), in nats. The step stops when it is reached."""
    kl_coefficient: NonNegative = 0.1
    """Beta, the price of a nat of KL to the anchor, in units of the reward."""
    adaptive_kl: bool = True
    """Beta doubles after an update that is far ahead of an even way to `kl_target`, and halves after one far behind (the adaptive KL penalty of PPO). Off: it stays, and what is optimised is the reward minus beta times the KL."""
    kl_in: Literal["reward", "loss"] = "loss"
    """`reward`: each token pays beta times its log-ratio to the anchor; `loss`: beta times half the square of a response's log-ratio is added to the loss, which has the same expected gradient. With `grpo`, `loss` counts beta in units of a group's deviation, since the reward is divided by it."""
    early_stop_kl: Positive = 0.1
    """Passes over a batch end when the mean token KL (k3) from the policy that sampled it exceeds this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig(_Section):
    conversations: Annotated[int, _Range(2)] = 1000
    """Fresh conversations with each of current policy and candidate, on common random numbers. In a step from logs, which has no customers: how many logged prompts both of them answer, at least."""
    confidence: Annotated[float, _Range(0.5, 0.9999)] = 0.95
    """The candidate is promoted when it is better with this (one-sided) confidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig(_Section):
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ... Under `torchrun` each process has a GPU of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of frozen weights; what is trained, log-probabilities and losses are float32. A processor without instructions for `bfloat16` takes a hundred times as long with it."""
    tokens_per_batch: Annotated[int, _Range(64)] = 4096
    """Padded tokens in one forward and backward pass; results do not depend on it."""
    checkpoint_activations: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them: a third more arithmetic, and memory for one layer instead of all."""
    shard_weights: bool = False
    """Under `torchrun`: every process keeps a part of each model's weights, gradients and optimizer state (FSDP2), and not all. For models that are trained whole and do not fit otherwise."""
    rollout_conversations: Count = 512
    """Conversations in lock-step during a rollout, in each process. Fewer once they are so long that their keys and values would take more than 2 GiB, or half of a GPU's free memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_Section):
    seed: Annotated[int, _Range(0)] = 0
    """Seed of everything random: the same seed gives the same run."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    iterations: IterationsConfig = field(default_factory=IterationsConfig)
    q_function: QFunctionConfig = field(default_factory=QFunctionConfig)
    improvement: ImprovementConfig = field(default_factory=ImprovementConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        _Section.__post_init__(self)
        if self.q_function.loss == "binary_cross_entropy" and self.q_function.link != "logistic":
            raise ConfigError('q_function.loss: "binary_cross_entropy" needs q_function.link = "logistic"')
        if self.q_function.trunk == "frozen" and self.policy.lora_rank == 0:
            raise ConfigError('q_function.trunk: "frozen" needs weights that stay, and policy.lora_rank = 0 trains all')
        if self.compute.dtype != "float32" and self.policy.lora_rank == 0:
            raise ConfigError('compute.dtype: "bfloat16" is for frozen weights, and policy.lora_rank = 0 freezes none')
        _check_trl(self.improvement)
        if self.improvement.algorithm != "ppo" and self.improvement.num_samples < 2:
            raise ConfigError(
                f"improvement.num_samples: {self.improvement.algorithm} compares responses, give at least 2"
            )


def _check_trl(config: ImprovementConfig) -> None:
    if config.backend != "trl":
        return
    if config.algorithm == "ppo":
        raise ConfigError('improvement.algorithm: TRL has no PPO any more; set "rloo" or "grpo" for backend = "trl"')
    if config.prompts_per_update * config.num_samples % config.num_minibatches:
        raise ConfigError(
            f"improvement.num_minibatches: TRL wants minibatches of one size, and {config.num_minibatches} do not divide "
            f"{config.prompts_per_update} prompts x {config.num_samples} responses"
        )


SECTIONS: dict[str, type[_Section]] = {
    f.name: f.default_factory  # type: ignore[misc]
    for f in dataclasses.fields(Config)
    if f.default_factory is not dataclasses.MISSING
}


def section_name(section: type) -> str:
    """`policy.` for PolicyConfig, nothing for the whole configuration: the prefix of its settings' names."""
    return next((f"{name}." for name, cls in SECTIONS.items() if cls is section), "")


def from_dict(tables: Mapping[str, Any]) -> Config:
    """A configuration from nested tables; unknown keys and wrong values raise ConfigError."""
    _reject_unknown(tables, [f.name for f in dataclasses.fields(Config)], prefix="")
    arguments: dict[str, Any] = {}
    for name, value in tables.items():
        section = SECTIONS.get(name)
        if section is None:
            arguments[name] = value
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: must be a table, as in [{name}], not {value!r}")
        _reject_unknown(value, [f.name for f in dataclasses.fields(section)], prefix=f"{name}.")
        arguments[name] = section(**value)
    return Config(**arguments)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested tables, every setting included."""
    return dataclasses.asdict(config)


def load(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError with the file's name where it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error


def with_setting(tables: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """The tables with one `section.key=value` applied; the value is TOML, and a bare word is a string."""
    name, equals, text = assignment.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {assignment}: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    changed: dict[str, Any] = copy.deepcopy(dict(tables))
    table = changed
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {assignment}: {key} is no table")
    table[keys[-1]] = value
    return changed


def to_toml(config: Config, *, documented: bool = False) -> str:
    """The configuration as TOML, every setting included, with its documentation as comments if asked for."""
    lines: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name not in SECTIONS:
            lines += _toml_setting(Config, f.name, value, documented)
            continue
        lines += ["", f"[{f.name}]"]
        for g in dataclasses.fields(value):
            lines += _toml_setting(type(value), g.name, getattr(value, g.name), documented)
    return "\n".join(lines) + "\n"


def settings() -> Iterator[tuple[str, Any, str]]:
    """Every setting as (name, default, documentation)."""
    config = Config()
    for f in dataclasses.fields(Config):
        if f.name not in SECTIONS:
            yield f.name, getattr(config, f.name), documentation(Config)[f.name]
            continue
        section = getattr(config, f.name)
        for g in dataclasses.fields(section):
            yield f"{f.name}.{g.name}", getattr(section, g.name), documentation(type(section))[g.name]


def documentation(section: type) -> dict[str, str]:
    """The string under each field of a section."""
    return _documentation_by_class()[section.__name__]


@functools.cache
def _documentation_by_class() -> dict[str, dict[str, str]]:
    """Every section's, read from this file once."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[__name__])).body:
        if isinstance(node, ast.ClassDef):
            docs[node.name] = {
                ast.unparse(statement.target): ast.literal_eval(following.value)
                for statement, following in zip(node.body, node.body[1:], strict=False)
                if isinstance(statement, ast.AnnAssign)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            }
    return docs


def _reject_unknown(table: Mapping[str, Any], known: list[str], *, prefix: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown setting {prefix}{key}; the nearest known one is {prefix}{nearest}")


def _toml_setting(section: type, name: str, value: Any, documented: bool) -> list[str]:
    comment = textwrap.wrap(documentation(section)[name], 110) if documented else []
    return [*(f"# {line}" for line in comment), f"{name} = {_toml_value(value)}"]


def _toml_value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            return "{" + ", ".join(f"{_toml_value(str(k))} = {_toml_value(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_toml_value, value)) + "]"
    raise ConfigError(f"{value!r} ({type(value).__name__}) cannot be a setting")
