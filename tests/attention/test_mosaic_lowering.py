# SPDX-License-Identifier: Apache-2.0
"""The sm90 attention kernel without a GPU: it lowers for CUDA, and its schedule is sound."""

import dataclasses
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_program import spilled_bytes

from pallas_kernels import _ptx as ptx
from pallas_kernels import dot_product_attention, explain
from pallas_kernels._device import describe
from pallas_kernels._interpret import abstract_gpu
from pallas_kernels.masks import FULL, BlockMask, Mask
from pallas_kernels.ops.attention import mosaic_sm90, mosaic_sm90_plan
from pallas_kernels.ops.attention.mosaic_sm90_plan import Config, Plan, heuristic
from pallas_kernels.ops.attention.mosaic_sm90_tile import Variant
from pallas_kernels.ops.attention.sparge import sparge_attention
from pallas_kernels.ops.attention.spec import (
    QUANTS,
    AttentionQuant,
    AttentionSpec,
    unsupported_reason,
)
from pallas_kernels.ops.quantize.mosaic_sm90 import HEAD_DIMS


def _spec(b=1, t=256, s=512, n=4, k=2, h=128, dtype="bfloat16", **kwargs):
    return AttentionSpec(b, t, s, n, k, h, dtype, h**-0.5, **{"quant": QUANTS["sage2"], **kwargs})


def _lower(fn, *args):
    with abstract_gpu():
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def _arrays(spec):
    dtype = jnp.dtype(spec.dtype)
    q = jax.ShapeDtypeStruct((spec.batch, spec.q_len, spec.num_heads, spec.head_dim), dtype)
    kv = jax.ShapeDtypeStruct((spec.batch, spec.kv_len, spec.num_kv_heads, spec.head_dim), dtype)
    return q, kv, kv


def _lower_kernel(spec, mask, config=None):
    def run(q, k, v, mask):
        sinks = jnp.zeros(spec.num_heads) if spec.has_sinks else None
        return mosaic_sm90.attention(q, k, v, None, sinks, mask, spec, config)

    return _lower(run, *_arrays(spec), mask)


def _blocks(heads, t, s, block_q, block_kv, mask=None, batch=1):
    """Half of the tiles, and a row without any."""
    kept = np.random.default_rng(0).random((batch, heads, -(-t // block_q), -(-s // block_kv)))
    kept = jnp.asarray(kept < 0.5).at[:, :, 1].set(False)
    return BlockMask.from_blocks(kept, t, s, block_q=block_q, block_kv=block_kv, mask=mask)


SEGMENTS = Mask.segment_ids(jnp.zeros((1, 256), jnp.int32), jnp.zeros((1, 512), jnp.int32))
# One case for every feature; `experiments.benchmarks.gpu_session --dry-run` lowers all pairs.
CASES = [
    ({}, Mask(), None),
    ({"t": 1000, "s": 777, "has_sinks": True}, Mask.causal(), None),
    ({"h": 80, "soft_cap": 30.0}, Mask.causal(83) & Mask.window(20, 0), None),
    ({"dtype": "float16", "h": 192}, Mask.lengths(jnp.array([3]), jnp.array([5])), None),
    ({"h": 256}, Mask.causal(jnp.array([7])), None),
    ({"quant": None, "soft_cap": 30.0}, SEGMENTS, None),
    ({"quant": None, "h": 256}, Mask(), None),
    ({"quant": QUANTS["sage1"], "h": 96}, Mask.causal(), None),
    ({"quant": QUANTS["fp8"], "h": 64}, Mask(), None),
    ({}, _blocks(4, 256, 512, 128, 128), None),
    ({"quant": None, "t": 700, "s": 777}, _blocks(1, 700, 777, 256, 64, Mask.causal()), None),
    ({}, _blocks(4, 256, 512, 128, 256, SEGMENTS & Mask.window(9, 9)), None),
    ({"t": 190}, _blocks(4, 190, 512, 64, 128, Mask.causal()), None),
    ({}, Mask(), Config(block_kv=128, num_stages=4, qk_split=1, schedule="none")),
    (
        {"h": 64},
        Mask.causal(),
        Config(3, 128, registers=160, memory_registers=32, persistent=False),
    ),
]


@pytest.mark.parametrize(("shape", "mask", "config"), CASES)
def test_lowers_for_cuda(shape, mask, config):
    text = _lower_kernel(_spec(**shape), mask, config)
    assert text.count("mosaic_gpu") >= (1 if shape.get("quant", 1) is None else 4)


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas of the CUDA toolkit")
def test_inline_ptx_assembles(monkeypatch, tmp_path):
    """Every piece of inline PTX, as the body of one kernel; Mosaic would show it only on a GPU."""
    pieces, asm = {}, ptx.asm

    def record(text, outs, ins, *, tied=(), effects=False):
        letters = ["".join(ptx._letter(v.type) for v in values) for values in (tied, ins)]
        pieces[(text, letters[0], outs, letters[1])] = True
        return asm(text, outs, ins, tied=tied, effects=effects)

    monkeypatch.setattr(ptx, "asm", record)
    for shape, mask, config in (CASES[2], CASES[5], CASES[7], CASES[8]):
        _lower_kernel(_spec(**shape), mask, config)
    kinds, registers, body = {"r": ".b32", "l": ".b64", "f": ".f32"}, [], []
    for number, (text, tied, outs, ins) in enumerate(pieces):
        names = [f"%v{number}_{i}" for i in range(len(tied + outs + ins))]
        registers += [
            f".reg {kinds[k]} {x};" for k, x in zip(tied + outs + ins, names, strict=True)
        ]
        written, read = names[: len(tied + outs)], names[len(tied + outs) :]
        names = [*written, *written[: len(tied)], *read]
        used = re.sub(r"\$(\d+)", lambda found, names=names: names[int(found[1])], text)
        body.append(f"{{\n{used}\n}}")
    path = tmp_path / "pieces.ptx"
    head = ".version 8.4\n.target sm_90a\n.address_size 64\n.visible .entry pieces() {"
    path.write_text("\n".join([head, *registers, *body, "ret;\n}\n"]))
    command = ["ptxas", "-arch=sm_90a", str(path), "-o", str(tmp_path / "pieces.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(pieces) > 30


# -- dispatch --------------------------------------------------------------------------------------


def test_chosen_where_it_serves():
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    with abstract_gpu():
        unnamed = explain("attention", x, x, x, quant="sage2")
        biased = explain("attention", x, x, x, jnp.zeros((1, 1, 128, 128)), quant="sage2")
    assert unnamed.implementation == "mosaic" and "as fine as" in unnamed.notes[0]
    assert biased.implementation == "xla" and "bias" in biased.rejected["mosaic"]

    def loss(x):
        out = dot_product_attention(x, x, x, quant="sage2", is_causal=True, implementation="mosaic")
        return out.astype(jnp.float32).sum()

    assert "mosaic_gpu" in _lower(jax.grad(loss), x)
    several = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    assert "mosaic_gpu" in _lower(jax.vmap(loss), several)


def test_deterministic_is_demanded(monkeypatch):
    """On a GPU only by kernels or under XLA's flag; a gradient of XLA's is refused with them."""
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    gpu = describe("gpu", "NVIDIA H100")
    assert "deterministic_ops" in unsupported_reason(_spec(deterministic=True), gpu, "xla")
    assert unsupported_reason(_spec(deterministic=True), gpu, "mosaic") is None

    def loss(x, causal_offset=0):
        out = dot_product_attention(
            x, x, x, is_causal=True, causal_offset=causal_offset, deterministic=True
        )
        return out.astype(jnp.float32).sum()

    assert "mosaic_gpu" in _lower(jax.grad(loss), x)
    offset = jax.ShapeDtypeStruct((), jnp.int32)
    with pytest.raises(NotImplementedError, match="the gradient of this call is XLA's: determ"):
        _lower(jax.grad(loss), x, offset)
    monkeypatch.setenv("XLA_FLAGS", "--a=b --xla_gpu_deterministic_ops=true")
    assert "mosaic_gpu" in _lower(jax.grad(loss), x, offset)
    assert unsupported_reason(_spec(deterministic=True), gpu, "xla") is None
    with pytest.raises(ValueError, match="deterministic must be True or False; got 1"):
        explain("attention", x, x, x, deterministic=1)


def test_int8_gradient():
    """SageBwd: its kernels where they serve, XLA's INT8 gradient for rules that are arrays."""
    x = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.float16)
    mask = _blocks(2, 256, 256, 64, 128, Mask.causal())
    with abstract_gpu():
        found = explain("attention", x, x, x, quant="sage_bwd")
        other = explain("attention", *[y] * 3, quant="sage_bwd")
    assert found.implementation == other.implementation == "mosaic"
    assert "SageBwd" in found.notes[1] and "16 bits, finer than the INT8" in found.notes[4]

    def loss(x, lengths=None):
        out = dot_product_attention(
            x, x, x, mask=mask, quant="sage_bwd", implementation="mosaic",
            key_value_seq_lengths=lengths,
        )  # fmt: skip
        return out.astype(jnp.float32).sum()

    # dQ, dK with dV, and K turned round; statistics and codes are those of the forward.
    kernels = lambda *given: _lower(jax.grad(loss), *given).count("mosaic_gpu_v2")  # noqa: E731
    assert kernels(x) - kernels(x, jax.ShapeDtypeStruct((2,), jnp.int32)) == 3


@pytest.mark.parametrize("pv", ["16 bits", "fp8"])
def test_int8_gradient_uses_what_the_forward_quantised(pv):
    """Both call one function each, so that XLA sees the same work twice and does it once."""
    x = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)
    quant, shared = "sage_bwd", {"kv_statistics", "quantize_k", "quantize_q"}
    if pv == "fp8":  # whose attention kernel quantises Q itself
        quant = dataclasses.replace(QUANTS["sage2"], name="mine", backward="int8")
        shared.remove("quantize_q")

    def loss(*x):
        out = dot_product_attention(*x, quant=quant, implementation="mosaic")
        return out.astype(jnp.float32).sum()

    text = _lower(jax.grad(loss, (0, 1, 2)), x, x, x)
    for name in shared:
        assert len(re.findall(rf"func.func private @{name}(?:_\d+)?\(", text)) == 1
        assert len(re.findall(rf"call @{name}(?:_\d+)?\(", text)) == 2


def test_block_masks_are_dispatched():
    """Gradient, `vmap` with a mask for each, and SpargeAttn, which takes its own lists along."""
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    mask = _blocks(2, 256, 256, 128, 128, Mask.causal())

    def loss(x, mask):
        out = dot_product_attention(x, x, x, mask=mask, implementation="mosaic")
        return out.astype(jnp.float32).sum()

    assert "mosaic_gpu" in _lower(jax.grad(loss), x, mask)
    several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), (x, mask))
    assert "mosaic_gpu" in _lower(jax.vmap(loss), *several)
    run = lambda x: sparge_attention(x, x, x, is_causal=True, implementation="mosaic")  # noqa: E731
    assert "mosaic_gpu" in _lower(run, x)
    with abstract_gpu(), pytest.raises(NotImplementedError, match="pvthreshd is not served by mos"):
        jax.eval_shape(
            lambda x: sparge_attention(x, x, x, pvthreshd=20.0, implementation="mosaic"), x
        )


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_spec(dtype="float32"), "bfloat16 or float16; got float32"),
        (_spec(h=320), "head_dim up to 256; got 320"),
        (AttentionSpec(1, 8, 8, 1, 1, 64, "bfloat16", -1.0), "scale must be positive; got -1.0"),
        (_spec(has_bias=True), "does not take a bias"),
        (_spec(mask_kinds=("array",)), "does not take mask arrays"),
        (_spec(mask_kinds=("tiles",)), "only as one BlockMask, not inside a Mask"),
        (_spec(mask_kinds=("tiles", "tiles"), tiles=(128, 128)), "only as one BlockMask"),
        (
            _spec(mask_kinds=("tiles",), tiles=(96, 128)),
            "block_q 64 or a multiple of 128 .* 96 x 128",
        ),
        (_spec(mask_kinds=("tiles",), tiles=(128, 96)), "64, 128 or 256; got 128 x 96"),
        (_spec(h=160, quant=None, tiles=(128, 128)), "head_dim 192 exceed .* block_kv=64"),
        (_spec(mask_kinds=("segments", "several segments")), "more than one pair"),
        (_spec(quantized_key=True), "QTensor keys or values need 'xla'"),
        (_spec(quant=QUANTS["sage2_int4"]), "no int4 product"),
        (_spec(quant=QUANTS["sage3"]), "no nvfp4 product"),
        (_spec(quant=AttentionQuant(pv="int8")), "no int8 product of P and V"),
        (_spec(mask_kinds=("predicate",)), "does not take predicate masks"),
        (_spec(quant=AttentionQuant(pv="fp16")), "no fp16 product of P and V for bfloat16 values"),
        (_spec(quant=AttentionQuant("half", v_max=2.25)), "half has v_max=2.25"),
        (_spec(quant=AttentionQuant(two_level=False)), "two_level=True"),
        (_spec(quant=AttentionQuant(granularity="per_token")), "granularity='per_token'"),
        (_spec(quant=AttentionQuant(smooth_v=True)), "smooths K only"),
    ],
)
def test_reasons(spec, reason):
    assert re.search(reason, mosaic_sm90.unsupported_reason(spec))
    with pytest.raises(NotImplementedError):
        mosaic_sm90.attention(None, None, None, None, None, Mask(), spec)


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("formats", [("int8", "e4m3"), ("int8", "half"), ("half", "half")])
def test_heuristic_fits(head_dim, formats):
    variant = Variant(*formats)
    config = heuristic(variant, head_dim)
    assert config.smem_bytes(head_dim, variant) <= mosaic_sm90_plan.SMEM_LIMIT
    # Output, one part of a tile's product and P live at the same time; scores and output too.
    p = config.block_kv * variant.pv_bytes // 8
    part = mosaic_sm90_plan.PART[head_dim] // 2 + variant.ones // 2
    assert head_dim // 2 + max(part + p, config.block_kv // 2) <= config.registers - 16


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas of the CUDA toolkit")
@pytest.mark.parametrize("formats", [("int8", "e4m3"), ("half", "half")])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_registers_suffice(tmp_path, head_dim, formats):
    variant = Variant(*formats)
    for rules in ({}, {"masked": True, "segmented": True}):
        config = heuristic(variant, head_dim, rules.get("segmented", False))
        spilled = spilled_bytes(tmp_path / "loop.ptx", variant, head_dim, config, **rules)
        assert spilled <= 16, rules


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_kv": 192}, "block_kv must be 64, 128 or 256 keys; got 192"),
        ({"num_compute": 4}, "num_compute must be 2 or 3; got 4"),
        ({"registers": 240}, "2 x 240 \\+ 40 registers are 520 .* 3 x 168 = 504"),
        # 512 x 128 would fit the register file, but a block of three warpgroups never gets it.
        ({"memory_registers": 48}, "2 x 232 \\+ 48 registers are 512 .* 3 x 168 = 504"),
        ({"registers": 160}, "at least, .* 168 .* got 160 and 40"),
        ({"registers": 230}, "multiple of 8"),
        ({"num_stages": 1}, "num_stages must be at least 2; got 1"),
        ({"qk_split": 3}, "qk_split must be 1 or 2; got 3"),
        ({"schedule": "pair"}, "schedule must be"),
    ],
)
def test_config_is_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Config(**kwargs)


def test_too_many_stages_are_refused():
    with pytest.raises(NotImplementedError, match="shared memory"):
        _lower_kernel(_spec(), Mask(), Config(num_stages=3))


# -- schedule --------------------------------------------------------------------------------------


def _plan(batch, t, s, heads, bounds=(None, None), **kwargs):
    bounded = tuple(x is not None for x in bounds)
    return Plan(
        Config(), Variant(), batch, t, s, heads, heads, 128, 256, *bounds, bounded, **kwargs
    )


@pytest.mark.parametrize("max_diff", [None, 0])
@pytest.mark.parametrize("heads", [1, 8, 12])
def test_every_tile_is_handed_out_once_and_evenly(max_diff, heads):
    plan = _plan(2, 4096, 4096, heads, (None, max_diff))
    tiles = [row[1 : 1 + row[0]] for row in mosaic_sm90_plan.work_table(plan)]
    assert sorted(np.concatenate(tiles)) == list(range(plan.total))
    cost = [
        sum(hi - lo for lo, _, _, hi in (plan.kv_tiles(plan.tile_of(int(i))[0]) for i in row))
        for row in tiles
    ]
    assert max(cost) - min(cost) <= 16  # one query tile of the longest kind


@pytest.mark.parametrize("bounds", [(None, None), (None, 0), (-100, 0), (-50, 30), (None, 700)])
def test_unmasked_tiles_are_really_free_of_masks(bounds):
    """The tiles known at trace time, and those that arrays give for the same rules."""
    t_len, s_len = 520, 900
    plan = _plan(1, t_len, s_len, 1, bounds)
    mask = Mask(*bounds)
    allowed = np.zeros((640, 1024), bool)
    allowed[:t_len, :s_len] = mask.dense(t_len, s_len)[0, 0]
    dynamic = np.asarray(mosaic_sm90_plan.dynamic_tiles(mask, plan))[0]
    for q_tile in range(plan.q_tiles):
        rows = slice(q_tile * 128, min(q_tile * 128 + 128, t_len))
        tile = allowed[rows].reshape(-1, 4, 256)
        for lo, mid_lo, mid_hi, hi in (plan.kv_tiles(q_tile), dynamic[q_tile]):
            assert 0 <= lo <= mid_lo <= mid_hi <= hi <= 4 and lo < hi
            assert tile[:, mid_lo:mid_hi].all()
            assert not tile[:, :lo].any() and not tile[:, hi:].any()


def test_listed_tiles():
    """Unmasked places of the lists hold whole tiles, and the work is dealt out once and evenly."""
    block_kv = 64
    mask = Mask.causal(300) & Mask.window(400, None, 300)
    blocks = _blocks(3, 1000, 1500, 256, block_kv, mask)
    config = Config(block_kv=block_kv, num_stages=2, num_sms=5, qk_split=1)
    plan = Plan(config, Variant(), 2, 1000, 1500, 3, 3, 128, block_kv, listed=256)
    assert not mosaic_sm90._tiles_reason(_spec(mask_kinds=("tiles",), tiles=(256, block_kv)))
    ranges = np.asarray(mosaic_sm90_plan.listed_tiles(blocks, plan))
    allowed = np.zeros((3, 1024, -(-1500 // block_kv) * block_kv), bool)
    allowed[:, :1000, :1500] = mask.dense(1000, 1500)[0, 0]
    allowed[:, 1000:] = True  # rows that are not stored
    whole = allowed.reshape(3, 4, 256, -1, block_kv).all((2, 4))
    for n, i in np.ndindex(3, 4):
        lo, mid_lo, mid_hi, hi = ranges[0, n, i]
        assert 0 == lo <= mid_lo <= mid_hi <= hi == blocks.kv_num_blocks[0, n, i]
        assert whole[n, i, blocks.kv_indices[0, n, i, mid_lo:mid_hi]].all()
        full = whole[n, i, blocks.kv_indices[0, n, i, :hi]]
        assert mid_hi - mid_lo >= min(full.sum(), 1)

    work = np.asarray(mosaic_sm90_plan.listed_work(blocks, plan))
    tiles = [row[1 : 1 + row[0]] for row in work]
    assert sorted(np.concatenate(tiles)) == list(range(plan.total))
    place = [plan.tile_of(int(i)) for row in tiles for i in row]
    assert sorted(place) == sorted((q, b, n) for b in range(2) for n in range(3) for q in range(8))
    count = {(q, n): int(blocks.kv_num_blocks[0, n, q // 2]) for q in range(8) for n in range(3)}
    cost = [sum(count[q, n] for q, _, n in map(plan.tile_of, map(int, row))) for row in tiles]
    assert max(cost) <= np.mean(cost) + max(count.values())  # the bound of any greedy schedule


def test_packed_sequences_visit_only_their_own_tiles():
    ids = jnp.repeat(jnp.arange(4), 512)[None]
    mask = Mask.segment_ids(ids) & Mask.causal()
    plan = _plan(1, 2048, 2048, 1, (None, 0), dynamic=True, segmented=True)
    table = np.asarray(mosaic_sm90_plan.dynamic_tiles(mask, plan))[0]
    assert (table[:, 3] - table[:, 0] <= 2).all()
    status = np.asarray(mask.tile_status(2048, 2048, 128, 256))[0, 0]
    for row, (_, mid_lo, mid_hi, _) in zip(status, table, strict=True):
        assert (row[mid_lo:mid_hi] == FULL).all()
