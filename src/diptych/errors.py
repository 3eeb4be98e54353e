"""The exception for mistakes of the user, and the short form of other exceptions."""


class UserError(ValueError):
    """A mistake the user can mend. The message says which file or value, what is wrong and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, cut to its first line; the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
