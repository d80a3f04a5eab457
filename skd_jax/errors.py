"""The one exception that a user's mistake ends in."""


class UserError(Exception):
    """Wrong input from outside; the message is one line: what is wrong and how to mend it."""
