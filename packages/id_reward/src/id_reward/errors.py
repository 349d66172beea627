"""What a user gave does not fit: one sentence, and no traceback on the command line."""


class InputError(ValueError):
    """A mistake in what was given, as opposed to one in the code; the message is one sentence that names what came and what is expected."""
