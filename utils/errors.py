"""The one error class for what a user can put right."""


class UserError(Exception):
    """Something in the user's files or options is wrong.

    The message names the file or the option, says what is wrong with it, and what to do. Entry scripts print it
    without a traceback and exit with code 2; any other exception is a defect of this project.
    """
