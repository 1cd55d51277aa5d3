"""The forms of attention as functions: in a ``shard_map`` of one's own, and under the rules.

The backward pass is stated, not derived: what is kept of a pass is each device's queries, keys,
values, output and one number per query; the scores are computed again.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jdml.models.attention.form import Form, Kept
from jdml.models.attention.gathered import Gathered
from jdml.models.attention.order import ORDERS, Order, check_divides
from jdml.models.attention.region import Region, region
from jdml.models.attention.ring import Ring
from jdml.models.attention.ulysses import Ulysses
from jdml.sharding import Without
from jdml.sharding.fit import axes_of
from jdml.sharding.rules import entry_of

FormName = Literal["ring", "ulysses", "gather"]
FORMS: dict[str, type[Form]] = {"ring": Ring, "ulysses": Ulysses, "gather": Gathered}

# Between layers (``presets.sequence_parallel``) the heads' axis may divide positions, too.
_SEQ = Without("seq", "heads")

KEPT = "attention"
"""Name, for ``jax.checkpoint_policies.save_only_these_names``, of the output and the sums of
exponentials: saved, a pass is not run, nor anything exchanged, a third time."""


def attention_on_shards(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axis: str | tuple[str, ...],
    form: FormName = "ring",
    *,
    causal: bool = True,
    order: Order = "contiguous",
    block: int = 512,
) -> jax.Array:
    """Attention over a sequence divided over ``axis``, inside a ``shard_map`` manual over it.

    Args:
      query: [batch, heads, seq / K, head_dim], this device's positions.
      key, value: [batch, kv_heads, seq / K, head_dim]; ``kv_heads`` divides ``heads``.
      axis, form, causal, order, block: as in ``divided_attention``.

    Returns:
      Like ``query``.

    Raises:
      ValueError: as ``divided_attention``.
    """
    _check_arrays(query, key, value)
    size = jax.lax.axis_size(axis)
    chosen = _form(form, axis, size, causal, order, block)
    check_divides(query.shape[2] * size, size, order)
    chosen.check(query.shape[1], query.shape[2])

    @jax.custom_vjp
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return forward(query, key, value)[0]

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Kept]:
        kept = _named(chosen.forward(query, key, value))
        return kept.output, kept

    def backward(kept: Kept, gradient: jax.Array) -> Any:
        return chosen.backward(*_apart(kept, gradient))

    attend.defvjp(forward, backward)
    return attend(query, key, value)


def divided_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    form: FormName = "ring",
    *,
    causal: bool = True,
    order: Order = "contiguous",
    block: int = 512,
) -> jax.Array:
    """``softmax(q kᵀ / sqrt(head_dim)) v`` over a sequence that the current rules divide.

    The mesh axis is that of the logical name ``seq``, without axes that divide ``heads``. Batch
    and heads stay divided as the rules say; where they leave ``kv_heads`` whole and divide
    ``heads``, each device takes the key heads that its queries use, and the gradients of keys and
    values are summed over that axis. Inside ``no_mesh``, or where no axis divides ``seq``, it is
    blockwise attention of whole sequences.

    With K devices, and B bytes of a device's keys and values (Q of its queries; gradients of keys
    in float32: G), each device sends, in a forward and a backward pass:

    - ``"ring"``: (K − 1) (B + B + G), the permutes beside the products. O(seq / K) memory.
    - ``"gather"``: as many bytes, in pieces of which the next is gathered beside the products.
      O(seq / K) memory as well, where a device's chunk has 4K blocks or more.
    - ``"ulysses"``: (K − 1) / K (4 Q + 3 B' + S): all-to-alls of queries, keys, values and outputs
      and of their gradients, keys and values in pieces and in each pass anew, B' being B with key
      heads repeated to a multiple of K and S a float32 for each query and head. O(seq / K) memory.

    Args:
      query: [batch, heads, seq, head_dim].
      key, value: [batch, kv_heads, seq, head_dim].
      form: ``"ring"``, ``"ulysses"`` or ``"gather"``.
      causal: a query sees its own position and earlier ones.
      order: ``"zigzag"`` where positions are in that order (``zigzag``), which gives all devices
        equal causal work in ``"ring"`` and ``"gather"``.
      block: scores are computed for at most ``block`` × ``block`` positions at a time.

    Returns:
      Like ``query``.

    Raises:
      ValueError: before tracing: shapes that do not fit each other, a sequence that K (2K in
        zig-zag order) does not divide, heads that K does not divide (``"ulysses"``), lengths
        without a fitting block, an unknown form or order, a sequence whose axis is mapped over
        already, or no rules in force.
    """
    _check_arrays(query, key, value)
    here = region("divided_attention")
    if here is None:
        own = _form(form, (), 1, causal, order, block)
        return _attend(own, None, query, key, value, P(), P())
    spec, key_spec, axis = _specs(here, query, key, order)
    chosen = _form(form, axis, here.num_parts(axis or None), causal, order, block)
    chosen.check(query.shape[1] // here.num_parts(spec[1]), query.shape[2] // chosen.axis_size)
    return _attend(chosen, here, query, key, value, spec, key_spec)


def attention_axis_size() -> int:
    """Into how many parts the current rules divide a sequence, as ``divided_attention`` sees it."""
    here = region("attention_axis_size")
    return 1 if here is None else here.num_parts(here.spec("attention_axis_size", _SEQ)[0])


def _attend(
    form: Form,
    here: Region | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: P,
    key_spec: P,
) -> jax.Array:
    def run(f: Any, in_specs: Any, out_specs: Any) -> Any:
        return f if here is None else here.run(f, in_specs, out_specs)

    selection = _Selection.of(here, key.shape[1], spec, key_spec)
    kept_specs = form.kept_specs(spec) if here is not None else None

    @jax.custom_vjp
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return forward(query, key, value)[0]

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Kept]:
        def on_device(query: jax.Array, key: jax.Array, value: jax.Array) -> Kept:
            return form.forward(query, selection.take(key), selection.take(value))

        kept = _named(run(on_device, (spec, key_spec, key_spec), kept_specs)(query, key, value))
        return kept.output, kept

    def backward(kept: Kept, gradient: jax.Array) -> Any:
        def on_device(kept: Kept, gradient: jax.Array) -> Any:
            of_query, *of_pair = form.backward(*_apart(kept, gradient))
            return of_query, *(selection.put(x) for x in of_pair)

        return run(on_device, (kept_specs, spec), (spec, key_spec, key_spec))(kept, gradient)

    attend.defvjp(forward, backward)
    return attend(query, key, value)


@dataclass(frozen=True)
class _Selection:
    """Which of the key heads that a device has its query heads use, and how often each.

    Where an axis of ``parts`` devices divides the query heads alone, each key head counts
    ``copies`` times, so that the devices' shares of ``share`` are equal.
    """

    kv_heads: int
    share: int
    copies: int
    axes: tuple[str, ...]

    @classmethod
    def of(cls, here: Region | None, kv_heads: int, spec: P, key_spec: P) -> Any:
        """For key heads laid out by ``key_spec`` beside query heads laid out by ``spec``."""
        axes: tuple[str, ...] = ()
        parts = 1
        if here is not None:
            if spec[1] == key_spec[1]:
                kv_heads //= here.num_parts(spec[1])
            else:
                axes, parts = axes_of(spec[1]), here.num_parts(spec[1])
        share = math.lcm(kv_heads, parts) // parts
        return cls(kv_heads, share, share * parts // kv_heads, axes)

    def take(self, x: jax.Array) -> jax.Array:
        """[batch, kv_heads, ...] → [batch, share, ...]."""
        return x.take(self._numbers(), axis=1) if self.axes else x

    def put(self, x: jax.Array) -> jax.Array:
        """The gradient of ``take``, summed over the axes that had the same heads."""
        if not self.axes:
            return x
        whole = jnp.zeros((x.shape[0], self.kv_heads, *x.shape[2:]), jnp.float32)
        whole = whole.at[:, self._numbers()].add(x.astype(jnp.float32))
        return jax.lax.psum(whole, self.axes).astype(x.dtype)

    def _numbers(self) -> jax.Array:
        first = jax.lax.axis_index(self.axes) * self.share
        return (first + jnp.arange(self.share)) // self.copies


def _specs(
    here: Region, query: jax.Array, key: jax.Array, order: Order
) -> tuple[P, P, tuple[str, ...]]:
    """Specs of queries and of keys, and the axes of the sequence."""
    where = "divided_attention"
    spec = here.spec(where, "batch", "heads", _SEQ, None)
    key_spec = here.spec(where, "batch", "kv_heads", _SEQ, None)
    axis = axes_of(spec[2])
    whole = axes_of(here.rules.spec((_SEQ,), here.mesh.axis_names)[0])
    if held := [a for a in whole if a in here.mapped and here.mesh.shape[a] > 1]:
        raise ValueError(
            f"{where}: seq is divided over {held}, which a surrounding shard_map or vmap maps: "
            "no device would see beyond its own positions; call attention_on_shards there"
        )
    try:
        check_divides(query.shape[2], here.num_parts(spec[2]), order)
    except ValueError as error:
        raise ValueError(f"{where} over mesh axis {axis}: {error}") from None
    spec = here.fit(f"{where}: query", query.shape, spec)
    key_spec = here.fit(f"{where}: key", key.shape, key_spec)
    if key_spec[1] not in (spec[1], None):
        raise ValueError(
            f"{where}: heads are divided over {spec[1]!r} and kv_heads over {key_spec[1]!r}; map "
            "kv_heads to the same axes, or to None"
        )
    return spec, key_spec, axis


def _form(name: str, axis: Any, size: int, causal: bool, order: Order, block: int) -> Form:
    if name not in FORMS:
        raise ValueError(f"form must be one of {get_args(FormName)}, got {name!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    axis = entry_of(axes_of(axis)) or ()
    return FORMS[name](axis, size, causal, order, block)


def _check_arrays(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    fits = query.ndim == key.ndim == 4 and key.shape == value.shape
    fits = fits and query.shape[::2] == key.shape[::2] and query.shape[3] == key.shape[3]
    if not fits or query.shape[1] % key.shape[1]:
        raise ValueError(
            "expected queries [batch, heads, seq, head_dim] and keys and values [batch, kv_heads, "
            f"seq, head_dim] with kv_heads a divisor of heads; got {query.shape}, {key.shape} and "
            f"{value.shape}"
        )
    if not query.dtype == key.dtype == value.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(
            f"expected queries, keys and values of one float dtype, got {query.dtype}, {key.dtype} "
            f"and {value.dtype}"
        )


def _named(kept: Kept) -> Kept:
    return kept._replace(
        output=checkpoint_name(kept.output, KEPT), log_sum=checkpoint_name(kept.log_sum, KEPT)
    )


def _apart(kept: Kept, gradient: jax.Array) -> tuple[Kept, jax.Array]:
    """Keeps the compiler from taking keys that the forward pass received for those of the backward
    pass: they would stay on the device in between."""
    return jax.lax.optimization_barrier((kept, gradient))
