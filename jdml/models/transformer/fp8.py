"""Products of 8-bit floats: what both passes read is e4m3, gradients are e5m2; sums are float32.

    q(x) = round(x / s) with s = max|x| / max(format)         one scale a tensor
    y  = q₄(x) q₄(w) · s_x s_w
    dx = q₅(dy) q₄(w)ᵀ · s_dy s_w,  dw = q₄(x)ᵀ q₅(dy) · s_x s_dy

e4m3 has 3 bits behind the point and ends at 448, e5m2 has 2 and ends at 57,344: values are rounded
by at most 2⁻⁴ and 2⁻³ of themselves, those below 2⁻⁶ (2⁻¹⁴) of the format's unit by an absolute
step. Scales are those of the tensor itself (current scaling): a maximum more to take, and no
history to keep or to resume from. Where a tensor is divided over devices its maximum is one number
exchanged. Parameters stay float32. What the backward pass keeps of ``x`` takes one byte.

Flax's ``fp8_ops`` keeps histories of maxima in variables whose "gradient" is their next value: an
Optax chain, or a mean over workers, would take them for parameters.

Reference: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jdml.sharding.region import first_device

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


@jax.custom_vjp
def fp8_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x`` [..., in] times ``kernel`` float32 [in, out]; [..., out] in the dtype of ``x``."""
    return _forward(x, kernel)[0]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    (x8, of_x), (kernel8, of_kernel) = quantise(x, FORWARD), quantise(kernel, FORWARD)
    y = _product(x8, kernel8, (x.ndim - 1,), (0,)) * (of_x * of_kernel)
    return y.astype(x.dtype), (x8, of_x, kernel8, of_kernel)


def _backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x8, of_x, kernel8, of_kernel = kept
    gradient8, of_gradient = quantise(gradient, GRADIENT)
    dx = _product(gradient8, kernel8, (gradient.ndim - 1,), (1,)) * (of_gradient * of_kernel)
    lead = tuple(range(x8.ndim - 1))
    dkernel = _product(x8, gradient8, lead, lead) * (of_x * of_gradient)
    return dx.astype(gradient.dtype), dkernel


fp8_matmul.defvjp(_forward, _backward)


def quantise(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """``x / scale`` in ``dtype``, and the float32 scale; NaN and infinity stay what they are."""
    peak = jnp.max(jnp.abs(x)).astype(jnp.float32)
    most = float(jnp.finfo(dtype).max)
    scale = jnp.where((peak > 0) & jnp.isfinite(peak), peak / most, 1.0)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale


def has_fp8_products(device: Any) -> bool:
    """Whether the device multiplies 8-bit floats, rather than widening them first.

    NVIDIA GPUs from compute capability 8.9 on, TPUs from the seventh generation on. Compilers for
    others accept the products, too, and gain nothing by them.
    """
    if device.platform in ("gpu", "cuda"):
        return float(getattr(device, "compute_capability", "0")) >= 8.9
    return device.device_kind.startswith("TPU7")


def check_backend() -> None:
    """Raises ``ValueError`` where the devices in force have no such products."""
    device = first_device()
    if not has_fp8_products(device):
        raise ValueError(
            f"matmul='fp8': {device.device_kind!r} devices ({device.platform}) have no products of "
            "8-bit floats; GPUs from compute capability 8.9 and TPUs from v7 on have. Leave matmul "
            "at 'dtype', or ask for the rounding alone: matmul='fp8_emulated'."
        )


def _product(a: jax.Array, b: jax.Array, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> jax.Array:
    contracted = ((of_a, of_b), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)
