"""What the words of a conversation teach a trunk while Q is fitted on it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.q_function import QFunction

_RECALL_WEIGHT = 0.3
_LEAST_COUNT = 1e-3  # of a word that every conversation holds: it is not recalled, and its frequency has a logarithm


class WordTasks(nn.Module):
    """Predicts, from the end of a response, words of the conversation: those that answer it and those said so far.

    An outcome is one bit at the end of a conversation; the answer to a response is many, and says at once whether it
    was understood, liked or beside the point. To predict it the trunk must represent what Q needs to tell responses to
    one prompt apart. Often that is a comparison, of the shoe asked for and the one recommended, say. Neither word by
    itself tells anything, so that a trunk which holds neither has no gradient to either: it is asked for both, too.

    Three bags of words, each −Σ_w share(w) log softmax(E P h + b)_w with the trunk's own embeddings E, held fixed, a
    projection P from the identity and a bias b from the words' frequencies: the answer's, all its words alike, and, with
    weight `_RECALL_WEIGHT`, the response's own and those that others have said before it, the rarer the more.

    Args:
        sequences: those trained on; frequencies are theirs.
    """

    def __init__(self, q_function: QFunction, sequences: Sequence[LabelledSequence]) -> None:
        super().__init__()
        embedding = q_function.model.get_input_embeddings()
        num_tokens, size = embedding.weight.shape
        self._embedding = [embedding]  # in a list: it is the trunk's, not this module's
        answers = [token for sequence in sequences for message in sequence.next_messages for token in message]
        num_uses_V, num_sequences_V = np.ones(num_tokens), np.ones(num_tokens)
        for sequence in sequences:
            tokens, counts = np.unique(sequence.token_ids, return_counts=True)
            num_uses_V[tokens] += counts
            num_sequences_V[tokens] += 1
        self._rarity_V = np.log(np.maximum(len(sequences) / num_sequences_V, 1.0))
        recalled_V = num_uses_V * self._rarity_V + _LEAST_COUNT
        count_3V = np.stack([1.0 + np.bincount(answers, minlength=num_tokens), recalled_V, recalled_V])
        self.projection_3DD = nn.Parameter(torch.eye(size).repeat(3, 1, 1))
        self.bias_3V = nn.Parameter(torch.from_numpy(np.log(count_3V / count_3V.sum(1, keepdims=True))).float())
        self.to(q_function.device)

    def forward(self, hidden_BTD: Tensor, sequences: Sequence[LabelledSequence]) -> Tensor:
        """Sum of the cross-entropies over all answered responses."""
        places: list[tuple[int, int]] = []
        bags: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # place, which of the three, words and their shares
        for row, sequence in enumerate(sequences):
            for end, three in self._bags(sequence):
                for kind, (word_W, weight_W) in enumerate(three):
                    total = weight_W.sum()
                    if total > 0:
                        bags.append((len(places), kind, word_W, weight_W / total))
                places.append((row, end - 1))
        if not places:
            return hidden_BTD.new_zeros(())
        row_N, column_N = torch.tensor(places, device=hidden_BTD.device).T
        projected_N3D = torch.einsum("nd,kcd->nkc", hidden_BTD[row_N, column_N], self.projection_3DD)
        logprob_N3V = (projected_N3D @ self._embedding[0].weight.detach().T + self.bias_3V).log_softmax(-1)
        share_N3V = np.zeros(logprob_N3V.shape, dtype=np.float32)
        for place, kind, word_W, share_W in bags:
            np.add.at(share_N3V[place, kind], word_W, share_W)
        share_N3V[:, 1:] *= _RECALL_WEIGHT
        return -(logprob_N3V * torch.from_numpy(share_N3V).to(logprob_N3V.device)).sum()

    def _bags(self, sequence: LabelledSequence) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray]]]]:
        """Of each answered response its end and its three bags: words and weights."""
        token_T = np.asarray(sequence.token_ids)
        rarity_T = self._rarity_V[token_T]
        is_heard_T = np.ones(len(token_T), dtype=bool)
        for start, end in sequence.spans:
            is_heard_T[start:end] = False
        heard_W, heard_rarity_W = token_T[is_heard_T], rarity_T[is_heard_T]
        num_heard_T = np.cumsum(is_heard_T)
        for (start, end), answer in zip(sequence.spans, sequence.next_messages, strict=False):
            if answer:
                num_heard = num_heard_T[start - 1]
                yield (
                    end,
                    [
                        (np.asarray(answer), np.ones(len(answer))),
                        (token_T[start:end], rarity_T[start:end]),
                        (heard_W[:num_heard], heard_rarity_W[:num_heard]),
                    ],
                )
