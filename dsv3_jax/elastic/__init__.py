"""Runs that go on when workers die, hang or lose their host: a supervisor, and the engines that give it hosts."""
