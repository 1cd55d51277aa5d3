"""What a worker may be told instead of an answer."""


class PaceError(RuntimeError):
    """The server cannot answer; the message says which worker, and why."""


class StaleTimeout(PaceError):
    """The others did not come within the staleness bound in the time that the caller gave."""


class Evicted(PaceError):
    """The worker is no member: evicted, never registered, or an incarnation that was replaced."""


class Closed(PaceError):
    """The server was closed."""
