"""Error feedback: what a codec could not say this round is added to what is said next round."""

import dataclasses

from jdml.communicate.codecs import Codec


@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
    """See :func:`error_feedback`."""

    codec: Codec
    two_sided: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec):
            raise ValueError(
                f"error_feedback expected a codec such as int8(), got {self.codec!r}. Without a "
                "codec the exchange is exact and leaves no error to feed back."
            )


def error_feedback(codec: Codec, two_sided: bool = True) -> ErrorFeedback:
    """Adds the compression error of each round to the next: ``p = x + e; e <- p - C(p)``.

    In a two-phase all-reduce each worker owns one chunk of the mean and compresses it once more
    before everyone reads it. ``two_sided`` feeds that second error back too: it is kept, times the
    number of workers, where the owner's own chunk has no first error (a worker does not send to
    itself). So one residual of the size of the gradient holds both, and **the residuals summed over
    the workers, divided by their number, are what the mean still owes**.

    The residual is per-worker state of whichever transformation uses the codec. A value that is not
    finite reaches the mean but is not kept in the residual, which it would poison for good.

    Args:
      codec: Any codec, biased or not.
      two_sided: Whether the owner of a chunk keeps the error of its own compression.

    Reference: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019 (why it converges); Tang et
    al. 2019 (DoubleSqueeze) and Zheng et al. 2019 (two-sided).
    """
    return ErrorFeedback(codec, two_sided)
