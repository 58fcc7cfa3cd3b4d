"""Prompts and responses in, and out the reward that an improvement step would see: what the Q service computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iterative_ppo.config import Config
from iterative_ppo.loading import load_q_and_renderer
from iterative_ppo.q_function import QFunction, QFunctionCard, load_card
from iterative_ppo.rendering import Renderer, TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A prompt and a whole response that fit into the model's context together.

    Example:
        Item(prompt=(1, 8, 9, 4), response=(5, 6, 2))
    """

    prompt: TokenIds
    response: TokenIds
    """Ends with the end-of-response token, where Q is read."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Q of one response.

    Example:
        Reading(reward=0.58, q_value=0.61)
    """

    reward: float
    """The ensemble's mean minus `q_function.pessimism` standard deviations: what the improvement step is paid."""
    q_value: float
    """What the one-label checkpoint gives."""


class QScorer:
    """A Q-function, its tokenizer and how prompts are rendered for it.

    Args:
        q_function: the model.
        card: what its folder says about it.
        renderer: with the policy's context and room for a response, so that prompts are cut as the policy's are.
        pessimism: standard deviations of the ensemble that the reward lies below its mean.
        tokens_per_batch: `compute.tokens_per_batch`.
    """

    def __init__(
        self,
        q_function: QFunction,
        card: QFunctionCard,
        renderer: Renderer,
        *,
        pessimism: float,
        tokens_per_batch: int,
    ) -> None:
        self.q_function = q_function
        self.card = card
        self.renderer = renderer
        self.pessimism = pessimism
        self.tokens_per_batch = tokens_per_batch
        self.vocabulary_size = int(q_function.model.get_input_embeddings().num_embeddings)

    @classmethod
    def load(cls, folder: Path, config: Config) -> "QScorer":
        """Loads a Q-function's folder; ValueError with one line where it cannot be."""
        card = load_card(folder)
        q_function, renderer = load_q_and_renderer(folder, config)
        return cls(
            q_function,
            card,
            renderer,
            pessimism=config.q_function.pessimism,
            tokens_per_batch=config.compute.tokens_per_batch,
        )

    def item(self, prompt: TokenIds, response: TokenIds) -> Item:
        """A prompt, its beginning cut where it is too long, and a response, which gets its end where it has none.

        Raises:
            ValueError: the prompt is empty, or the response leaves no room for it.
        """
        if not prompt:
            raise ValueError("the prompt holds no token")
        response = self.renderer.ended(response)
        room = self.renderer.context_tokens - len(response)
        if room < 1:
            raise ValueError(
                f"the response has {len(response)} tokens, its end included: it must be shorter than the model's "
                f"context of {self.renderer.context_tokens}"
            )
        return Item(prompt=prompt[-min(room, self.renderer.prompt_budget) :], response=response)

    def item_of_text(self, text: str, *, prompt: str | None = None) -> Item:
        """A prompt and a response that come as one text with its special tokens.

        Args:
            prompt: the text's beginning, where it is known which part is the prompt: the two parts are tokenized apart, as
                they were when the response was sampled. Otherwise the beginning is cut where all of it is too long.
        """
        if prompt and text.startswith(prompt):
            return self.item(self.renderer.encode(prompt), self.renderer.encode(text.removeprefix(prompt)))
        token_ids = self.renderer.encode(text)
        if token_ids[-1:] == (self.renderer.end_id,):
            token_ids = token_ids[:-1]
        if not token_ids:
            raise ValueError("the text holds no token")
        return Item(
            prompt=token_ids[-(self.renderer.context_tokens - 1) :],
            response=(self.renderer.end_id,),
        )

    def read(self, items: Sequence[Item]) -> list[Reading]:
        """Q of each item, in one pass over all of them."""
        scalar_BM = self.q_function.ensemble_scalars(
            [item.prompt for item in items],
            [item.response for item in items],
            tokens_per_batch=self.tokens_per_batch,
        )
        rewards = self.q_function.pessimistic_value(scalar_BM, pessimism=self.pessimism).tolist()
        q_values = self.q_function.mean_value(scalar_BM).tolist()
        return [Reading(reward=reward, q_value=q_value) for reward, q_value in zip(rewards, q_values, strict=True)]
