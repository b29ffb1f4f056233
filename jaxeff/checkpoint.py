"""Save and restore any pytree of arrays with orbax: models, caches, QTensors, optimiser states."""

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxeff.models import Decoder

# The array store has no names for these; their bytes are kept and the dtype noted in the metadata.
_STORED_AS_BYTES = ("uint4", "int2", "uint2", "float6_e2m3fn", "float6_e3m2fn")
_HOST_TYPES = (bool, int, float, np.ndarray, np.generic)
_FORMAT = 1


def save(
    path: str | Path, tree: Any, metadata: dict[str, Any] | None = None, *, overwrite: bool = False
) -> None:
    """Writes a pytree of arrays and a JSON dictionary to a directory, all or nothing.

    Leaves are stored under their path in the tree with shape, dtype and a CRC-32, so that
    ``restore`` can name a leaf that does not fit and notices changed bytes. Typed PRNG keys are
    stored as their data.

    Args:
      path: directory to create.
      tree: any pytree of arrays and Python numbers; QTensor and KVCache nodes are fine.
      metadata: dictionary that ``json`` can write, or None.
      overwrite: whether an existing checkpoint is replaced.

    Raises:
      ValueError: if the path exists and ``overwrite`` is false, a leaf is not an array, or
        ``metadata`` is not JSON.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/c", {"w": jnp.arange(3.)}, {"step": 5})
      ...     load_metadata(f"{folder}/c"), restore(f"{folder}/c", {"w": jnp.zeros(3)})["w"].sum()
      ({'step': 5}, Array(3., dtype=float32))
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise ValueError(f"path {path} exists; pass overwrite=True to replace it")
    try:
        # Written and read back, so that tuples show up as the lists they will become.
        metadata = json.loads(json.dumps({} if metadata is None else metadata))
    except TypeError as error:
        raise ValueError(f"metadata must be JSON: {error}") from error
    arrays, facts = {}, {}
    for index, (name, leaf) in enumerate(_named_leaves(tree).items()):
        key = f"leaf_{index:05d}"
        arrays[key], facts[name] = _storable(name, leaf)
        facts[name]["key"] = key
    content = {"format": _FORMAT, "leaves": facts, "user": metadata}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        parts = {"facts": ocp.args.JsonSave(content)}
        if arrays:
            parts["arrays"] = ocp.args.StandardSave(arrays)
        checkpointer.save(path, ocp.args.Composite(**parts), force=overwrite)


def restore(path: str | Path, like: Any) -> Any:
    """Reads a pytree that ``save`` wrote, into the structure of another one.

    Args:
      path: directory written by ``save``.
      like: pytree of arrays or ``jax.ShapeDtypeStruct`` with the expected structure, shapes and
        dtypes. Leaves with a sharding are restored to it, shard by shard.

    Returns:
      A tree of the structure of ``like`` with the stored values.

    Raises:
      ValueError: if the path holds no checkpoint, a leaf is missing, left over, or has another
        shape or dtype (all of them named), or the content is truncated or corrupt.
    """
    path = Path(path).absolute()
    facts = _read_facts(path)["leaves"]
    wanted = _named_leaves(like)
    _check_leaves(path, facts, wanted)
    stored = _read_arrays(path, facts, wanted)
    leaves = [
        _as_expected(path, name, stored[facts[name]["key"]], facts[name], expected)
        for name, expected in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Reads the dictionary given to ``save``; tuples have become lists.

    Args:
      path: directory written by ``save``.

    Returns:
      The dictionary, empty if none was given.

    Raises:
      ValueError: if the path holds no readable checkpoint.
    """
    return _read_facts(Path(path).absolute())["user"]


def save_model(
    path: str | Path,
    model: "Decoder",
    *,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a decoder's parameters and its configuration.

    Parameters only: a training recipe set by ``apply_recipe`` and its random state are not stored.
    An adapted or packed model is written by ``save(path, nnx.state(model))``.

    Args:
      path: directory to create.
      model: the decoder; ``model.config`` is its ModelConfig.
      metadata: further JSON entries, or None.
      overwrite: whether an existing checkpoint is replaced.

    Raises:
      ValueError: as ``save``, or if the model has no ``config`` or not the parameters that it says.
    """
    from flax import nnx

    if not hasattr(model, "config"):
        raise ValueError(f"model {type(model).__name__} has no config; use save on its nnx.state")
    content = {"model_config": model.config.to_dict(), "user": metadata or {}}
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    plain = nnx.to_pure_dict(nnx.state(_abstract_decoder(model.config), nnx.Param))
    if differ := sorted(set(_named_leaves(plain)) ^ set(_named_leaves(params))):
        raise ValueError(
            f"model has other parameters than its configuration, such as {differ[0]}: merge an "
            "adapted model first, or write it by save(path, nnx.state(model))"
        )
    save(path, params, content, overwrite=overwrite)


def load_model(path: str | Path, *, dtype: Any = jnp.float32) -> "tuple[Decoder, dict[str, Any]]":
    """Builds the decoder that ``save_model`` wrote.

    Args:
      path: directory written by ``save_model``.
      dtype: dtype of the activations; parameters keep the stored dtype.

    Returns:
      The decoder, and the metadata given to ``save_model``.

    Raises:
      ValueError: as ``restore``, or if the checkpoint holds no model.
    """
    from flax import nnx

    from jaxeff.models import Decoder, ModelConfig

    content = load_metadata(path)
    if "model_config" not in content:
        raise ValueError(f"{path} holds no model configuration: it was not written by save_model")
    config = ModelConfig.from_dict(content["model_config"])
    model = _abstract_decoder(config, dtype)
    graph, abstract, rest = nnx.split(model, nnx.Param, ...)
    if jax.tree.leaves(rest):
        model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype)
        rest = nnx.state(model, nnx.Not(nnx.Param))
    shapes = nnx.to_pure_dict(abstract)
    facts = _read_facts(Path(path).absolute())["leaves"]
    shapes = _with_stored_dtypes(shapes, facts)
    nnx.replace_by_pure_dict(abstract, restore(path, shapes))
    return nnx.merge(graph, abstract, rest), content["user"]


def _abstract_decoder(config: Any, dtype: Any = jnp.float32) -> "Decoder":
    from flax import nnx

    from jaxeff.models import Decoder

    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))


# --- leaves -------------------------------------------------------------------------------------


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path) or "root": leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _storable(name: str, leaf: Any) -> tuple[Any, dict[str, Any]]:
    """The array that is written for a leaf, and what the metadata says about it."""
    kind = "array"
    if _is_key(leaf):
        kind, leaf = f"key:{jax.random.key_impl(leaf)}", jax.random.key_data(leaf)
    elif isinstance(leaf, (bool, int, float)):
        leaf = np.asarray(leaf)
    elif not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        raise ValueError(f"leaf {name} must be an array or a number, got {type(leaf).__name__}")
    facts = {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "kind": kind}
    if str(leaf.dtype) in _STORED_AS_BYTES:
        leaf = np.asarray(leaf).view(np.uint8)
    if getattr(leaf, "is_fully_addressable", True):
        facts["crc32"] = _crc32(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), facts


def _crc32(array: Any) -> int:
    # One byte per element also for 4-bit dtypes, as numpy holds them.
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _facts_of(leaf: Any) -> tuple[list[int], str]:
    """Shape and dtype that a leaf of ``like`` expects on disk."""
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return list(leaf.shape), str(leaf.dtype)


def _check_leaves(path: Path, facts: dict[str, Any], wanted: dict[str, Any]) -> None:
    problems = [f"{name} is not in the checkpoint" for name in wanted if name not in facts]
    problems += [f"{name} is only in the checkpoint" for name in facts if name not in wanted]
    for name in (name for name in wanted if name in facts):
        shape, dtype = _facts_of(wanted[name])
        stored = facts[name]
        if (stored["shape"], stored["dtype"]) != (shape, dtype):
            problems.append(
                f"{name} is {stored['dtype']} {stored['shape']} in the checkpoint, "
                f"expected {dtype} {shape}"
            )
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"checkpoint {path} does not fit: {'; '.join(problems[:8])}{more}")


def _as_expected(path: Path, name: str, array: Any, facts: dict[str, Any], expected: Any) -> Any:
    if "crc32" in facts and getattr(array, "is_fully_addressable", True):
        found = _crc32(array)
        if found != facts["crc32"]:
            raise ValueError(
                f"checkpoint {path} is corrupt: leaf {name} has CRC-32 {found:08x}, "
                f"expected {facts['crc32']:08x}"
            )
    if facts["dtype"] in _STORED_AS_BYTES:
        array = jnp.asarray(np.asarray(array).view(facts["dtype"]))
        sharding = getattr(expected, "sharding", None)
        array = array if sharding is None else jax.device_put(array, sharding)
    if facts["kind"].startswith("key:"):
        array = jax.random.wrap_key_data(array, impl=facts["kind"].removeprefix("key:"))
    return type(expected)(array) if isinstance(expected, (bool, int, float)) else array


def _with_stored_dtypes(shapes: Any, facts: dict[str, Any]) -> Any:
    """Abstract leaves with the dtype on disk, so that a model is restored as it was stored."""

    def adapt(path, leaf):
        stored = facts.get(jax.tree_util.keystr(path))
        return leaf if stored is None else jax.ShapeDtypeStruct(leaf.shape, stored["dtype"])

    return jax.tree_util.tree_map_with_path(adapt, shapes)


# --- files --------------------------------------------------------------------------------------


def _read_facts(path: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    if not path.is_dir():
        raise ValueError(f"path {path} is not a checkpoint directory")
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            content = checkpointer.restore(
                path, ocp.args.Composite(facts=ocp.args.JsonRestore())
            ).facts
    except Exception as error:  # orbax has no common base class for what broken files raise
        raise ValueError(f"checkpoint {path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict) or not {"format", "leaves", "user"} <= content.keys():
        raise ValueError(f"checkpoint {path} was not written by jaxeff.checkpoint.save")
    if content["format"] != _FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {content['format']}; this version reads {_FORMAT}"
        )
    return content


def _read_arrays(path: Path, facts: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    if not wanted:
        return {}
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {}
    for name, expected in wanted.items():
        if isinstance(expected, _HOST_TYPES):  # stays on the host, with its 64 bits
            abstract[facts[name]["key"]] = np.empty(facts[name]["shape"], facts[name]["dtype"])
            continue
        bare = facts[name]["dtype"] in _STORED_AS_BYTES or _is_key(expected)
        sharding = None if bare else getattr(expected, "sharding", None)
        abstract[facts[name]["key"]] = jax.ShapeDtypeStruct(
            facts[name]["shape"],
            "uint8" if facts[name]["dtype"] in _STORED_AS_BYTES else facts[name]["dtype"],
            sharding=default if sharding is None else sharding,
        )
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(
                path, ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
            ).arrays
    except Exception as error:  # orbax has no common base class for what broken files raise
        raise ValueError(
            f"checkpoint {path} is truncated or corrupt: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
