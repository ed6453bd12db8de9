"""What the exit status of every subcommand means."""

from __future__ import annotations

FOUND = 1
"""`diagnose --strict` has findings."""
BAD_INPUT = 2
"""Bad arguments or bad input, or a package is missing."""
USER_CODE = 3
"""The user's code raised, or a process that trained died."""
FAULT = 4
"""A fault of normwise itself."""
INTERRUPTED = 130
"""Ctrl-C, as shells count it: 128 + SIGINT."""


class UserCodeRaised(Exception):
    """Says in one line what the user's code raised; `trace` is their part of its traceback."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace
