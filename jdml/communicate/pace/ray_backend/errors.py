"""What may stand between a caller and a server that is another process."""

from jdml.communicate.pace.errors import PaceError


class Unreachable(PaceError):
    """A server did not answer for as long as the caller was prepared to wait."""


class NotRestored(PaceError):
    """A server was started anew and has not been given its state back. Callers ask again."""
