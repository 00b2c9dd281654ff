"""What the words of a load's report mean, each as a function of what was seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """What a client saw of one request. Times are in seconds since the load's beginning."""

    arrival_s: float  # when it should have been sent; a client that is late with it is not excused
    prompt_tokens: int
    deliveries: tuple[tuple[float, int], ...] = ()  # when, and how many tokens; a draft that was right brings two at once
    error: str = ""

    @property
    def first_token_s(self) -> float:
        return self.deliveries[0][0] - self.arrival_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one delivery and the next."""
        return np.diff([at for at, _ in self.deliveries]).tolist()

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.deliveries)


@dataclass(frozen=True)
class Limits:
    """What a request must meet to count as good, in seconds."""

    first_token_s: float
    gap_s: float  # its own 99th percentile


def row_utilisation(counts: Mapping[str, float]) -> float:
    """Live rows over rows computed, padding of prompts included."""
    return counts["rows_live"] / counts["rows_computed"]


def decode_fill(counts: Mapping[str, float]) -> float:
    """The same of decoding rows alone."""
    return counts["decode_rows_live"] / counts["decode_rows_computed"]


def slot_occupancy(counts: Mapping[str, float]) -> float | None:
    """Live slots over slots in steps while somebody waits; None if nobody did. Without a queue it would measure the load."""
    slots = counts["slots_while_waiting"]
    return counts["slots_live_while_waiting"] / slots if slots else None


def busy(counts: Mapping[str, float], wall_s: float) -> float:
    """Time in steps over time on the wall."""
    return counts["busy_s"] / wall_s


def goodput(outcomes: Sequence[Outcome], limits: Limits, wall_s: float) -> float:
    """Requests that met both limits, a second."""
    return sum(_is_good(outcome, limits) for outcome in outcomes) / wall_s


def _is_good(outcome: Outcome, limits: Limits) -> bool:
    if outcome.error or outcome.first_token_s > limits.first_token_s:
        return False
    return not outcome.gaps_s or percentiles(outcome.gaps_s)["p99"] <= limits.gap_s


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, between neighbours in proportion."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}


def report(
    outcomes: Sequence[Outcome], counts: Mapping[str, float] | None, limits: Limits, wall_s: float
) -> dict[str, Any]:  # fmt: skip
    """All figures of a load.

    Args:
        outcomes: Of every request, failed ones too.
        counts: What `Engine.stats` counted meanwhile; None if the server does not say.
        limits: For goodput.
        wall_s: From the load's beginning to the last token.
    """
    served = [outcome for outcome in outcomes if not outcome.error]
    figures: dict[str, Any] = {
        "requests": len(outcomes), "failed": len(outcomes) - len(served), "wall_s": wall_s,
        "tokens_per_s": sum(o.tokens for o in served) / wall_s, "requests_per_s": len(served) / wall_s,
        "goodput_per_s": goodput(outcomes, limits, wall_s),
    }  # fmt: skip
    if served:
        figures["first_token_s"] = percentiles([o.first_token_s for o in served])
    if gaps_s := [gap for o in served for gap in o.gaps_s]:
        figures["gap_s"] = percentiles(gaps_s)
    if counts is not None and counts["decode_rows_computed"]:
        figures |= {
            "row_utilisation": row_utilisation(counts), "decode_fill": decode_fill(counts),
            "slot_occupancy_while_waiting": slot_occupancy(counts), "busy": busy(counts, wall_s),
            "drafts_accepted": counts["drafts_accepted"] / counts["drafts"] if counts["drafts"] else None,
        }  # fmt: skip
    return figures
