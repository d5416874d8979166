"""The one error type users are meant to read."""


class GraftError(ValueError):
    """Bad input: the message names the thing that is wrong and the remedy."""
