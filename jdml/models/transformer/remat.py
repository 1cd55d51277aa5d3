"""What a block's forward pass keeps for its backward pass, and in which memory.

    none          everything, on the device
    dots          products with parameters; the rest is computed again
    full          the block's input; the rest is computed again
    offload_dots  what ``dots`` keeps, in the host's memory
    offload_full  what ``full`` keeps, in the host's memory

What is offloaded leaves the device while the forward pass goes on and comes back before the
backward pass needs it: the device holds what one or two layers keep, whatever the depth. Each kept
byte crosses the link to the host once in either direction, ``num_layers · batch · seq · embed``
elements a step with ``offload_full``. On CPU both memories are one, and the numbers are those of
``dots`` and ``full``.

References: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; to the host: Rhu et
al., "vDNN", 2016.
"""

from typing import Any

import jax

from jdml.models.attention import KEPT
from jdml.models.transformer.config import DIVIDED, TransformerConfig
from jdml.sharding.region import memory_kinds

BLOCK_INPUT = "block.input"
"""Name (``checkpoint_name``) of what a block is given."""

HOST = "pinned_host"
_EXPERTS = ("experts.product", "experts.exchanged")


def remat(body: Any, config: TransformerConfig) -> Any:
    """``body`` with what ``config.remat`` says computed again in its backward pass, or offloaded.

    Raises:
      ValueError: an offload where devices do not reach pinned memory of their host.
    """
    if config.remat == "none":
        return body
    # A loop's body cannot be merged with its recomputation; written-out layers can.
    return jax.checkpoint(body, policy=_policy(config), prevent_cse=config.unroll)


def _policy(config: TransformerConfig) -> Any:
    policies = jax.checkpoint_policies
    if config.offloads and HOST not in memory_kinds():
        raise ValueError(
            f"remat={config.remat!r}: the devices have memories {sorted(memory_kinds())}, and no "
            f"{HOST!r}. Use remat={config.recomputes!r}, which keeps the same "
            "on the device."
        )
    if config.remat == "full":
        return None
    if config.remat == "offload_full":
        return _named((), (BLOCK_INPUT,))
    # Experts' products are batched, and an exchange costs more than a product; they stay on the
    # device, for they are made inside a region of the mesh. Of attention over a divided sequence,
    # nothing goes over the wire a third time.
    saved = _EXPERTS if config.num_experts is not None else ()
    kept = (KEPT,) if config.attention in DIVIDED else ()
    if config.remat == "offload_dots":
        products = policies.offload_dot_with_no_batch_dims("device", HOST)
        named = _named(saved, kept)
    else:
        products = policies.dots_with_no_batch_dims_saveable
        named = policies.save_only_these_names(*saved, *kept)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        chosen = named if primitive.name == "name" else products
        return chosen(primitive, *args, **params)

    return policy


def _named(saved: tuple[str, ...], offloaded: tuple[str, ...]) -> Any:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(saved),
        names_which_can_be_offloaded=list(offloaded),
        offload_src="device",
        offload_dst=HOST,
    )
