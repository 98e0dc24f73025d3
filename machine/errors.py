"""The one error class of the project; every room may raise it."""


class UserError(ValueError):
    """Reports a mistake that the user can mend, in one line: the file, line or option, and the value that was expected."""
