"""What a training step minimises: the next token's loss, and the routers' own."""

from typing import Any

import jax

from jdml.models.experts.routing import Balance
from jdml.models.loss import loss_of_hidden
from jdml.models.transformer.config import TransformerConfig
from jdml.models.transformer.decoder import Transformer


def training_loss(
    model: Transformer,
    inputs: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    chunk_size: int | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """``next_token_loss`` plus the losses that keep a mixture of experts balanced.

    ``loss = next_token + balance_weight · load_balance + importance_weight · importance +
    z_weight · router_z``, with the weights of ``model.config``; the three are means over layers, of
    all tokens in ``inputs``, padding included, wherever a mesh has them. So a loss of one worker's
    samples balances that worker's choices. Without experts it is ``next_token_loss`` alone.

    Args:
      model: the decoder.
      inputs, targets, mask, key, chunk_size: as ``next_token_loss`` takes them.

    Returns:
      The loss, and metrics for ``make_step``: ``next_token_loss``, and the fields of
      ``jdml.models.experts.Balance`` under ``experts.``; without experts ``{}``.

    Raises:
      ValueError: as ``next_token_loss``.
    """
    hidden, balance = model.hidden_and_balance(inputs, key=key)
    loss = loss_of_hidden(model, hidden, targets, mask, chunk_size=chunk_size)
    if balance is None:
        return loss, {}
    return with_balance(model.config, loss, balance)


def with_balance(
    config: TransformerConfig, loss: jax.Array, balance: Balance
) -> tuple[jax.Array, dict[str, Any]]:
    """The next token's loss with the routers', and the metrics of ``training_loss``."""
    total = (
        loss
        + config.balance_weight * balance.load_balance
        + config.importance_weight * balance.importance
        + config.z_weight * balance.router_z
    )
    metrics = {f"experts.{name}": value for name, value in balance._asdict().items()}
    return total, {"next_token_loss": loss, **metrics}
