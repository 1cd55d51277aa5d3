"""The centre of elastic averaging, which follows the workers' models."""

import dataclasses
import math

from jdml.communicate.pace.rules.add import Add


@dataclasses.dataclass(frozen=True)
class ElasticCentre(Add):
    """See :func:`elastic_centre`."""

    def check(self, num_workers: int) -> None:
        if self.scale * num_workers >= 2:
            raise ValueError(
                f"elastic_centre({self.scale}) with {num_workers} workers: the centre is unstable "
                f"from alpha = 2 / {num_workers} on. The paper takes 0.9 / {num_workers} = "
                f"{0.9 / num_workers:.3g}."
            )


def elastic_centre(alpha: float) -> ElasticCentre:
    """``c <- c + alpha sum_k (x_k - c_k)``, with ``c_k`` the centre that worker k read.

    Workers push their distance from it (:class:`ElasticWorker`, which moves by the opposite of what
    the centre moves), so that a codec's error is small when they are near.

    Args:
      alpha: Elasticity, in (0, 1); ``0.9 / K`` for K workers.

    Raises:
      ValueError: alpha is out of its range; at the server: ``alpha * K >= 2``.

    Reference: Zhang, Choromanska & LeCun, "Deep Learning with Elastic Averaging SGD", 2015,
    algorithm 1 (asynchronous EASGD).
    """
    if not (math.isfinite(alpha) and 0 < alpha < 1):
        raise ValueError(f"elastic_centre({alpha!r}): expected 0 < alpha < 1, such as 0.9 / K.")
    return ElasticCentre(alpha, mean=False)
