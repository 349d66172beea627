"""What a user gave does not fit: one sentence, and no traceback on the command line."""

import re


class InputError(ValueError):
    r"""A mistake in what was given, as opposed to one in the code; the message is one sentence that names what came and what is expected.

    It stands on one line, also where what came prints on several, as arrays do.

    >>> str(InputError("a picture must be a path, got [[0]\n [1]]"))
    'a picture must be a path, got [[0] [1]]'
    """

    def __init__(self, message: str) -> None:
        """``message`` with its line breaks as spaces."""
        super().__init__(re.sub(r"\s*\n\s*", " ", message))
