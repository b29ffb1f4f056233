# SPDX-License-Identifier: Apache-2.0
"""Lets kernels over a cache run on each device's own rows and heads.

XLA splits its own operations as the sharding of their inputs says, but gathers every input of a
custom call on every device. What these kernels do to a head of a row concerns no other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def by_head(function: Callable, axes: Sequence[str], results: Sequence[str]) -> Callable:
    """Makes a function of arrays run split over batch and key heads, without communication.

    Under `jit` with the first array sharded over these, ``function`` is called with each device's
    own part; inside `jax.shard_map` it is called as it is; `vmap` folds the new axis into the
    batch. Not differentiable.

    Args:
      function: of arrays, returns a tuple of arrays; looks at the shapes of its arguments only, and
        closes over no array.
      axes: per array the names of its first axes: "bk" for [B, K, ...], "b" for [B, ...].
      results: the same for the results.

    Returns:
      A callable like ``function``.

    >>> by_head(lambda x: (x + 1,), ["bk"], ["bk"])(jnp.zeros((1, 2, 3)))[0].shape
    (1, 2, 3)
    """

    @custom_vmap
    def call(*arrays):
        # Inside shard_map the arrays are local already, and nothing is left to split.
        if jax.sharding.get_abstract_mesh().manual_axes:
            return function(*arrays)
        ranks = [x.ndim for x in arrays]
        out_ranks = [x.ndim for x in jax.eval_shape(function, *arrays)]

        def shardings(mesh, arguments, names, ranks):
            first = (*arguments[0].sharding.spec, None, None)
            where = {"b": first[0], "k": first[1]}
            specs = [PartitionSpec(*(where[axis] for axis in name)) for name in names]
            return tuple(NamedSharding(mesh, spec) for spec, _ in zip(specs, ranks, strict=True))

        def partition(mesh, arguments, _):
            outs = shardings(mesh, arguments, results, out_ranks)
            return mesh, function, outs, shardings(mesh, arguments, axes, ranks)

        fresh = (f"w{i}" for i in itertools.count())

        def factors(names, ranks):
            rows = (
                [*name, *itertools.islice(fresh, rank - len(name))]
                for name, rank in zip(names, ranks, strict=True)
            )
            return ", ".join(" ".join(row) for row in rows)

        rule = f"{factors(axes, ranks)} -> {factors(results, out_ranks)}"
        whole = tuple(x for x in rule.replace(",", " ").split() if x.startswith("w"))
        split = custom_partitioning(function)
        split.def_partition(
            partition,
            infer_sharding_from_operands=lambda mesh, arguments, _: shardings(
                mesh, arguments, results, out_ranks
            ),
            sharding_rule=rule,
            need_replication_factors=whole,
        )
        return split(*arrays)

    @call.def_vmap
    def _fold(size, in_batched, *arrays):
        wide = [
            (x if batched else jnp.broadcast_to(x, (size, *x.shape)))
            for x, batched in zip(arrays, in_batched, strict=True)
        ]
        done = by_head(function, axes, results)(*(x.reshape(-1, *x.shape[2:]) for x in wide))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in done), (True,) * len(done)

    return call
