"""Code of the user's that raises: told apart from what the user typed wrong, and from faults of normwise."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from normwise.cli.status import UserCodeRaised
from normwise.diagnosis.errors import DiagnosisError, UserCodeError
from normwise.lab.errors import LabError, StoreError, WorkerError

NORMWISE = Path(__file__).resolve().parent.parent
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"]).resolve()
PACKAGES = [Path(sysconfig.get_paths()[kind]).resolve() for kind in ("purelib", "platlib")]
OURS = (LabError, StoreError, WorkerError, DiagnosisError, typer.BadParameter, typer.Exit)
TRACEBACK = "Traceback (most recent call last):"


@contextmanager
def calling(what: str) -> Iterator[None]:
    """While `what` of the user's runs: whatever it raises, `sys.exit` included, becomes UserCodeRaised.

    Ctrl-C passes, and what normwise raises: its own errors, and a fault in its code that never left it.
    """
    try:
        yield
    except UserCodeError as error:
        raise UserCodeRaised(str(error), their_traceback(error.__cause__ or error)) from error
    except OURS:
        raise
    except (Exception, SystemExit) as error:
        if not _left_normwise(error):
            raise
        said = str(error).partition("\n")[0]
        said = f"{what} raised {type(error).__name__}" + (f": {said}" if said else "")
        raise UserCodeRaised(said, their_traceback(error)) from error


def their_traceback(error: BaseException) -> str:
    """As Python prints it, without the calls that lead from `normwise` to the user's code; of a worker process, what
    was raised there."""
    there = type(error.__cause__).__name__ == "_RemoteTraceback"  # joblib's
    if there:
        text = str(error.__cause__).strip().strip('"').strip("\n") + "\n"
    else:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    first, *parts = text.split(f"{TRACEBACK}\n")
    return first + "".join(f"{TRACEBACK}\n{_from_their_first_call(part)}" for part in parts)


def _from_their_first_call(text: str) -> str:
    calls = re.split(r'(?m)^(?=  File ")', text)
    head, calls = calls[0], calls[1:]
    files = [Path(call.partition('"')[2].partition('"')[0]) for call in calls]
    theirs = next((at for at, file in enumerate(files) if _is_theirs(file)), None)
    if theirs is None:  # a layer of torch's alone, say
        theirs = next((at for at, file in enumerate(files) if not _is_within(file, NORMWISE)), 0)
    return head + "".join(calls[theirs:])


def _left_normwise(error: BaseException) -> bool:
    """Whether a call outside of normwise and the standard library is on the way to where it was raised."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return isinstance(error, SyntaxError) or any(
        _is_theirs(file) or any(_is_within(file, place) for place in PACKAGES) for file in files
    )


def _is_theirs(file: Path) -> bool:
    """Neither of normwise, nor of Python or an installed package."""
    return file.suffix == ".py" and not any(
        _is_within(file, place) for place in (NORMWISE, STANDARD_LIBRARY, *PACKAGES)
    )


def _is_within(file: Path, folder: Path) -> bool:
    return folder in file.resolve().parents
