"""LoRA: roles on one set of frozen weights, and folders that other libraries load."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from logs import assistant, record, user, write_lines
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from test_improvement import PROMPTS, LetterValue, config_of, says_a
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from iterative_ppo import adapters
from iterative_ppo import config as config_module
from iterative_ppo import policy as policy_module
from iterative_ppo.commands import exchange, loop
from iterative_ppo.improvement.native import _Learner, improve, sample_rollout
from iterative_ppo.policy import Policy
from iterative_ppo.q_function import QFunction, QFunctionCard

TOKENS = 2048
RESPONSES = [(tiny.A, tiny.B, tiny.END), (tiny.C, tiny.END)] * (len(PROMPTS) // 2)
CARD = QFunctionCard(link="identity", gamma=1.0, target="monte_carlo", policy="logs", metrics={})
MODELS = [tiny.llama, tiny.gpt2]


@pytest.fixture(autouse=True)
def small_models_have_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "_SMALLEST_FOR_ADAPTERS", 0)


@pytest.fixture(params=MODELS, ids=lambda model: model.__name__)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A pretrained model's folder."""
    tiny.letter_policy(request.param).save(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path, **arguments: object) -> Policy:
    return Policy.load(folder, tiny.policy_config(lora_rank=4), **arguments)


def improved(policy: Policy, *, num_updates: int = 4, learning_rate: float = 1e-2) -> Policy:
    """Some updates towards the letter a."""
    config = config_of("ppo", num_updates=num_updates, learning_rate=learning_rate, kl_target=1e9)
    return improve(
        policy,
        PROMPTS * 4,
        says_a,
        config,
        token_value=LetterValue(),
        generator=np.random.default_rng(0),
        tokens_per_batch=TOKENS,
    ).candidate


def logprobs(policy: Policy) -> list[float]:
    return [x for row in policy.logprobs(PROMPTS, RESPONSES, tokens_per_batch=TOKENS) for x in row]


def frozen_places(model: PreTrainedModel) -> set[int]:
    return {p.data_ptr() for p in model.parameters() if not p.requires_grad}


# --- roles --------------------------------------------------------------------------------------------------


def test_a_branch_starts_as_its_policy_and_shares_what_is_frozen(base: Path):
    policy = load(base)
    branch = policy.branch(seed=0)
    assert logprobs(branch) == logprobs(policy)
    assert frozen_places(branch.model) == frozen_places(policy.model) != set()
    trained = [name for name, p in branch.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_a_step_trains_the_candidate_alone(base: Path):
    policy = load(base)
    before = logprobs(policy)
    candidate = improved(policy)
    assert logprobs(policy) == before
    assert np.abs(np.subtract(logprobs(candidate), before)).max() > 0.1
    assert frozen_places(candidate.model) == frozen_places(policy.model)


def test_a_model_trained_whole_shares_nothing(base: Path):
    policy = Policy.load(base, tiny.policy_config(lora_rank=0))
    branch = policy.branch(seed=0)
    assert logprobs(branch) == logprobs(policy)
    assert not {p.data_ptr() for p in branch.model.parameters()} & {p.data_ptr() for p in policy.model.parameters()}


def test_after_three_iterations_the_anchor_is_the_current_policy_and_not_the_base_model(base: Path, tmp_path: Path):
    """Each iteration starts with a KL of 0 to its anchor, though the policy is far from the base model by then."""
    folder = base
    for iteration in range(3):
        policy = load(folder)
        improvement = improve(
            policy,
            PROMPTS,
            says_a,
            config_of("ppo", num_updates=4, learning_rate=1e-2, kl_target=1e9),
            token_value=LetterValue(),
            generator=np.random.default_rng(iteration),
            tokens_per_batch=TOKENS,
        )
        assert improvement.updates[0].kl == pytest.approx(0, abs=1e-5)
        assert improvement.kl > 0.05
        folder = tmp_path / f"iteration-{iteration}"
        improvement.candidate.save(folder)
        assert adapters.base_of(folder) == str(base.resolve()), "every adapter is one of the base model"
    distance = np.abs(np.subtract(logprobs(policy), logprobs(load(base)))).max()
    assert distance > 0.1, "the last anchor was an improved policy"


# --- folders ------------------------------------------------------------------------------------------------


def test_an_adapter_folder_is_the_policy_also_to_peft_and_transformers(base: Path, tmp_path: Path):
    candidate = improved(load(base))
    candidate.save(tmp_path / "candidate")
    assert not list((tmp_path / "candidate").glob("model*")), "no copy of the frozen weights"
    expected = logprobs(candidate)
    assert logprobs(load(tmp_path / "candidate")) == pytest.approx(expected, abs=1e-6)

    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "candidate")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "candidate")
    for model in (by_peft, by_transformers):
        with torch.no_grad():
            for prompt, response in zip(PROMPTS[:2], RESPONSES[:2], strict=True):
                token_T = torch.tensor([prompt + response])
                np.testing.assert_allclose(
                    model(input_ids=token_T).logits, candidate.model(input_ids=token_T).logits, atol=1e-5
                )


def test_a_merged_policy_is_a_plain_folder_of_the_same_policy(base: Path, tmp_path: Path):
    candidate = improved(load(base))
    expected = logprobs(candidate)
    candidate.merged().save(tmp_path / "merged")
    assert adapters.base_of(tmp_path / "merged") is None
    plain = Policy.load(tmp_path / "merged", tiny.policy_config(lora_rank=0))
    assert logprobs(plain) == pytest.approx(expected, abs=1e-5)
    assert logprobs(candidate) == expected, "the adapter is as it was"
    assert logprobs(load(base)) != pytest.approx(expected, abs=1e-2), "and so is the base model"


def test_a_q_function_shares_the_policys_backbone(base: Path, tmp_path: Path):
    """Fitted on the policy of a later iteration, saved as an adapter, and loaded with and without that backbone."""
    policy = improved(load(base))
    q_function = QFunction.from_policy(
        policy.model, link="identity", num_heads=2, pad_id=policy.pad_id, lora_rank=4, seed=0
    )
    assert frozen_places(q_function.model.base_model) <= frozen_places(policy.model)
    with torch.no_grad():
        for name, parameter in q_function.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    expected = q_function.values(PROMPTS, RESPONSES, tokens_per_batch=TOKENS)
    before = logprobs(policy)
    q_function.save(tmp_path / "q", CARD, policy.tokenizer)
    assert not list((tmp_path / "q").glob("model*"))

    shared = QFunction.load(tmp_path / "q", backbone=policy.model)
    alone = QFunction.load(tmp_path / "q")
    for loaded in (shared, alone):
        np.testing.assert_allclose(
            loaded.values(PROMPTS, RESPONSES, tokens_per_batch=TOKENS), expected, rtol=0, atol=1e-5
        )
    assert frozen_places(shared.model.base_model) <= frozen_places(policy.model)
    assert not frozen_places(alone.model.base_model) & frozen_places(policy.model)
    assert logprobs(policy) == before

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "q", num_labels=1).eval()
    model.config.pad_token_id = AutoTokenizer.from_pretrained(tmp_path / "q").pad_token_id
    with torch.no_grad():
        scores = [float(model(input_ids=torch.tensor([p + r])).logits) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_the_adapter_of_another_model_is_refused_in_one_line(base: Path, tmp_path: Path):
    improved(load(base)).save(tmp_path / "candidate")
    weights = tmp_path / "candidate" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load(tmp_path / "candidate")
    assert "\n" not in str(caught.value)
    tiny.letter_policy(lambda vocab, **arguments: tiny.llama(vocab, num_kv_heads=1, **arguments)).save(base)
    improved(load(base)).save(tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").rename(weights)
    tiny.letter_policy().save(base)
    with pytest.raises(ValueError, match=r"not the adapter of|not found in the base model") as caught:
        load(tmp_path / "candidate")
    assert "\n" not in str(caught.value)


def saved_by_peft(base: Path, folder: Path, **settings: object) -> PeftModel:
    """An adapter as another stack makes it: peft's own wrapper around the whole model, with random weights."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return model.eval()


def test_an_adapter_that_peft_made_on_all_layers_is_the_same_here(base: Path, tmp_path: Path):
    """peft names the layers of a small model by their whole paths."""
    theirs = saved_by_peft(base, tmp_path / "adapter", target_modules="all-linear")
    tokens = torch.tensor([[tiny.A, tiny.B, tiny.C]])
    with torch.no_grad():
        ours = load(tmp_path / "adapter").model(tokens).logits
        assert not torch.allclose(ours, load(base).model(tokens).logits, atol=0.01)
        torch.testing.assert_close(ours, theirs(tokens).logits)


def test_ranks_and_scales_of_single_layers_are_peft_s(base: Path, tmp_path: Path):
    """Given by whole paths, as peft takes them; a scale that is not found would be another one, and silently so."""
    layer = next(name for name in dict(load(base).model.named_modules()) if name.endswith(("q_proj", "c_attn")))
    theirs = saved_by_peft(
        base,
        tmp_path / "adapter",
        target_modules="all-linear",
        rank_pattern={layer: 4},
        alpha_pattern={layer: 64},
    )
    tokens = torch.tensor([[tiny.A, tiny.B, tiny.C]])
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "adapter").model(tokens).logits, theirs(tokens).logits)


def test_the_adapter_of_a_q_function_is_no_policy(base: Path, tmp_path: Path):
    policy = load(base)
    q_function = QFunction.from_policy(policy.model, link="logistic", num_heads=1, pad_id=0, lora_rank=2, seed=0)
    q_function.save(tmp_path / "q", CARD, policy.tokenizer)
    with pytest.raises(ValueError, match=r"cannot be loaded: it is the adapter of a classifier"):
        load(tmp_path / "q")


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_a_trained_head_is_not_loaded_without_it(settings: dict[str, list[str]], tmp_path: Path):
    tiny.letter_policy(tiny.llama).save(tmp_path / "base")
    layers = ["q_proj", *settings.get("target_modules", [])]
    saved_by_peft(tmp_path / "base", tmp_path / "adapter", **(settings | {"target_modules": layers}))
    with pytest.raises(ValueError, match=r"lm_head.* only adapters of the layers below the head"):
        load(tmp_path / "adapter")


def test_a_step_from_logs_through_adapters(base: Path, tmp_path: Path):
    """Every stage of `ippo step`: adapters are fitted, saved, loaded on the policy's backbone, and at the end merged into plain folders that give the same values."""
    texts = [("a b", "c d", 1.0), ("c d", "a a", 0.0)] * 10
    log = write_lines(
        tmp_path / "log.jsonl",
        *(record(user(said), assistant(answer), id=f"c{i}", outcome=o) for i, (said, answer, o) in enumerate(texts)),
    )
    config = config_module.from_dict(
        {
            "policy": {"start": str(base), "lora_rank": 4, "context_tokens": 128, "max_response_tokens": 4},
            "q_function": {"num_heads": 2, "max_passes": 2, "trunk": "trained"},
            "improvement": {"num_updates": 1, "prompts_per_update": 8, "learning_rate": 1e-2, "kl_target": 9.0},
        }
    )
    console, quiet = Console(quiet=True), lambda *_: None
    result = loop.run_step(
        config,
        log,
        tmp_path / "run",
        num_folds=2,
        group=None,
        bad_lines="error",
        resume=False,
        console=console,
        progress=quiet,
    )
    assert np.isfinite(result["grade"]["q_gain"]["mean"])
    for folder in ("start/policy", "improve/policy", "fit/q_function", "grader/q_function"):
        assert adapters.base_of(tmp_path / "run" / folder) == str(base.resolve())
    assert logprobs(load(tmp_path / "run/start/policy")) == logprobs(load(base)), "the start policy is the base model"

    exchange.run_merge(config, tmp_path / "run" / "improve", tmp_path / "policy", console=console)
    exchange.run_merge(config, tmp_path / "run" / "fit" / "q_function", tmp_path / "q", console=console)
    plain = Policy.load(tmp_path / "policy", config.policy)
    assert logprobs(plain) == pytest.approx(logprobs(load(tmp_path / "run/improve/policy")), abs=1e-5)
    q_values = [
        QFunction.load(folder).values(PROMPTS, RESPONSES, tokens_per_batch=TOKENS)
        for folder in (tmp_path / "q", tmp_path / "run/fit/q_function")
    ]
    np.testing.assert_allclose(*q_values, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="holds no adapter"):
        exchange.run_merge(config, tmp_path / "policy", tmp_path / "again", console=console)


# --- bfloat16 -----------------------------------------------------------------------------------------------


def test_in_bfloat16_what_is_frozen_is_halved_and_what_is_trained_is_not(base: Path):
    whole, half = load(base), load(base, dtype=torch.bfloat16)
    branch = half.branch(seed=0)
    types = {p.requires_grad: p.dtype for p in branch.model.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    assert logprobs(half) == pytest.approx(logprobs(whole), abs=0.2)
    q_function = QFunction.from_policy(
        half.model, link="logistic", num_heads=1, pad_id=half.pad_id, lora_rank=4, seed=0
    )
    assert q_function.heads.dtype == torch.float32
    assert q_function.values(PROMPTS, RESPONSES, tokens_per_batch=TOKENS).dtype == torch.float32


def test_in_bfloat16_the_first_ratios_are_one(base: Path):
    """Of the first minibatch, before any step: exp(log π − old log π) within 1 ± 1e-2 (exactly 1 here), whatever the
    sampler rounded; and the first KL to the anchor, the same policy, is 0 and not the rounding's."""
    policy = load(base, dtype=torch.bfloat16)
    config = config_of("ppo", num_updates=1, num_passes=1, num_minibatches=1, learning_rate=1e-2)
    improvement = improve(
        policy,
        PROMPTS,
        says_a,
        config,
        token_value=LetterValue(),
        generator=np.random.default_rng(0),
        tokens_per_batch=64,
    )
    [update] = improvement.updates
    assert update.kl == 0
    assert update.clip_fraction == 0
    candidate = policy.branch(seed=0)
    learner = _Learner(candidate, LetterValue(), config, tokens_per_batch=64)
    rollout = sample_rollout(
        candidate, policy, PROMPTS * 4, says_a, generator=np.random.default_rng(1), tokens_per_batch=64
    )
    sampled = candidate.sample(PROMPTS * 4, np.random.default_rng(1).random((4 * len(PROMPTS), 8)))
    [minibatch] = [list(range(len(rollout.responses)))[::-1]]
    rescored = learner._rescored(rollout, [minibatch])
    prompts, responses = rescored.select(minibatch)
    for logits in candidate.response_logits(prompts, responses, tokens_per_batch=64):
        rows = [minibatch[place] for place in logits.rows]
        old_BT = rescored.old_logprob_BT[rows, : logits.mask_BT.shape[1]]
        assert float((logits.logprobs() - old_BT).exp().sub(1).abs().max()) < 1e-2
    by_sampler = [x for row in sampled.token_logprobs for x in row]
    assert np.abs(np.subtract(by_sampler, rescored.old_logprob_BT[rescored.mask_BT].tolist())).max() > 1e-3, (
        "the sampler rounds as the batches do: this test shows nothing"
    )


def test_in_bfloat16_a_step_still_raises_the_reward(base: Path):
    policy = load(base, dtype=torch.bfloat16)
    before, after = (
        float(says_a(PROMPTS, p.respond(PROMPTS * 20, np.random.default_rng(0).random((20 * len(PROMPTS), 8)))).mean())
        for p in (policy, improved(policy, num_updates=20, learning_rate=3e-3))
    )
    assert after > before + 0.2


def test_the_configuration_decides_who_is_trained_through_an_adapter(base: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny.policy_config(lora_rank=4)
    assert adapters.is_frozen(Policy.load(base, config).model)
    assert not adapters.is_frozen(Policy.load(base, dataclasses.replace(config, lora_rank=0)).model)
    monkeypatch.setattr(policy_module, "_SMALLEST_FOR_ADAPTERS", 10_000_000)
    assert not adapters.is_frozen(Policy.load(base, config).model)
