"""What the lab raises when the user's input, and not the program, is at fault."""

from __future__ import annotations


class InputError(ValueError):
    """A file, a name or a number given by the user cannot be used.

    The message is one line that says what was given, what is accepted and the cure; the command line prints it
    as it stands and exits with status 2. Anything else that escapes is a bug and keeps its traceback.
    """
