"""The words of the storefront: at least five paraphrases of every meaning, on both sides.

A paraphrase is drawn evenly, whoever the customer is: it tells nothing beyond its meaning. The vocabulary is
small and common, so that a tiny model can learn it.
"""

from collections.abc import Mapping

import numpy as np

from iterative_ppo.environments.storefront_customer import Act, Meaning, Reply, Says

SYSTEM = "you sell shoes: basic at 60, premium at 120"

SELLER_PHRASES: Mapping[Act, tuple[str, ...]] = {
    Act.ASK_NEED: (
        "what kind of shoe do you need?",
        "which type of shoe are you after?",
        "what will you use the shoes for?",
        "where will you wear the shoes?",
        "please tell me what you need",
        "which sport are the shoes for?",
        "what shoes are you looking for?",
    ),
    Act.ASK_BUDGET: (
        "what is your budget?",
        "how much can you spend?",
        "which price range do you like?",
        "how much do you want to pay?",
        "is there a price limit for you?",
        "do you have a budget in mind?",
    ),
    Act.RECOMMEND: (
        "i recommend the {tier} {need} shoe",
        "you will like the {tier} {need} shoe",
        "the {tier} {need} shoe suits you well",
        "try the {tier} {need} shoe",
        "my pick is the {tier} {need} shoe",
        "how about the {tier} {need} shoe?",
        "look at the {tier} {need} shoe",
    ),
    Act.REASSURE_DURABILITY: (
        "it is durable and lasts for years",
        "it has a two year warranty",
        "the sole is very strong",
        "it is built to last",
        "do not worry, it will not break",
        "it is tough and will not wear out",
    ),
    Act.REASSURE_RETURNS: (
        "you can return it for free",
        "returns are free for thirty days",
        "send it back if it does not fit",
        "we exchange the size for free",
        "wrong size? we swap it",
        "you get your money back if you return it",
    ),
    Act.OFFER_DISCOUNT: (
        "i can give you ten percent off",
        "there is a discount for you today",
        "i can lower the price for you",
        "here is a special deal for you",
        "you get a coupon today",
        "i can make it cheaper for you",
    ),
    Act.COMPLIMENT: (
        "you have great taste",
        "what a lovely day!",
        "it is nice to talk with you",
        "i love your style",
        "that is a smart choice",
        "it is a pleasure to meet you",
    ),
    Act.CLOSE: (
        "shall i place the order?",
        "do you want to buy it now?",
        "can i ring it up for you?",
        "are you ready to check out?",
        "shall i pack it for you?",
        "will you take it?",
    ),
}

CUSTOMER_PHRASES: Mapping[Says, tuple[str, ...]] = {
    Says.OPENS: (
        "hi, i need new shoes",
        "hello, i want some shoes",
        "hey, can you help me with shoes?",
        "hi, i am looking for shoes",
        "hello, do you sell shoes?",
        "hey, show me your shoes",
    ),
    Says.OPENS_WITH_NEED: (
        "hi, i need a {need} shoe",
        "hello, do you have {need} shoes?",
        "hey, i am looking for {need} shoes",
        "hi, i want a new {need} shoe",
        "hello, a {need} shoe for me please",
        "hey, show me your {need} shoes",
    ),
    Says.OPENS_FOR_DEAL: (
        "hi, any deals on shoes?",
        "hello, is there a discount on shoes?",
        "hey, i want shoes at a good deal",
        "hi, do you have a deal on shoes?",
        "hello, i need shoes with a discount",
    ),
    Says.OPENS_WITH_NEED_FOR_DEAL: (
        "hi, any deals on {need} shoes?",
        "hello, is there a discount on {need} shoes?",
        "hey, i want {need} shoes at a good deal",
        "hi, do you have a deal on {need} shoes?",
        "hello, i need {need} shoes with a discount",
    ),
    Says.NEEDS: (
        "i need a {need} shoe",
        "it should be a {need} shoe",
        "{need} shoes, please",
        "i am looking for a {need} shoe",
        "a {need} shoe would be good",
        "i want {need} shoes",
    ),
    Says.TIGHT_BUDGET: (
        "my budget is small",
        "i can not spend much",
        "it must be cheap",
        "not more than 70",
        "i only have 70",
        "something cheap, please",
    ),
    Says.AMPLE_BUDGET: (
        "my budget is big",
        "i can spend a lot",
        "the price is no problem",
        "up to 150 is fine",
        "i have 150 to spend",
        "any price is fine",
    ),
    Says.WRONG_KIND: (
        "no, that is the wrong kind",
        "that is not my kind of shoe",
        "i need another kind of shoe",
        "no, not that kind of shoe",
        "that is the wrong type for me",
    ),
    Says.TOO_EXPENSIVE: (
        "that is too expensive for me",
        "i can not pay that much",
        "that costs too much",
        "the price is too high",
        "no, it is too expensive",
    ),
    Says.LUKEWARM: (
        "okay, but it is rather plain",
        "hmm, it is a bit too simple",
        "not bad, but too plain for me",
        "okay, but i hoped for better",
        "hmm, is there a better one?",
    ),
    Says.WORRY_DURABILITY: (
        "nice, but will it last?",
        "i like it, but is it strong?",
        "good one, but does it break?",
        "looks good, but is it durable?",
        "nice, but will it wear out?",
    ),
    Says.WORRY_RETURNS: (
        "nice, but will it fit?",
        "i like it, but is the size right?",
        "good one, but can i return it?",
        "looks good, but it may not fit",
        "nice, but what about the size?",
    ),
    Says.CONVINCED: (
        "good, that settles it",
        "great, no more doubts",
        "okay, that is good to know",
        "fine, that answers my question",
        "good, now i feel sure",
    ),
    Says.OTHER_WORRY: (
        "that is not my worry",
        "i have another worry",
        "that does not answer my question",
        "i did not ask about that",
        "my doubt is another one",
    ),
    Says.NO_SHOE_YET: (
        "which shoe do you mean?",
        "what shoe do you talk about?",
        "you did not show me a shoe yet",
        "about which shoe?",
        "we have no shoe yet",
    ),
    Says.HEARD_ALREADY: (
        "you said that already",
        "yes, i know that already",
        "i heard that before",
        "you repeat yourself",
        "yes, we had that before",
    ),
    Says.DELIGHTED: (
        "oh, a discount, how great!",
        "wow, i love a good deal!",
        "a lower price, how nice!",
        "great, i like to save!",
        "wonderful, a nice discount!",
    ),
    Says.SUSPICIOUS: (
        "another discount? that is strange",
        "why cut the price again?",
        "still cheaper? something is wrong",
        "a deal again? that is strange",
        "why another deal?",
    ),
    Says.FLATTERED: (
        "thank you, how kind!",
        "oh, you are so kind!",
        "thanks, that makes me smile",
        "how sweet of you!",
        "thanks, you are friendly!",
    ),
    Says.IMPATIENT: (
        "let us get to the point",
        "enough talk, please",
        "no more small talk, please",
        "i have no time to chat",
        "can we get to the point?",
    ),
    Says.HESITATES: (
        "i am not sure yet",
        "let me think about it",
        "maybe, i need to think",
        "hmm, i still hesitate",
        "maybe later, not yet",
    ),
    Says.NOT_READY: (
        "buy what? that is too fast",
        "that is too fast for me",
        "slow down, i have no shoe",
        "i am not ready to buy",
        "buy now? that is too early",
    ),
    Says.CONFUSED: (
        "sorry, i do not understand",
        "sorry, what was that?",
        "i do not get that",
        "pardon, what was that?",
        "that makes no sense to me",
    ),
    Says.BUYS: (
        "yes, i take it",
        "okay, i will buy it",
        "yes, ring it up",
        "yes, place the order",
        "great, i will take it",
    ),
    Says.LEAVES: (
        "no thanks, goodbye",
        "i will look elsewhere, bye",
        "sorry, i have to go, bye",
        "i am leaving now, goodbye",
        "never mind, bye",
    ),
}


def say(meaning: Meaning, generator: np.random.Generator) -> str:
    """A seller's message of this meaning."""
    phrases = SELLER_PHRASES[meaning.act]
    return phrases[generator.integers(len(phrases))].format(need=meaning.need, tier=meaning.tier)


def reply_text(reply: Reply, generator: np.random.Generator) -> str:
    """A customer's message of this meaning."""
    phrases = CUSTOMER_PHRASES[reply.says]
    return phrases[generator.integers(len(phrases))].format(need=reply.need)
