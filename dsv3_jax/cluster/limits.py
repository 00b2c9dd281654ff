"""How large a run can be."""

MOST_PROCESSES = 2**16
