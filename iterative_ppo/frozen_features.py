"""What a frozen trunk says of logged conversations, computed once however often heads are fitted to it."""

from collections.abc import Sequence

from torch import Tensor

from iterative_ppo.adapters import name_of
from iterative_ppo.q_function import QFunction, TokenIds
from iterative_ppo.supervised import Progress, no_progress


class FeatureCache:
    """Features at positions of token rows, for any Q-function on one frozen trunk; in the processor's memory."""

    def __init__(self) -> None:
        self._trunk = ""
        self._kept: dict[TokenIds, tuple[dict[int, int], Tensor]] = {}

    def of(
        self,
        q_function: QFunction,
        rows: Sequence[TokenIds],
        positions: Sequence[Sequence[int]],
        *,
        tokens_per_batch: int,
        progress: Progress = no_progress,
    ) -> list[Tensor]:
        """For each row [P, F] at its positions: of a row that is not known there yet, by a pass over all of such rows.

        Args:
            q_function: whose trunk is frozen, and the same each time.
        """
        trunk = f"{q_function.num_layers} layers of {name_of(q_function.model)} with {q_function.marks}"
        assert q_function.read_out == "mean", "features of a trunk that is trained do not last"
        assert self._trunk in ("", trunk), f"features of {self._trunk}, and not of {trunk}"
        self._trunk = trunk
        wanted: dict[TokenIds, set[int]] = {}
        for row, places in zip(rows, positions, strict=True):
            known = self._kept[row][0].keys() if row in self._kept else set()
            if not known >= set(places):
                wanted.setdefault(row, set(known)).update(places)
        if wanted:
            ordered = [sorted(places) for places in wanted.values()]
            read = q_function.read_features(list(wanted), ordered, tokens_per_batch=tokens_per_batch, progress=progress)
            for row, places, feature_PF in zip(wanted, ordered, read, strict=True):
                self._kept[row] = {position: p for p, position in enumerate(places)}, feature_PF
        return [self._at(row, places) for row, places in zip(rows, positions, strict=True)]

    def _at(self, row: TokenIds, places: Sequence[int]) -> Tensor:
        index, feature_PF = self._kept[row]
        if list(places) == list(index):
            return feature_PF
        return feature_PF[[index[position] for position in places]]
