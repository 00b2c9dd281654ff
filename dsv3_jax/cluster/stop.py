"""The signals that ask a run to save and end."""

import signal


def stop_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and SIGHUP, which says that the terminal has gone, unless it is ignored as under nohup."""
    found = [signal.SIGINT, signal.SIGTERM]
    return found if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*found, signal.SIGHUP]
