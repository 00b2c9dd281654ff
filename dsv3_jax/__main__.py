"""The program: `dsv3`, or `python -m dsv3_jax`.

Ctrl-C ends it at once where Python would print a traceback or lose the interrupt: while modules are imported, whose code may
catch it, and after the command, while threads are waited for. In between it is the command's (see cli.py).
"""

import signal


def main() -> None:
    """Run the command line of this process."""
    handler = signal.getsignal(signal.SIGINT)
    at_once = signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL  # a shell ignores it for its background jobs
    signal.signal(signal.SIGINT, at_once)
    from dsv3_jax import cli

    signal.signal(signal.SIGINT, handler)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, at_once)


if __name__ == "__main__":
    main()
