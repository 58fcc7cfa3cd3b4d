import copy
import itertools
import math
import warnings

import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from iterative_ppo.environments import BranchingEnvironment, ScriptedEnvironment, storefront_optimum
from iterative_ppo.environments.storefront import Storefront
from iterative_ppo.environments.storefront_customer import (
    EFFECTS,
    MEANINGS,
    NEEDS,
    TIERS,
    UNCLEAR,
    Act,
    Interest,
    Meaning,
    Progress,
    Reply,
    Says,
    advance,
    customer_probabilities,
    opening_probabilities,
    reply_probabilities,
)
from iterative_ppo.environments.storefront_language import CUSTOMER_PHRASES, SELLER_PHRASES, reply_text, say
from iterative_ppo.environments.storefront_optimum import Seller, Values, values
from iterative_ppo.environments.storefront_parser import read_reply, read_seller
from iterative_ppo.environments.storefront_seller import HABITS, scripted_response

TRAIL_BASIC = Meaning(Act.RECOMMEND, "trail", "basic")
TRAIL_PREMIUM = Meaning(Act.RECOMMEND, "trail", "premium")


def all_seller_texts():
    for meaning in MEANINGS:
        for phrase in SELLER_PHRASES[meaning.act]:
            yield phrase.format(need=meaning.need, tier=meaning.tier), meaning


def all_customer_texts():
    for says, phrases in CUSTOMER_PHRASES.items():
        for phrase, need in itertools.product(phrases, NEEDS):
            yield phrase.format(need=need), Reply(says, need if "{need}" in phrase else "")


def play(environment, generator, choose):
    """Play the running conversation to its end: the sum of the rewards."""
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, _ = environment.step(say(choose(environment), generator))
        total, over = total + reward, terminated or truncated
    return total


def sale_rate(seller, num_conversations):
    environment, generator, total = Storefront(), np.random.default_rng(1), 0.0
    for seed in range(num_conversations):
        environment.reset(seed=seed)
        total += play(environment, generator, lambda running: running.best_meaning(seller))
    return total / num_conversations


def within(rate, expected, num_samples):
    """Inside four standard errors: fails by chance once in some 16,000 seeds, and the seed is fixed."""
    return abs(rate - expected) <= 4 * math.sqrt(expected * (1 - expected) / num_samples)


# The Gymnasium contract


def test_gymnasium_checker_passes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(Storefront(), skip_render_check=True)


def test_same_seed_same_conversation():
    def texts(seed):
        environment, generator = Storefront(), np.random.default_rng(0)
        observation, info = environment.reset(seed=seed)
        said, over = [observation, info], False
        while not over:
            messages = [{"role": "user", "content": text} for text in said if isinstance(text, str)]
            step = environment.step(environment.scripted_response(messages, generator))
            said.extend(step)
            over = step[2] or step[3]
        return said

    assert texts(7) == texts(7)
    assert len({str(texts(seed)) for seed in range(20)}) == 20


def test_step_before_reset_and_after_the_end_is_an_error():
    environment = Storefront(max_turns=1)
    with pytest.raises(ResetNeeded, match="call reset"):
        environment.step("hello")
    environment.reset(seed=0)
    environment.step("hello")
    with pytest.raises(ResetNeeded, match="call reset"):
        environment.step("hello")


def test_the_turn_cap_truncates():
    environment = Storefront(max_turns=2)
    environment.reset(seed=0)
    assert environment.step("what is your budget?")[2:4] == (False, False)
    assert environment.step("what is your budget?")[2:4] == (False, True)
    with pytest.raises(ValueError, match="max_turns"):
        Storefront(max_turns=0)


def test_reward_is_one_at_the_sale_and_zero_before():
    environment, generator, num_sales = Storefront(), np.random.default_rng(0), 0
    for seed in range(200):
        observation, _ = environment.reset(seed=seed)
        rewards, over = [], False
        while not over:
            observation, reward, terminated, truncated, _ = environment.step(say(environment.best_meaning(), generator))
            rewards.append(reward)
            over = terminated or truncated
        sold = read_reply(observation).says == Says.BUYS
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0 if sold else 0.0]
        num_sales += sold
    assert num_sales > 100


def test_a_deep_copy_goes_on_alike_and_apart():
    environment, generator = Storefront(), np.random.default_rng(0)
    environment.reset(seed=3)
    other = copy.deepcopy(environment)
    steps = [environment.step("what kind of shoe do you need?") for _ in range(2)]
    assert steps == [other.step("what kind of shoe do you need?") for _ in range(2)]
    assert environment.value() == other.value()
    play(other, generator, lambda running: running.best_meaning())
    environment.step("what is your budget?")


# Language


def test_at_least_five_short_paraphrases_of_every_meaning():
    assert set(SELLER_PHRASES) == set(Act) - {Act.UNCLEAR}
    assert set(CUSTOMER_PHRASES) == set(Says) == set(EFFECTS)
    for phrases in (*SELLER_PHRASES.values(), *CUSTOMER_PHRASES.values()):
        assert len(set(phrases)) == len(phrases) >= 5
    assert all(3 <= len(text.split()) <= 10 for text, _ in all_seller_texts())
    assert all(3 <= len(text.split()) <= 12 for text, _ in all_customer_texts())
    texts = [text for text, _ in (*all_seller_texts(), *all_customer_texts())]
    assert len({word.strip("?,.!") for text in texts for word in text.split()}) < 250


def test_every_paraphrase_reads_as_its_meaning():
    for text, meaning in all_seller_texts():
        for variant in (text, text.upper(), text.replace("?", "").replace(",", ""), f"  {text}..."):
            assert read_seller(variant) == meaning, variant
        assert read_seller(text, on_table=TRAIL_BASIC) == meaning, text
    for text, reply in all_customer_texts():
        assert read_reply(text) == reply, text


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("Could you tell me how much money you'd want to spend?", "ask budget"),
        ("What price did you have in mind?", "ask budget"),
        ("Which activity are these for?", "ask need"),
        ("Hello! How can I help you today?", "ask need"),
        ("trail, road, court or casual?", "ask need"),
        ("Are you looking for a trail shoe?", "ask need"),
        ("I'd go for the Premium Trail model.", "recommend premium trail"),
        ("I would suggest our court shoe, the cheaper one", "recommend basic court"),
        ("Free refunds, no questions asked", "reassure returns"),
        ("If it doesn't fit, just bring it back", "reassure returns"),
        ("They are really sturdy", "reassure durability"),
        ("It comes with a guarantee", "reassure durability"),
        ("I could take 10% off", "offer discount"),
        ("For you there's a voucher", "offer discount"),
        ("Should I put it in your cart?", "close"),
        ("Wanna purchase it?", "close"),
        ("You've got awesome taste", "compliment"),
        ("ok", "unclear"),
        ("lorem ipsum dolor", "unclear"),
    ],
)
def test_unseen_wordings_are_understood(text, meaning):
    assert str(read_seller(text)) == meaning


@pytest.mark.parametrize(
    ("word", "frame", "act"),
    [
        ("budget", "your {}?", Act.ASK_BUDGET),
        ("discount", "a {} for you", Act.OFFER_DISCOUNT),
        ("return", "just {} it", Act.REASSURE_RETURNS),
        ("warranty", "a long {}", Act.REASSURE_DURABILITY),
        ("durable", "so {}", Act.REASSURE_DURABILITY),
        ("purchase", "will you {}?", Act.CLOSE),
        ("premium", "the {} trail shoe", Act.RECOMMEND),
        ("trail", "the premium {} shoe", Act.RECOMMEND),
        ("court", "the premium {} shoe", Act.RECOMMEND),
        ("casual", "the premium {} shoe", Act.RECOMMEND),
    ],
)
def test_a_swapped_missing_or_doubled_letter_is_tolerated(word, frame, act):
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1)]
    missing = [word[:i] + word[i + 1 :] for i in range(1, len(word))]
    doubled = [word[:i] + word[i] + word[i:] for i in range(1, len(word))]
    for typo in (*swapped, *missing, *doubled):
        assert read_seller(frame.format(typo)) == read_seller(frame.format(word)), typo
    assert read_seller(frame.format(word)).act == act


def test_two_meanings_are_answered_on_the_first_in_the_order_of_priority():
    assert read_seller("the basic trail shoe, with a discount") == TRAIL_BASIC
    assert read_seller("it is durable, shall i place the order?") == Meaning(Act.REASSURE_DURABILITY)
    assert read_seller("great choice! what is your budget?") == Meaning(Act.ASK_BUDGET)
    for (first, a), (second, b) in itertools.combinations(all_seller_texts(), 2):
        assert read_seller(f"{first} {second}") in (a, b, UNCLEAR), (first, second)


def test_naming_the_shoe_on_the_table_is_no_recommendation():
    text = "shall i order the basic trail shoe?"
    assert read_seller(text) == TRAIL_BASIC
    assert read_seller(text, on_table=TRAIL_BASIC) == Meaning(Act.CLOSE)
    assert read_seller(text, on_table=TRAIL_PREMIUM) == TRAIL_BASIC
    assert read_seller("then try the premium one", on_table=TRAIL_BASIC) == TRAIL_PREMIUM
    assert read_seller("then try the premium one") == UNCLEAR


EVERYTHING = ". ".join(SELLER_PHRASES[act][0].format(need="trail", tier="basic") for act in SELLER_PHRASES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n\t",
        "?!",
        "x" * 10_000,
        "i recommend the basic trail shoe " * 300,
        "你好，我推荐这双鞋",
        "\U0001f45f\ud83d\x00",
        EVERYTHING,
        "what is your budget? it is durable. shall i place the order?",
        "the basic trail shoe or the premium road shoe",
        "basic or premium trail shoe?",
    ],
)
def test_what_is_not_understood_costs_patience(text):
    environment = Storefront()
    for seed in range(10):
        environment.reset(seed=seed)
        num_turns, terminated = 0, False
        while not terminated:
            observation, reward, terminated, truncated, info = environment.step(text)
            assert (info["meaning"], reward, truncated) == ("unclear", 0.0, False)
            assert environment.observation_space.contains(observation)
            num_turns += 1
        assert 2 <= num_turns <= 4


@given(st.text(max_size=300))
def test_any_text_is_read(text):
    assert read_seller(text) in (*MEANINGS, UNCLEAR)
    assert read_reply(text).says in Says


def test_all_words_at_once_sell_nothing():
    environment, generator = Storefront(), np.random.default_rng(0)
    acts = list(SELLER_PHRASES)
    for seed in range(300):
        environment.reset(seed=seed)
        over, total = False, 0.0
        while not over:
            picked = [acts[i] for i in generator.choice(len(acts), size=4, replace=False)]
            text = " ".join(say(Meaning(act, "trail", "basic"), generator) for act in picked)
            _, reward, terminated, truncated, _ = environment.step(text)
            total, over = total + reward, terminated or truncated
        assert total == 0


# The customer


def reachable():
    """Every (customer, progress) pair, over a grid that covers what can be reached."""
    for interest, spent, flattered in itertools.product(Interest, range(7), (False, True)):
        progress = Progress(turns=1, patience_spent=spent, interest=interest, flattered=flattered)
        for customer in customer_probabilities():
            if spent < customer.patience:
                yield customer, progress


def test_probabilities_add_up_to_one():
    assert sum(customer_probabilities().values()) == pytest.approx(1)
    for customer in customer_probabilities():
        assert sum(opening_probabilities(customer).values()) == pytest.approx(1)
    for customer, progress in reachable():
        for meaning in (*MEANINGS, UNCLEAR):
            assert sum(reply_probabilities(customer, progress, meaning).values()) == pytest.approx(1)


def test_questions_blunders_and_small_talk_cost_patience_and_a_match_does_not():
    free = {says for says, effect in EFFECTS.items() if effect.patience == 0}
    assert {Says.WORRY_DURABILITY, Says.WORRY_RETURNS, Says.CONVINCED} <= free
    for says in (Says.NEEDS, Says.TIGHT_BUDGET, Says.FLATTERED, Says.WRONG_KIND, Says.OTHER_WORRY, Says.CONFUSED):
        assert EFFECTS[says].patience > 0
    before_a_sale = {says: effect.reaction for says, effect in EFFECTS.items() if says != Says.BUYS}
    assert max(before_a_sale, key=before_a_sale.__getitem__) == Says.DELIGHTED
    assert all(-1 <= effect.reaction <= 1 for effect in EFFECTS.values())


def test_an_early_discount_harms_and_a_late_one_helps_who_likes_it():
    def close(likes_discounts, *acts):
        customer = next(
            c for c in customer_probabilities() if c[:3] == ("trail", "tight", likes_discounts) and c.patience > 4
        )
        progress = Progress()
        for meaning in acts:
            progress = advance(progress, next(iter(reply_probabilities(customer, progress, meaning))))
        if progress.interest == Interest.WORRIED_DURABILITY:
            progress = progress._replace(interest=Interest.CONVINCED)
        return reply_probabilities(customer, progress, Meaning(Act.CLOSE))[Reply(Says.BUYS)]

    discount = Meaning(Act.OFFER_DISCOUNT)
    for likes_discounts in (True, False):
        never, early, late = (
            close(likes_discounts, *acts) for acts in ([TRAIL_BASIC], [discount, TRAIL_BASIC], [TRAIL_BASIC, discount])
        )
        assert early < never / 2
        assert late > never if likes_discounts else early < late < never


def test_info_and_observations_follow_from_the_texts_alone():
    """`meaning` is read off the response and `reaction` off the answer, so neither can betray the customer."""
    environment, generator = Storefront(), np.random.default_rng(0)
    for seed in range(100):
        observation, info = environment.reset(seed=seed)
        assert set(info) == {"system"}
        assert len(info["system"].split()) <= 20
        over = False
        while not over:
            meaning = MEANINGS[generator.integers(len(MEANINGS))]
            observation, _, terminated, truncated, info = environment.step(say(meaning, generator))
            reply, over = read_reply(observation), terminated or truncated
            assert info == {"meaning": str(meaning), "reaction": EFFECTS[reply.says].reaction}
    texts = [reply_text(Reply(Says.CONVINCED), np.random.default_rng(seed)) for seed in range(50)]
    assert len(set(texts)) == len(CUSTOMER_PHRASES[Says.CONVINCED])


# Exact values


def test_the_gap_between_what_pleases_and_what_sells():
    environment = Storefront()
    optimum, greedy, uniform = environment.optimum(), environment.greedy_reaction_rate(), environment.uniform_rate()
    assert 0.85 <= optimum <= 0.95
    assert greedy < 0.2
    assert greedy < optimum / 2
    assert uniform < 0.08


@pytest.mark.parametrize("seller", [Seller.OPTIMAL, Seller.GREEDY])
def test_exact_values_are_reached_through_the_text_interface(seller):
    rate = sale_rate(seller, num_conversations=2000)
    exact = Storefront().optimum() if seller == Seller.OPTIMAL else Storefront().greedy_reaction_rate()
    assert within(rate, exact, 2000), (rate, exact)


def test_the_uniform_seller_reaches_its_exact_value():
    environment, generator, total = Storefront(), np.random.default_rng(2), 0.0
    for seed in range(3000):
        environment.reset(seed=seed)
        total += play(environment, generator, lambda _: MEANINGS[generator.integers(len(MEANINGS))])
    assert within(total / 3000, environment.uniform_rate(), 3000)


def test_renaming_needs_changes_no_value(monkeypatch):
    renamed = {seller: Values(max_turns=3).rate(seller) for seller in Seller}
    monkeypatch.setattr(storefront_optimum, "canonical", lambda belief: belief)
    for seller in Seller:
        assert Values(max_turns=3).rate(seller) == pytest.approx(renamed[seller], abs=1e-9)


def test_who_sees_the_hidden_customer_does_better_than_the_optimum():
    """The wrong formula: an optimum per customer, averaged, is no value that a seller could reach."""
    table = values(Storefront().max_turns)
    clairvoyant = sum(
        probability * table.value(Seller.OPTIMAL, ((customer, 1.0),), Progress())
        for customer, probability in customer_probabilities().items()
    )
    assert clairvoyant > table.rate(Seller.OPTIMAL) + 0.02


def test_more_turns_are_worth_more_until_patience_binds():
    rates = [Values(max_turns).rate(Seller.OPTIMAL) for max_turns in (2, 3, 4)]
    assert rates[0] < rates[1] < rates[2] <= Storefront().optimum()
    assert rates[0] < 0.2


# Branches


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["what kind of shoe do you need?"],
        ["what kind of shoe do you need?", "here is a discount"],
        ["which shoe do you need?", "what is your budget?"],
    ],
)
def test_mean_outcome_of_branches_is_the_value_of_the_belief(texts):
    environment = Storefront()
    for seed in itertools.count(5):
        environment.reset(seed=seed)
        if not any(environment.step(text)[2] for text in texts):
            break
    value, customer = environment.value(), environment._customer
    generator = np.random.default_rng(4)
    outcomes = [play(environment.branch(generator), generator, lambda b: b.best_meaning()) for _ in range(1000)]
    assert within(np.mean(outcomes), value, 1000), (np.mean(outcomes), value)
    assert (environment.value(), environment._customer) == (value, customer)


def test_a_branch_redraws_what_is_hidden_and_a_copy_does_not():
    environment, generator = Storefront(), np.random.default_rng(0)
    environment.reset(seed=1)
    budgets = {True: set(), False: set()}
    for is_branch, _ in itertools.product((True, False), range(40)):
        other = environment.branch(generator) if is_branch else copy.deepcopy(environment)
        budgets[is_branch].add(read_reply(other.step("what is your budget?")[0]).says)
    assert budgets[True] == {Says.TIGHT_BUDGET, Says.AMPLE_BUDGET}
    assert len(budgets[False]) == 1


def test_a_branch_keeps_what_was_said():
    environment, generator = Storefront(), np.random.default_rng(0)
    environment.reset(seed=2)
    need = read_reply(environment.step("what kind of shoe do you need?")[0]).need
    for _ in range(30):
        assert read_reply(environment.branch(generator).step("what kind of shoe do you need?")[0]).need == need


# The scripted seller


def test_scripted_seller_is_mediocre():
    environment, generator = Storefront(), np.random.default_rng(0)
    assert isinstance(environment, ScriptedEnvironment)
    assert isinstance(environment, BranchingEnvironment)
    outcomes, turns = [], []
    for seed in range(3000):
        observation, info = environment.reset(seed=seed)
        messages = [{"role": "system", "content": info["system"]}, {"role": "user", "content": observation}]
        over = False
        while not over:
            response = environment.scripted_response(messages, generator)
            observation, reward, terminated, truncated, _ = environment.step(response)
            messages += [{"role": "assistant", "content": response}, {"role": "user", "content": observation}]
            over = terminated or truncated
        outcomes.append(reward)
        turns.append((len(messages) - 2) // 2)
    assert 0.27 <= np.mean(outcomes) <= 0.33
    assert 4 <= np.mean(turns) <= 8


def test_scripted_seller_does_everything_in_every_situation():
    for habits in HABITS.values():
        assert set(habits) == set(SELLER_PHRASES)
        assert sum(habits.values()) == pytest.approx(1)
        assert min(habits.values()) >= 0.03


def test_scripted_seller_hears_who_asked_for_a_deal_and_closes_once_a_discount_delights():
    def shares(opening, *more):
        generator = np.random.default_rng(0)
        chat = [
            {"role": "user", "content": reply_text(Reply(opening, "trail"), generator)},
            {"role": "assistant", "content": "take the basic trail shoe"},
            {"role": "user", "content": reply_text(Reply(Says.CONVINCED), generator)},
            *more,
        ]
        acts = [read_seller(scripted_response(chat, np.random.default_rng(seed))).act for seed in range(1000)]
        return acts.count(Act.OFFER_DISCOUNT) / 1000, acts.count(Act.CLOSE) / 1000

    delighted = [
        {"role": "assistant", "content": say(Meaning(Act.OFFER_DISCOUNT), np.random.default_rng(0))},
        {"role": "user", "content": reply_text(Reply(Says.DELIGHTED), np.random.default_rng(0))},
    ]
    assert shares(Says.OPENS_WITH_NEED) == pytest.approx((0.20, 0.59), abs=0.05)
    assert shares(Says.OPENS_WITH_NEED_FOR_DEAL) == pytest.approx((0.40, 0.35), abs=0.05)
    assert shares(Says.OPENS_WITH_NEED_FOR_DEAL, *delighted) == pytest.approx((0.09, 0.60), abs=0.05)


def test_scripted_seller_copies_the_need_and_reads_the_customer_only():
    environment = Storefront()
    chat = [
        {"role": "system", "content": "you sell road shoes"},
        {"role": "user", "content": "hi, i need a court shoe"},
        {"role": "assistant", "content": "what is your budget?"},
        {"role": "user", "content": "i can not spend much"},
    ]
    other = [message if message["role"] == "user" else message | {"content": "premium road"} for message in chat]
    texts = [environment.scripted_response(chat, np.random.default_rng(seed)) for seed in range(400)]
    assert texts == [environment.scripted_response(other, np.random.default_rng(seed)) for seed in range(400)]
    recommended = [read_seller(text) for text in texts if read_seller(text).act == Act.RECOMMEND]
    assert 260 < len(recommended) < 340
    # Often enough wrong, and often enough right, for the difference to be seen in the outcomes.
    assert np.mean([meaning.need == "court" for meaning in recommended]) == pytest.approx(0.76, abs=0.07)
    assert np.mean([meaning.tier == "basic" for meaning in recommended]) == pytest.approx(0.83, abs=0.07)
    assert {meaning.tier for meaning in recommended} == set(TIERS)
