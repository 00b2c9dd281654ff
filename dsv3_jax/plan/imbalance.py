"""How unevenly tokens are spread over the devices that hold experts: a number, or what a run's router did."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_jax.errors import UserError
from dsv3_jax.records import Records
from dsv3_jax.runs.metrics import is_row


@dataclass(frozen=True)
class Imbalance:
    """Rows that the fullest device gets for its experts, over the mean: a number, or a record of a router."""

    number: float = 1.0  # 1 or more; unused if there is a record
    load_NE: np.ndarray | None = None  # tokens of each of E experts, for N recorded layers and steps
    source: str = ""  # the record's path
    skipped: int = 0  # damaged lines of it

    def among(self, ranks: int, experts: int) -> float:
        """The imbalance if `ranks` devices share `experts`: a mean over layers and steps, as each waits for its fullest device.

        Raises `UserError` if the record is of another number of experts.
        """
        if self.load_NE is None:
            return self.number
        if self.load_NE.shape[1] != experts:
            raise UserError(
                f"--imbalance={self.source} recorded {self.load_NE.shape[1]} experts, and model.n_routed_experts={experts}; "
                "use a run of a model with as many, or a number"
            )
        load_NR = self.load_NE.reshape(len(self.load_NE), ranks, -1).sum(-1)
        return float((load_NR.max(1) / load_NR.mean(1)).mean())


BALANCED = Imbalance()


def read_imbalance(given: str) -> Imbalance:
    """The imbalance of --imbalance: a number of 1 or more, or a run's routing.jsonl or directory. Raises `UserError`."""
    try:
        number = float(given)
    except ValueError:
        return _recorded(given)
    if not 1 <= number < float("inf"):
        raise UserError(f"--imbalance={given}: the fullest device has at least the mean, so use 1 or more")
    return Imbalance(number)


def _recorded(given: str) -> Imbalance:
    path = Path(given) / "routing.jsonl" if Path(given).is_dir() else Path(given)
    wrong = UserError(f"--imbalance={given}: use a number of 1 or more, or a run that has recorded a routing.jsonl")
    if not path.is_file():
        raise wrong
    try:
        rows = Records(path, is_row)
        load_NE = np.array([layer for row in rows for layer in row["load"]], np.float64)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        raise wrong from None
    if load_NE.ndim != 2 or not load_NE.size or not ((load_NE >= 0) & (load_NE < np.inf)).all() or not load_NE.any(1).all():
        raise wrong
    return Imbalance(load_NE=load_NE, source=given, skipped=rows.skipped)
