"""The loss of a frozen output head, a few tokens at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxeff.finetune.layers import Frozen
from jaxeff.models import Decoder
from jaxeff.train import next_token_loss

CHUNK = 1024


def loss_of(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token.

    A ``Decoder`` whose output head is frozen never has the logits of all tokens in memory; see
    ``head_loss``. Other models are called.

    Args:
      model: maps tokens ``[B, T]`` to logits ``[B, T, V]``.
      tokens: integers ``[B, T + 1]``.

    Returns:
      float32 scalar, nats per token.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    kernel = _frozen_head(model)
    if kernel is None:
        return next_token_loss(model(inputs), targets)
    # The logits of this call are not used, so nothing computes them.
    _, hidden = model(inputs, return_hidden=True)
    x = model.final_norm(hidden[-1])
    return head_loss(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype), targets.reshape(-1))


def _frozen_head(model: nnx.Module) -> jax.Array | None:
    """The kernel ``[D, V]`` if the logits are its product with the last norm and nothing else."""
    if not isinstance(model, Decoder) or model.config.final_logit_soft_cap is not None:
        return None
    if model.lm_head is None:
        return model.embed.embedding.get_value().T
    plain = isinstance(model.lm_head, nnx.Linear) and isinstance(model.lm_head.kernel, Frozen)
    return model.lm_head.kernel.get_value() if plain else None


@jax.custom_vjp
def head_loss(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    r"""Mean of ``-log softmax(x W)[target]``, with a gradient for ``x`` alone.

    The gradient is computed beside the loss, while the logits of a chunk of tokens are there:
    no more than 1024 rows of logits exist at a time, and none is computed twice. They are float32;
    their gradient is rounded to the dtype of ``x`` for the product with the kernel.

    Args:
      x: floating ``[N, D]``.
      kernel: ``[D, V]`` in the dtype of ``x``; constant.
      targets: integers ``[N]`` in ``[0, V)``.

    Returns:
      float32 scalar, nats per token.

    Example:
      >>> x, kernel = jnp.ones((3, 2)), jnp.zeros((2, 4))
      >>> float(head_loss(x, kernel, jnp.array([0, 1, 2]))).__round__(4)
      1.3863

    References: Hsu et al., Liger Kernel (arXiv:2410.10989), section 3.2: loss and gradient of a
    chunk in one pass.
    """
    return _loss_and_gradient(x, kernel, targets)[0]


def _forward(x, kernel, targets):
    return _loss_and_gradient(x, kernel, targets)


def _backward(dx, g):
    return (dx * g).astype(dx.dtype), None, np.zeros(dx.shape[:1], jax.dtypes.float0)


head_loss.defvjp(_forward, _backward)


def _loss_and_gradient(x, kernel, targets):
    count = x.shape[0]
    chunks = -(-count // CHUNK)
    size = -(-count // chunks)
    pad = chunks * size - count
    rows = jnp.pad(x, ((0, pad), (0, 0))).reshape(chunks, size, -1)
    # A target of -1 marks padding: it is no column, and its row gets no weight.
    goals = jnp.pad(targets, (0, pad), constant_values=-1).reshape(chunks, size)

    def one(chunk):
        x, goal = chunk
        logits = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
        hit = lax.broadcasted_iota(goal.dtype, logits.shape, 1) == goal[:, None]
        top = jnp.max(logits, 1, keepdims=True)
        total = jnp.sum(jnp.exp(logits - top), 1, keepdims=True)
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), 1, keepdims=True)
        real = goal[:, None] >= 0
        loss = jnp.sum(jnp.where(real, jnp.log(total) + top - chosen, 0.0))
        slope = jnp.where(real, jnp.exp(logits - top) / total - hit, 0.0).astype(x.dtype)
        # In the dtype of x all the way: a float32 result would make XLA widen both operands.
        dx = lax.dot_general(slope, kernel, (((1,), (1,)), ((), ())))
        return loss, (dx.astype(jnp.float32) / count).astype(x.dtype)

    losses, dx = lax.map(one, (rows, goals))
    return jnp.sum(losses) / count, dx.reshape(-1, x.shape[1])[:count]
