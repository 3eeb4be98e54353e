"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake the user can mend. The message says which file or value, what is wrong and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2.
    """
