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

    What a worker says is said anew on the way, too: the owner of a chunk of the mean compresses it
    once more before everyone reads it, and on a ring or tree partial sums are. All errors go into
    one residual of the size of the gradient, each at a worker that made it, weighted so that in
    every topology **the residuals summed over the workers, divided by their number, are what the
    mean still owes**:

    - two-phase: a worker's error in the chunks of the others; in its own, of which it sends itself
      nothing, the error of the mean times the number of workers;
    - ring: the same, but in the others' chunks the error of the sum that it passed on;
    - tree: the error of each sum that it sent, shared by those that hold the same sum;
    - hierarchical: two-phase, in the part of the vector that the worker owns inside the fast axis;
    - all-gather: the error of its own share, all there is.

    With ``two_sided=False`` the error made in handing out the mean is dropped, and only what was
    lost on the way to it is paid back.

    The residual is per-worker state of whichever transformation uses the codec. A value that is not
    finite reaches the mean but is not kept in the residual, which it would poison for good.

    Args:
      codec: Any codec, biased or not.
      two_sided: Whether those who say the mean keep the error of that, too.

    Reference: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019 (why it converges); Tang et
    al. 2019 (DoubleSqueeze) and Zheng et al. 2019 (two-sided).
    """
    return ErrorFeedback(codec, two_sided)
