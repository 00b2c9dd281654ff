"""The engine's and the server's figures in Prometheus' text format."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping

_GAUGES = {"requests_running", "requests_waiting", "slots_live", "slots", "pages_free", "pages"}
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def metric_name(key: str) -> str:
    """What a figure of `Engine.stats` is called for Prometheus: counters have their unit and end in _total."""
    if key in _GAUGES:
        return f"dsv3_{key}"
    return f"dsv3_{key.removesuffix('_s')}{'_seconds' * key.endswith('_s')}_total"


class Histogram:
    """Seconds by `_BOUNDS`."""

    def __init__(self):
        self._counts, self._sum = [0] * (len(_BOUNDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server itself counts.

    Attributes:
        statuses: Responses by HTTP status; 499 for those whose client had gone.
        first_token: Seconds from a request to its first text.
        duration: Seconds from a request to the end of its response.
    """

    def __init__(self):
        self.statuses: Counter[int] = Counter()
        self.first_token, self.duration = Histogram(), Histogram()

    def text(self, engine: Mapping[str, float]) -> str:
        """All figures, those of `Engine.stats` among them."""
        lines = []
        for key, value in engine.items():
            name = metric_name(key)
            lines += [f"# TYPE {name} {'gauge' if key in _GAUGES else 'counter'}", f"{name} {value}"]
        lines.append("# TYPE dsv3_http_responses_total counter")
        lines += [f'dsv3_http_responses_total{{status="{status}"}} {n}' for status, n in sorted(self.statuses.items())]
        for name, histogram in (("first_token", self.first_token), ("request", self.duration)):
            lines += [f"# TYPE dsv3_{name}_seconds histogram", *histogram.lines(f"dsv3_{name}_seconds")]
        return "\n".join(lines) + "\n"
