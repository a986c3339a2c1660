"""The errors that a user's input can cause."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message names the file or key and says what to do about it. The command line prints the
    message alone and exits with status 2; a library caller catches it as a `ValueError`.
    """


class DivergedError(InputError):
    """A loss, a gradient or embeddings that are not finite."""


class TakenError(InputError):
    """Another process, or another place in this one, has what was to be worked on."""
