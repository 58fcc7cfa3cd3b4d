import copy
import itertools
import json
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from iterative_ppo.environments import BranchingEnvironment, ScriptedEnvironment, make_environment
from iterative_ppo.environments.storefront import Storefront
from iterative_ppo.environments.storefront_customer import MEANINGS
from iterative_ppo.environments.storefront_language import say
from iterative_ppo.environments.storefront_parser import read_seller
from iterative_ppo.environments.suggested_response import (
    NEUTRAL_MESSAGES,
    Flaws,
    SuggestedResponse,
    content_stems,
)

FINE = "what kind of shoe do you need?"
OFF_TOPIC = "bananas grow quickly"
PUSHY = "hurry, buy the basic trail shoe!!"
LONG = "the basic trail shoe " * 10
ECHO, DUCK = f"{__name__}:Echo", f"{__name__}:Duck"
DECISIONS = ("accepted", "edited", "rejected", "ignored")


class Echo(gymnasium.Env[str, str]):
    """A third party's environment, without a scripted seller: it answers with what was sent."""

    observation_space = Text(1000)
    action_space = Text(1000)

    def __init__(self, turns: int = 100) -> None:
        self.turns = turns

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.sent: list[str] = []
        return "good morning", {}

    def step(self, action):
        self.sent.append(action)
        return action or "pardon", 0.5, False, len(self.sent) >= self.turns, {"count": len(self.sent)}


class Duck:
    """No Gymnasium class, but with the same two methods."""

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        return "hi", {"system": "you sell ducks"}

    def step(self, action, /):  # noqa: ARG002
        return "bye", 1, True, False, {}


class NoStep:
    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        return "hi", {}


def steps(suggestion, num, **arguments):
    """The infos of one suggestion made first in many conversations."""
    environment = SuggestedResponse(**arguments)
    for seed in range(num):
        environment.reset(seed=seed)
        yield environment.step(suggestion)[4]


def shares(suggestion, num=400, **arguments):
    decisions = [info["decision"] for info in steps(suggestion, num, **arguments)]
    return {decision: decisions.count(decision) / num for decision in DECISIONS}


def test_gymnasium_checker_passes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(SuggestedResponse(), skip_render_check=True)


def test_same_seed_same_conversation():
    def conversation(seed):
        environment, generator = SuggestedResponse(), np.random.default_rng(0)
        said, over = [environment.reset(seed=seed)], False
        while not over:
            said.append(environment.step(say(MEANINGS[generator.integers(len(MEANINGS))], generator)))
            over = said[-1][2] or said[-1][3]
        return said

    assert conversation(5) == conversation(5)
    assert len({str(conversation(seed)) for seed in range(20)}) == 20


def test_step_before_reset_and_after_the_end_is_an_error():
    environment = SuggestedResponse(arguments={"max_turns": 1})
    with pytest.raises(ResetNeeded, match="call reset"):
        environment.step(FINE)
    environment.reset(seed=0)
    environment.step(FINE)
    with pytest.raises(ResetNeeded, match="call reset"):
        environment.step(FINE)


def test_what_the_business_sends_is_what_the_customer_gets():
    environment = SuggestedResponse(ECHO)
    observation, info = environment.reset(seed=0)
    assert (observation, info) == ("good morning", {})
    for count in range(1, 101):
        observation, reward, terminated, truncated, info = environment.step(f"how about offer {count}?")
        assert observation == info["sent"] == environment.inner.sent[-1]
        assert info["decision"] in DECISIONS
        assert (reward, terminated, truncated, info["count"]) == (0.5, False, count == 100, count)
        if info["decision"] == "accepted":
            assert info["sent"] == f"how about offer {count}?"
        elif info["decision"] != "edited":
            assert info["sent"] in NEUTRAL_MESSAGES


def test_decisions_depend_on_the_text():
    environment = SuggestedResponse()
    environment.reset(seed=0)
    assert environment.flaws(FINE) == Flaws(long=False, pushy=False, off_topic=False)
    assert environment.flaws(OFF_TOPIC) == Flaws(long=False, pushy=False, off_topic=True)
    assert environment.flaws(PUSHY) == Flaws(long=False, pushy=True, off_topic=False)
    assert environment.flaws("BUY the basic trail SHOE").pushy
    assert environment.flaws(LONG) == Flaws(long=True, pushy=False, off_topic=False)
    fine, off_topic, pushy, long = (shares(text) for text in (FINE, OFF_TOPIC, PUSHY, LONG))
    assert fine["accepted"] == pytest.approx(0.7, abs=0.1)
    assert all(share > 0.03 for share in fine.values())
    for flawed in (off_topic, pushy, long):
        assert flawed["accepted"] == pytest.approx(0.21, abs=0.08)
    assert pushy["edited"] > 0.35 < long["edited"]
    assert off_topic["edited"] < 0.1
    for text in (FINE, OFF_TOPIC, PUSHY, LONG, "", "\n"):
        assert sum(environment.decision_probabilities(text).values()) == pytest.approx(1)


def test_parameters_move_the_decisions():
    assert shares(FINE, acceptance=1.0) == {"accepted": 1.0, "edited": 0.0, "rejected": 0.0, "ignored": 0.0}
    assert shares(FINE, acceptance=0.0)["accepted"] == 0
    assert shares(FINE, max_words=3)["accepted"] < 0.4
    assert shares(OFF_TOPIC, topic="fruit bananas")["accepted"] > 0.6
    with pytest.raises(ValueError, match="acceptance"):
        SuggestedResponse(acceptance=1.5)
    with pytest.raises(ValueError, match="max_words"):
        SuggestedResponse(max_words=0)


def test_what_was_said_is_on_topic():
    environment = SuggestedResponse(ECHO, acceptance=1.0, topic="")
    environment.reset(seed=0)
    assert environment.flaws("bananas").off_topic
    assert not environment.flaws("a good morning to you").off_topic
    while environment.step("bananas")[4]["decision"] != "accepted":
        pass
    assert not environment.flaws("some banana").off_topic


@pytest.mark.parametrize("suggestion", ["", "  \n"])
def test_an_empty_suggestion_is_an_abstention(suggestion):
    for info in steps(suggestion, 50):
        assert info["decision"] == "ignored"
        assert info["meaning"] != "unclear"
        assert info["sent"].strip()


def test_most_edits_keep_the_meaning_and_every_edit_changes_the_text():
    environment, generator, kept = SuggestedResponse(acceptance=0.0), np.random.default_rng(0), []
    for seed, meaning in enumerate(MEANINGS * 100):
        environment.reset(seed=seed)
        suggestion = say(meaning, generator)
        info = environment.step(suggestion)[4]
        if info["decision"] == "edited":
            assert info["sent"] != suggestion
            kept.append(read_seller(info["sent"]) == meaning)
    assert 0.8 < np.mean(kept) < 0.95
    assert all(info["sent"] == FINE for info in steps(FINE, 20, acceptance=1.0))
    edits = {info["sent"] for info in steps(PUSHY, 200) if info["decision"] == "edited"}
    assert PUSHY not in edits
    assert not any("hurry" in text or "!!" in text for text in edits)
    assert any(str(read_seller(text)) == "recommend basic trail" for text in edits)
    edits = {info["sent"] for info in steps(LONG, 200) if info["decision"] == "edited"}
    assert max(len(text.split()) for text in edits) <= 20


def test_a_rejecting_business_says_something_else():
    shared = {decision: [] for decision in DECISIONS}
    for info in steps(FINE, 1500, acceptance=0.0):
        shared[info["decision"]].append(len(content_stems(info["sent"]) & content_stems(FINE)))
    assert np.mean(shared["rejected"]) < np.mean(shared["ignored"]) / 2


@given(st.text(max_size=500))
def test_any_suggestion_is_taken(suggestion):
    environment = SuggestedResponse()
    environment.reset(seed=0)
    observation, _, _, _, info = environment.step(suggestion)
    assert environment.observation_space.contains(observation)
    assert info["decision"] in DECISIONS


def test_scripted_seller_and_branches_come_from_the_inner_environment():
    environment, generator = SuggestedResponse(), np.random.default_rng(0)
    assert isinstance(environment, ScriptedEnvironment)
    assert isinstance(environment, BranchingEnvironment)
    observation, info = environment.reset(seed=0)
    chat = [{"role": "system", "content": info["system"]}, {"role": "user", "content": observation}]
    texts = [
        seller.scripted_response(chat, np.random.default_rng(1)) for seller in (environment, Storefront(), environment)
    ]
    assert len(set(texts)) == 1

    environment.step(FINE)
    before = copy.deepcopy(environment)
    ends = set()
    for _ in range(30):
        branch, over = environment.branch(generator), False
        while not over:
            observation, _, terminated, truncated, info = branch.step("shall i place the order?")
            over = terminated or truncated
        ends.add((observation, info["sent"]))
    assert len(ends) > 5
    assert environment.step(FINE) == before.step(FINE)
    with pytest.raises(ValueError, match=r"Echo has no branch"):
        SuggestedResponse(ECHO).branch(generator)


def test_flawless_suggestions_are_worth_making():
    """The optimal seller's suggestions sell less often than its own messages, and more often than the business's."""

    def rate(suggest):
        environment, generator, total = SuggestedResponse(), np.random.default_rng(0), 0.0
        for seed in range(500):
            environment.reset(seed=seed)
            over = False
            while not over:
                _, reward, terminated, truncated, _ = environment.step(suggest(environment.inner, generator))
                total, over = total + reward, terminated or truncated
        return total / 500

    abstaining = rate(lambda *_: "")
    suggesting = rate(lambda inner, generator: say(inner.best_meaning(), generator))
    assert 0.2 < abstaining < 0.4
    assert abstaining + 0.2 < suggesting < Storefront().optimum() - 0.02


# Naming an environment


def test_built_in_environments_and_any_class_are_made():
    assert isinstance(make_environment("storefront"), Storefront)
    assert make_environment("storefront", {"max_turns": 3}).max_turns == 3
    nested = make_environment("suggested_response", {"environment": "suggested_response"})
    assert isinstance(nested.inner.inner, Storefront)
    assert isinstance(make_environment(DUCK), Duck)
    environment = SuggestedResponse(DUCK)
    environment.reset(seed=0)
    assert environment.step("quack")[:4] == ("bye", 1.0, True, False)


@pytest.mark.parametrize(
    ("entry_point", "arguments", "message"),
    [
        ("shop", {}, "neither storefront, suggested_response nor a class as package.module:ClassName"),
        ("", {}, "neither"),
        ("a:b:c", {}, "neither"),
        ("not a module:Class", {}, "neither"),
        ("no_such_module_here:Shop", {}, "cannot import no_such_module_here: ModuleNotFoundError: No module named"),
        ("tests.no_such_module:Shop", {}, "cannot import tests.no_such_module"),
        (f"{__name__}:Shop", {}, "has no class Shop"),
        (f"{__name__}:FINE", {}, "has no class FINE"),
        (f"{__name__}:NoStep", {}, "lacks reset or step"),
        (ECHO, {"colour": "red"}, "colour"),
        ("storefront", {"colour": "red"}, "colour"),
        ("suggested_response", {"environment": "shop"}, "neither"),
    ],
)
def test_a_bad_entry_point_is_a_clear_error(entry_point, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_environment(entry_point, arguments)
    assert "\n" not in str(caught.value)


def test_a_class_of_the_current_folder_is_found(tmp_path):
    (tmp_path / "my_shop.py").write_text(
        "class Shop:\n"
        "    def reset(self, *, seed=None, options=None):\n        return 'hi', {}\n"
        "    def step(self, action):\n        return 'bye', 1.0, True, False, {}\n"
    )
    code = (
        "import json, sys; sys.path = [p for p in sys.path if p]\n"
        "from iterative_ppo.environments import make_environment\n"
        "shop = make_environment('my_shop:Shop')\n"
        "from iterative_ppo.environments import storefront, suggested_response\n"
        "print(json.dumps([shop.reset(), 'torch' in sys.modules]))"
    )
    root = str(pytest.importorskip("iterative_ppo").__path__[0]).rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [["hi", {}], False]


def test_pairs_of_decisions_and_texts_are_all_seen():
    """Every decision is met with every kind of suggestion, so a log holds the pairs that a policy must learn from."""
    for text, decision in itertools.product((FINE, OFF_TOPIC, PUSHY, LONG), DECISIONS):
        environment = SuggestedResponse()
        environment.reset(seed=0)
        assert environment.decision_probabilities(text)[decision] > 0.03
