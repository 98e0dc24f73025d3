"""The one error class of the project, which every room may raise."""


class UserError(ValueError):
    """Reports what the user can mend, in one line that names what is wrong and what was expected."""
