# SPDX-License-Identifier: Apache-2.0
"""Lets a kernel, which the compiler cannot look into, run split over batch and heads.

XLA splits its own operations as the sharding of their inputs says, but would gather every input of
a custom call on every device. `partitioned` tells it that each batch entry and each key/value head
with its query heads is on its own.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.masks import BlockMask
from pallas_kernels.ops.attention.spec import AttentionSpec

Forward = Callable[..., tuple[jax.Array, jax.Array]]


def partitioned(forward: Forward, dimensions: Callable | None = None) -> Forward:
    """Makes an attention forward run on each device's own batch entries and heads.

    Under `jit` with inputs sharded over batch or heads, `forward` is called once per device with
    the local arrays and a spec with the local sizes, without communication. Inputs split over
    tokens or head_dim are gathered along these axes first. With more devices than key/value heads
    K, name two mesh axes: the first of size K splits both, the second the query heads of each. A
    mesh axis that would give a device parts of several key/value heads is gathered. Inside
    `jax.shard_map` `forward` is called as it is. `vmap` folds the new axis into the batch. Not
    differentiable: call it inside a `custom_vjp`.

    Args:
      forward: ``(query, key, value, bias, sinks, mask, spec) -> (out, lse)`` as the
        implementations have it; looks at nothing but its arguments.
      dimensions: for a forward with other arguments between the query, which comes first, and the
        spec, which comes last: a function of the tuple of arguments without the spec that names
        the axes of every leaf, as `_dimensions` does.

    Returns:
      A callable with the signature and meaning of `forward`.

    >>> from pallas_kernels.masks import Mask
    >>> from pallas_kernels.ops.attention import reference
    >>> spec = AttentionSpec(1, 2, 2, 1, 1, 4, "float32", 0.5)
    >>> x = jnp.ones((1, 2, 1, 4))
    >>> partitioned(reference.attention)(x, x, x, None, None, Mask(), spec)[0].shape
    (1, 2, 1, 4)
    """

    @functools.wraps(forward)
    def call(*arguments):
        *tree, spec = arguments
        leaves, treedef = jax.tree.flatten(tuple(tree))
        names = tuple((dimensions or _dimensions)(tuple(tree)))
        return _call(forward, spec, treedef, names)(*leaves)

    return call


def partitioned_gradient(
    gradient: Callable, spec: AttentionSpec, blocks: BlockMask | None = None
) -> Callable:
    """`partitioned` for a gradient: every device computes its batch entries and key/value heads.

    The query heads of a key/value head stay together, since they add to one dK and dV.

    Args:
      gradient: ``(query, key, value, d_out, *sums, blocks=blocks) -> (d_query, d_key, d_value)``
        with sums [B, N, T]; closes over no arrays.
      spec: static facts.
      blocks: lists of tiles, or None.

    Returns:
      A callable ``(query, key, value, d_out, *sums) -> (d_query, d_key, d_value)``.
    """
    leaves, treedef = jax.tree.flatten(blocks)
    lists = [_broadcast(("b", "n", ".", ".")[: jnp.ndim(x)], x) for x in leaves]
    results = ("btnh", "bskh", "bskh")

    def run(*arrays):
        dense, tiles = arrays[: len(arrays) - len(leaves)], arrays[len(arrays) - len(leaves) :]
        return tuple(gradient(*dense, blocks=jax.tree.unflatten(treedef, tiles)))

    def shardings(mesh, arguments, dims):
        split = _split(mesh, arguments[0], spec)
        split = dataclasses.replace(split, heads=split.kv_heads)
        return tuple(NamedSharding(mesh, split.spec_of(each)) for each in dims)

    @custom_vmap
    def call(*arrays):
        # Inside shard_map the arrays are local already, and nothing is left to split.
        if jax.sharding.get_abstract_mesh().manual_axes:
            return run(*arrays)
        names = (*results, "btnh", *["bnt"] * (len(arrays) - 4 - len(leaves)), *lists)
        rule, sizes, whole = _rule(names, spec, results=results, splits="bk")

        def partition(mesh, arguments, _):
            outs = shardings(mesh, arguments, results)
            return mesh, run, outs, shardings(mesh, arguments, names)

        split_call = custom_partitioning(run)
        split_call.def_partition(
            partition,
            infer_sharding_from_operands=lambda mesh, arguments, _: shardings(
                mesh, arguments, results
            ),
            sharding_rule=rule, need_replication_factors=whole, **sizes,
        )  # fmt: skip
        return split_call(*arrays)

    @call.def_vmap
    def _fold(size, in_batched, *arrays):
        wide = dataclasses.replace(spec, batch=size * spec.batch)

        def fold(x, has, is_list):
            if is_list and x.shape[has] == 1 != spec.batch:
                x = jnp.broadcast_to(x, (*x.shape[:has], spec.batch, *x.shape[1 + has :]))
            x = x if has else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        is_list = [i >= len(arrays) - len(leaves) for i in range(len(arrays))]
        folded = list(map(fold, arrays, in_batched, is_list))
        dense, tiles = folded[: len(arrays) - len(leaves)], folded[len(arrays) - len(leaves) :]
        tiles = jax.tree.unflatten(treedef, tiles)
        grads = partitioned_gradient(gradient, wide, tiles)(*dense)
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in grads), (True,) * 3

    return lambda *arrays: call(*arrays, *leaves)


# -- what the axes of each array are ---------------------------------------------------------------


def _dimensions(tree) -> list[tuple[str, ...]]:
    """Names of the axes of every leaf of (query, key, value, bias, sinks, mask).

    "b" batch, "n" query heads, "k" key/value heads, "t", "s" and "h" tokens and head_dim; "." is
    an axis that stays whole. Axes of size 1 that broadcast are "." too.
    """
    *_, bias, sinks, mask = tree
    out = [("b", "t", "n", "h"), ("b", "s", "k", "h"), ("b", "s", "k", "h")]
    if bias is not None:
        out.append(_broadcast(("b", "n", "t", "s"), bias))
    if sinks is not None:
        out.append(("n",))
    for path, leaf in jax.tree_util.tree_flatten_with_path(mask)[0]:
        field = path[-1].name.partition("[")[0]
        if field in ("arrays", "tiles", "kv_num_blocks", "kv_indices", "kv_full"):
            out.append(_broadcast(("b", "n", ".", ".")[: jnp.ndim(leaf)], leaf))
        else:  # segments [B, L], lengths and bounds [B] or []
            out.append(_broadcast(("b", ".")[: jnp.ndim(leaf)], leaf))
    return out


def _broadcast(names, x) -> tuple[str, ...]:
    return tuple("." if size == 1 else name for name, size in zip(names, x.shape, strict=True))


def _rule(
    names, spec: AttentionSpec, results=("btnh", "btn"), splits="bkg"
) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """Shardy's rule, sizes of the factors it cannot see, and the factors that stay whole.

    Query heads are the product of key/value heads (major) and the queries of each (minor).
    """
    fresh = (f"w{i}" for i in range(1000))
    # A product with a factor of size 1 is not allowed.
    both = spec.groups > 1 and spec.num_kv_heads > 1
    heads = "(k g)" if both else "g" if spec.groups > 1 else "k"

    def axis(name):
        return next(fresh) if name == "." else heads if name == "n" else name

    operand = lambda dims: " ".join(axis(name) for name in dims)  # noqa: E731
    operands = ", ".join(operand(dims) for dims in names)
    rule = f"{operands} -> {', '.join(map(operand, results))}"
    # Shardy wants them in the order in which they appear.
    factors = dict.fromkeys(re.findall(r"\w+", rule))
    whole = tuple(name for name in factors if name not in splits)
    return rule, ({"g": spec.groups} if both else {}), whole


# -- how they are split ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Split:
    """Mesh axes over which batch, key/value heads and query heads are split."""

    batch: tuple[str, ...]
    kv_heads: tuple[str, ...]
    heads: tuple[str, ...]

    def spec_of(self, names) -> PartitionSpec:
        axes = {"b": self.batch, "k": self.kv_heads, "n": self.heads}
        return PartitionSpec(*(axes.get(name) or None for name in names))


def _split(mesh, query, spec: AttentionSpec) -> _Split:
    """The split that the query's sharding asks for, as far as heads allow it."""
    axes = (*query.sharding.spec, None, None, None)
    batch, heads = _names(axes[0]), _names(axes[2])
    kv_heads, shards = [], 1
    for i, name in enumerate(heads):
        size = mesh.shape[name]
        if spec.num_kv_heads % (shards * size) == 0:
            kv_heads.append(name)
            shards *= size
        elif shards == spec.num_kv_heads:
            # One key/value head per device: the rest splits its queries.
            return _Split(batch, tuple(kv_heads), heads)
        else:
            # A device would hold a part of one head's queries and a part of another's.
            return _Split(batch, tuple(heads[:i]), tuple(heads[:i]))
    return _Split(batch, tuple(kv_heads), heads)


def _names(entry) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _local(spec: AttentionSpec, split: _Split, mesh) -> AttentionSpec:
    """The spec with the sizes of one device."""

    def shards(axes):
        count = 1
        for name in axes:
            count *= mesh.shape[name]
        return count

    return dataclasses.replace(
        spec,
        batch=spec.batch // shards(split.batch),
        num_heads=spec.num_heads // shards(split.heads),
        num_kv_heads=spec.num_kv_heads // shards(split.kv_heads),
    )


@functools.lru_cache(maxsize=512)
def _call(forward: Forward, spec: AttentionSpec, treedef: Any, names: tuple):
    """The partitioned call for one set of static facts, over flat arrays."""

    def run(*leaves, local=spec):
        return forward(*jax.tree.unflatten(treedef, leaves[: len(names)]), local)

    splittable = functools.lru_cache(functools.partial(_splittable, run, spec, names))

    def plain(*leaves):
        # Inside shard_map the arrays are local already, and nothing is left to split.
        if jax.sharding.get_abstract_mesh().manual_axes:
            return run(*leaves)
        types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
        call, constants = splittable(types)
        return call(*leaves, *constants)

    batched = custom_vmap(plain)

    @batched.def_vmap
    def _fold(size, in_batched, *leaves):
        return _folded(forward, spec, treedef, names, size, in_batched, leaves), (True, True)

    return batched


def _splittable(run, spec: AttentionSpec, names, types):
    """``run`` for XLA to split, and the arrays it closes over, which become operands.

    A device's own call makes its own constants from the local sizes and drops these.
    """
    closed = jax.make_jaxpr(run)(*types)
    names = (*names, *((".",) * jnp.ndim(x) for x in closed.consts))

    def whole(*operands):
        leaves, constants = operands[: len(types)], operands[len(types) :]
        return tuple(jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))(*leaves))

    def partition(mesh, arguments, results):
        split = _split(mesh, arguments[0], spec)
        local = _local(spec, split, mesh)
        sharding = lambda dims: NamedSharding(mesh, split.spec_of(dims))  # noqa: E731
        out = (sharding("btnh"), sharding("btn"))
        return mesh, functools.partial(run, local=local), out, tuple(map(sharding, names))

    def infer(mesh, arguments, results):
        split = _split(mesh, arguments[0], spec)
        return tuple(NamedSharding(mesh, split.spec_of(dims)) for dims in ("btnh", "btn"))

    rule, sizes, fixed = _rule(names, spec)
    call = custom_partitioning(whole)
    call.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        need_replication_factors=fixed,
        **sizes,
    )
    return call, closed.consts


def _folded(forward, spec, treedef, names, size, in_batched, leaves):
    """The call with a new leading axis made part of the batch."""

    def fold(x, has_axis, dims):
        if dims == ("n",) and has_axis:
            raise NotImplementedError("vmap over sinks is not served; use jax.lax.map")
        if not has_axis:
            if dims[:1] not in (("b",), (".",)) or x.shape[:1] == (1,):
                return x
            x = jnp.broadcast_to(x, (size, *x.shape))
        if not dims:  # a bound for the whole call becomes one per batch entry
            return jnp.repeat(x, spec.batch)
        if dims[0] != "b":
            x = jnp.broadcast_to(x, (size, spec.batch, *x.shape[2:]))
        return x.reshape(size * spec.batch, *x.shape[2:])

    folded = [fold(*item) for item in zip(leaves, in_batched, names, strict=True)]
    wide = dataclasses.replace(spec, batch=size * spec.batch)
    out, lse = _call(forward, wide, treedef, names)(*folded)
    return tuple(x.reshape(size, spec.batch, *x.shape[1:]) for x in (out, lse))
