"""What the words of a conversation teach a trunk while Q is fitted on it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from iterative_ppo.labelled_sequence import LabelledSequence
from iterative_ppo.q_function import QFunction

_ECHO_WEIGHT = 1 / 3


class WordTasks(nn.Module):
    """Predicts what answers a response, and which words of a response others have said before it.

    An outcome is one bit at the end of a conversation; the answer to a response is many, and says at once whether it
    was understood, liked or beside the point. To predict it the trunk must represent what Q needs to tell responses to
    one prompt apart. Often that is a comparison, of the shoe asked for and the one recommended, say. Neither word by
    itself tells anything, so that a trunk which does not compare them has no gradient to begin with it: it is asked
    whether a word has been heard, too, which is nothing but a comparison.

    *The answer*, from the end of the response, as a bag of words: −Σ_w share(w) log softmax(E P h + b)_w with the trunk's
    own embeddings E, held fixed, a projection P from the identity and a bias b from the words' frequencies.
    *Echoes*, at each word w of a response: the cross-entropy of σ(u · h + c_w) and whether others said w before, the
    rarer the word the more; a response weighs `_ECHO_WEIGHT` of an answer.

    Args:
        sequences: those trained on; frequencies are theirs.
    """

    def __init__(self, q_function: QFunction, sequences: Sequence[LabelledSequence]) -> None:
        super().__init__()
        embedding = q_function.model.get_input_embeddings()
        num_tokens, size = embedding.weight.shape
        self._embedding = [embedding]  # in a list: it is the trunk's, not this module's
        answers = [token for sequence in sequences for message in sequence.next_messages for token in message]
        count_V = 1.0 + np.bincount(answers, minlength=num_tokens)
        num_sequences_V = np.ones(num_tokens)
        for sequence in sequences:
            num_sequences_V[np.unique(sequence.token_ids)] += 1
        self._rarity_V = np.log(np.maximum(len(sequences) / num_sequences_V, 1.0))
        self.answer_projection_DD = nn.Parameter(torch.eye(size))
        self.answer_bias_V = nn.Parameter(torch.from_numpy(np.log(count_V / count_V.sum())).float())
        self.echo_D = nn.Parameter(torch.zeros(size))
        self.echo_bias_V = nn.Parameter(torch.zeros(num_tokens))
        self.to(q_function.device)

    def forward(self, hidden_BTD: Tensor, sequences: Sequence[LabelledSequence]) -> Tensor:
        """Sum of the losses over all responses."""
        return self._answer_loss(hidden_BTD, sequences) + _ECHO_WEIGHT * self._echo_loss(hidden_BTD, sequences)

    def _answer_loss(self, hidden_BTD: Tensor, sequences: Sequence[LabelledSequence]) -> Tensor:
        answered = [
            (row, end - 1, answer)
            for row, sequence in enumerate(sequences)
            for (_, end), answer in zip(sequence.spans, sequence.next_messages, strict=False)
            if answer
        ]
        if not answered:
            return hidden_BTD.new_zeros(())
        row_N, column_N, answer_N = zip(*answered, strict=True)
        projected_ND = hidden_BTD[list(row_N), list(column_N)] @ self.answer_projection_DD
        logprob_NV = (projected_ND @ self._embedding[0].weight.detach().T + self.answer_bias_V).log_softmax(-1)
        share_NV = np.zeros(logprob_NV.shape, dtype=np.float32)
        for share_V, answer in zip(share_NV, answer_N, strict=True):
            np.add.at(share_V, np.asarray(answer), 1 / len(answer))
        return -(logprob_NV * torch.from_numpy(share_NV).to(logprob_NV.device)).sum()

    def _echo_loss(self, hidden_BTD: Tensor, sequences: Sequence[LabelledSequence]) -> Tensor:
        place_N: list[tuple[int, int]] = []
        token_N: list[int] = []
        echo_N: list[float] = []
        weight_N: list[float] = []
        for row, sequence in enumerate(sequences):
            heard: set[int] = set()
            last_end = 0
            for start, end in sequence.spans:
                heard.update(sequence.token_ids[last_end:start])
                last_end = end
                response = sequence.token_ids[start:end]
                rarity_W = self._rarity_V[list(response)]
                place_N += [(row, column) for column in range(start, end)]
                token_N += response
                echo_N += [float(token in heard) for token in response]
                weight_N += (rarity_W / max(rarity_W.sum(), 1e-12)).tolist()
        if not place_N:
            return hidden_BTD.new_zeros(())
        row_N, column_N = torch.tensor(place_N, device=hidden_BTD.device).T
        logit_N = hidden_BTD[row_N, column_N] @ self.echo_D + self.echo_bias_V[token_N]
        echo, weight = (torch.tensor(x, device=hidden_BTD.device) for x in (echo_N, weight_N))
        return nn.functional.binary_cross_entropy_with_logits(logit_N, echo, weight=weight, reduction="sum")
