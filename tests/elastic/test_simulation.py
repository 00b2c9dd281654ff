"""The simulation of failures against what can be said without one."""

import random
from dataclasses import replace

import pytest

from tests.conftest import load_script

simulation = load_script("studies/simulate_failures")

ELASTIC = simulation.DESIGNS["elastic"]
YEAR = 365 * 86400.0


def goodput(design, hosts, shrunk, replaced, restore, seed=0):
    return simulation.simulate(design, hosts, shrunk, YEAR, replaced, restore, random.Random(seed))


def test_without_failures_only_stalls_cost(monkeypatch):
    monkeypatch.setattr(simulation, "FAILURES_PER_DEVICE_SECOND", 1e-30)
    design = replace(ELASTIC, stall=6.0)
    assert goodput(design, 8, 6, 600.0, 10.0) == pytest.approx(600 / 606, rel=1e-9)


@pytest.mark.parametrize("elastic", [True, False])
def test_failures_that_are_rare_cost_what_each_costs(monkeypatch, elastic):
    """Where one is over long before the next: rate x (detection, starts, half an interval, work at lower speed)."""
    rate = 1 / 86400.0  # one a day
    monkeypatch.setattr(simulation, "FAILURES_PER_DEVICE_SECOND", rate / (8 * simulation.HOST))
    design = replace(ELASTIC, stall=0.0, elastic=elastic)
    down = design.restart + design.compile + 40.0
    lost = design.detection + down + (simulation.INTERVAL + simulation.STEP) / 2
    lost += (down + (1 - 6 / 8) * (600.0 - design.detection - down)) if elastic else 600.0
    found = sum(goodput(design, 8, 6, 600.0, 40.0, seed=seed) for seed in range(20)) / 20
    assert 1 - found == pytest.approx(lost * rate, rel=0.05)
