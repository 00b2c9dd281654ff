"""Whether drafts pay: a step with them takes longer, and gives more tokens the more of them are right."""

from collections.abc import Mapping

_KEPT = 0.98  # of what is known about drafts, after another step
_PRIOR = 6.5, 10.0  # right ones of drafts, before there were any: what a trained module reaches on text


class DraftRule:
    """`seconds` has a step's, by its number of sequences, without drafts and with them."""

    def __init__(self, seconds: Mapping[int, tuple[float, float]]):
        self._seconds = seconds
        self._right, self._drafted = _PRIOR

    @property
    def acceptance(self) -> float:
        """The share of recent drafts that were right."""
        return self._right / self._drafted

    def saw(self, drafted: int, right: int) -> None:
        """A step's drafts."""
        if drafted:
            self._right, self._drafted = self._right * _KEPT + right, self._drafted * _KEPT + drafted

    def pay(self, sequences: int) -> bool:
        """Whether a step of so many sequences gives more tokens a second with drafts."""
        without, with_drafts = self._seconds[sequences]
        return without * (1 + self.acceptance) > with_drafts
