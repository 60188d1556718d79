"""Errors that the user can fix."""
import sys
from contextlib import contextmanager
from typing import Iterator


class InputError(ValueError):
    """What the user gave is not what was expected; the message names the fix."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """In a command line tool: print the message of an InputError, and exit with status 1."""
    try:
        yield
    except InputError as error:
        sys.exit(str(error))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
