"""Both passes of attention as one function."""

import jax


def with_gradients(attend):
    """``(query, key, value, gradient) -> (output, dq, dk, dv)``."""

    def run(query, key, value, gradient):
        output, back = jax.vjp(attend, query, key, value)
        return output, *back(gradient)

    return run
