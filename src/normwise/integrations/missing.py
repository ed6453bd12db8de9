"""What to say where a library is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(library: str, extra: str, by: str) -> Iterator[None]:
    """Around the import of an optional library: if it is not there, says which extra brings it.

    Raises:
        ModuleNotFoundError: as the import does, with the cure.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise  # the library is there, and lacks something itself
        raise ModuleNotFoundError(
            f"{by} needs {library}, which is not installed: pip install 'normwise[{extra}]'", name=error.name
        ) from error
