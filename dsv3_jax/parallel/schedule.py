"""Pipeline schedules as data: what each stage does at each tick.

A stage (an index along `pipe`) holds `chunks` pieces of the model; piece c of stage s is the (c * stages + s)-th in order, so
that a microbatch goes round the stages `chunks` times (interleaved, or circular: arXiv 2104.04473, section 2.2). A tick has
room for one forward and one backward piece on every stage; what a stage sends at a tick, its neighbour takes at the next.
All stages run the same program, so a tick in which no stage goes forward (or backward) costs nothing for it.
"""

import itertools
from dataclasses import dataclass

import numpy as np

IDLE = -1


@dataclass(frozen=True)
class Schedule:
    """Tables i32[ticks, stages]: the microbatch and the chunk that a stage takes, IDLE where it takes none.

    A stage keeps a piece's input from forward to backward in one of its `slots` buffers: `forward_slot` is where it is put,
    `backward_slot` where it is taken from.
    """

    name: str
    stages: int
    chunks: int
    microbatches: int
    forward: np.ndarray
    forward_chunk: np.ndarray
    forward_slot: np.ndarray
    backward: np.ndarray
    backward_chunk: np.ndarray
    backward_slot: np.ndarray
    slots: int

    @property
    def ticks(self) -> int:
        return len(self.forward)

    @property
    def occupancy(self) -> float:
        """Share of the stages' time that is work: pieces done over room for pieces, where a tick whose forward (or backward)
        half no stage uses has no such half. Says nothing about how fast a piece is."""
        halves = [table[(table != IDLE).any(1)] for table in (self.forward, self.backward)]
        return float(sum((h != IDLE).sum() for h in halves) / sum(h.size for h in halves))

    @property
    def entering(self) -> np.ndarray:
        """i32[ticks]: the microbatch that enters the first piece."""
        return np.where(self.forward_chunk[:, 0] == 0, self.forward[:, 0], IDLE)

    @property
    def leaving(self) -> np.ndarray:
        """i32[ticks]: the microbatch that leaves the last piece, forward."""
        return np.where(self.forward_chunk[:, -1] == self.chunks - 1, self.forward[:, -1], IDLE)

    @property
    def returning(self) -> np.ndarray:
        """i32[ticks]: the microbatch whose backward pass starts, at the last piece."""
        return np.where(self.backward_chunk[:, -1] == self.chunks - 1, self.backward[:, -1], IDLE)

    @property
    def done(self) -> np.ndarray:
        """i32[ticks]: the microbatch whose backward pass leaves the first piece."""
        return np.where(self.backward_chunk[:, 0] == 0, self.backward[:, 0], IDLE)

    def phases(self) -> list[tuple[int, int, bool, bool]]:
        """Runs of ticks (begin, end, any forward, any backward)."""
        kinds = list(zip((self.forward != IDLE).any(1), (self.backward != IDLE).any(1), strict=True))
        cuts = [0, *(t for t in range(1, self.ticks) if kinds[t] != kinds[t - 1]), self.ticks]
        return [(a, b, bool(kinds[a][0]), bool(kinds[a][1])) for a, b in itertools.pairwise(cuts)]

    def __str__(self) -> str:
        """One line a stage: F0.1 is microbatch 0 forward through chunk 1, B backward."""
        lines = []
        for s in range(self.stages):
            cells = []
            for t in range(self.ticks):
                parts = [
                    f"{letter}{m[t, s]}.{c[t, s]}" if m[t, s] != IDLE else ""
                    for letter, m, c in (
                        ("F", self.forward, self.forward_chunk),
                        ("B", self.backward, self.backward_chunk),
                    )
                ]
                cells.append("+".join(p for p in parts if p) or "-")
            lines.append(f"stage {s}: " + " ".join(f"{c:>9s}" for c in cells))
        return "\n".join(lines)


def _slots(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, int]:
    """A buffer for each interval [begin, end], and how many there are: the first one that is free."""
    free_at: list[int] = []
    slots = np.zeros(len(begin), np.int32)
    for i in np.argsort(begin, kind="stable"):
        slot = next((s for s, t in enumerate(free_at) if t < begin[i]), len(free_at))
        if slot == len(free_at):
            free_at.append(0)
        free_at[slot] = int(end[i])
        slots[i] = slot
    return slots, len(free_at)


def make_schedule(name: str, stages: int, chunks: int, microbatches: int) -> Schedule:
    """`gpipe`: everything forward, then everything backward, so that inputs of all microbatches are kept. `1f1b`: a
    microbatch turns round at the last piece at once; how many inputs are kept depends on stages and chunks only.

    Microbatches go in groups of `stages`, each through all chunks before the next group.
    """
    m, c, s = (a.reshape(-1) for a in np.meshgrid(range(microbatches), range(chunks), range(stages), indexing="ij"))
    group, member = m // stages, m % stages
    lap = chunks * stages
    forward_tick = group * lap + c * stages + member + s
    # the tick at which the first microbatch turns round at the last piece
    turns = {"1f1b": lap - 1, "gpipe": int(forward_tick.max()) + 1}
    backward_tick = turns[name] + group * lap + (chunks - 1 - c) * stages + member + stages - 1 - s
    ticks = int(backward_tick.max()) + 1

    slot, slots = np.zeros(len(m), np.int32), 0
    for stage in range(stages):
        mine = s == stage
        slot[mine], used = _slots(forward_tick[mine], backward_tick[mine])
        slots = max(slots, used)

    def table(tick, values):
        filled = np.full((ticks, stages), IDLE, np.int32)
        filled[tick, s] = values
        return filled

    return Schedule(
        name, stages, chunks, microbatches,
        table(forward_tick, m), table(forward_tick, c), table(forward_tick, slot),
        table(backward_tick, m), table(backward_tick, c), table(backward_tick, slot), slots,
    )  # fmt: skip
