"""Classifier-free guidance of a flow: the score rule of STARFlow and the linear rule of TARFlow."""

import jax.numpy as jnp

from jaxeff.models.starflow.block import TokenMap
from jaxeff.typing import Array

__all__ = ["GUIDANCE_KINDS", "guide", "linear_guidance", "score_guidance"]

GUIDANCE_KINDS = ("score", "linear")


def score_guidance(
    mu_c: Array, sigma_c: Array, mu_u: Array, sigma_u: Array, weight: Array | float
) -> tuple[Array, Array]:
    """Mean and scale of the Gaussian whose score is ``(1 + w)·∇log p_c − w·∇log p_u``.

    ``s = min((σ_c/σ_u)², 1)``, ``D = 1 + w − w·s``, ``σ̃ = σ_c/√D``,
    ``μ̃ = ((1 + w)·μ_c − w·s·μ_u)/D``. The clip keeps ``D ≥ 1`` and so ``σ̃ ≤ σ_c``. Equal scales
    give ``μ_c + w(μ_c − μ_u)`` and an unchanged σ.

    Args:
      mu_c: conditional means, any shape.
      sigma_c: conditional scales, above 0.
      mu_u: unconditional means.
      sigma_u: unconditional scales, above 0.
      weight: ``w ≥ 0``; 0 is plain conditional sampling.

    Returns:
      ``(μ̃, σ̃)``.

    >>> mu, sigma = score_guidance(1.0, 0.8, -0.5, 1.0, 2.0)
    >>> round(float(mu), 5), round(float(sigma), 5)
    (2.11628, 0.60999)

    References: STARFlow (arXiv 2506.06276) §3.4, Proposition 2.
    """
    ratio = jnp.square(jnp.minimum(sigma_c / sigma_u, 1.0))
    denominator = 1 + weight - weight * ratio
    mu = ((1 + weight) * mu_c - weight * ratio * mu_u) / denominator
    return mu, sigma_c / jnp.sqrt(denominator)


def linear_guidance(conditional: TokenMap, unconditional: TokenMap, weight, what: str = "ab"):
    """Extrapolate log σ (``"a"``), μ (``"b"``) or both: ``v ← v_c + w(v_c − v_u)``.

    Args:
      conditional: maps given the condition.
      unconditional: maps without it, same shapes.
      weight: ``w ≥ 0``, broadcastable to the maps.
      what: which of the two to guide: ``"a"``, ``"b"`` or ``"ab"``.

    Returns:
      the guided `TokenMap`.

    >>> one, two = TokenMap(jnp.ones(1), jnp.zeros(1)), TokenMap(jnp.zeros(1), jnp.ones(1))
    >>> [part.tolist() for part in linear_guidance(one, two, 2.0, "b")]
    [[3.0], [0.0]]

    References: TARFlow (arXiv 2412.06329) §3.5 and its code, which extrapolates in log scale.
    """
    if what not in ("a", "b", "ab"):
        raise ValueError(f"what must be 'a', 'b' or 'ab', got {what!r}")
    mu, log_sigma = conditional
    if "a" in what:
        log_sigma = log_sigma + weight * (log_sigma - unconditional.log_sigma)
    if "b" in what:
        mu = mu + weight * (mu - unconditional.mu)
    return TokenMap(mu, log_sigma)


def guide(maps: TokenMap, weight, kind: str, what: str = "ab") -> TokenMap:
    """Guide maps whose batch is ``[conditional ; unconditional]``; the result has half the rows."""
    (mu_c, mu_u), (log_c, log_u) = (jnp.split(part, 2) for part in maps)
    if kind == "linear":
        return linear_guidance(TokenMap(mu_c, log_c), TokenMap(mu_u, log_u), weight, what)
    if kind != "score":
        raise ValueError(f"guidance_kind must be one of {GUIDANCE_KINDS}, got {kind!r}")
    mu, sigma = score_guidance(mu_c, jnp.exp(log_c), mu_u, jnp.exp(log_u), weight)
    return TokenMap(mu, jnp.log(sigma))
