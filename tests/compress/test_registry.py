"""Compressors by name."""

import pytest

from jaxeff.compress import COMPRESSORS, RKV, AdaKV, Compose, FullKV, KVzip, StreamingLLM, parse


def test_spellings():
    assert parse(None) == parse("full") == FullKV()
    assert parse("rkv:256") == RKV(budget=256)
    assert parse("rkv(budget=256, buffer=64)") == RKV(budget=256, buffer=64)
    assert parse("kvzip:0.3") == KVzip(ratio=0.3)
    assert parse(" kvzip(ratio=0.3, storage='int8') ").storage == "int8"
    assert parse("kvzip(ratio=0.3, repeat_prompt=[1, 2])").repeat_prompt == (1, 2)
    assert parse("StreamingLLM:32") == parse("streaming_llm(budget=32)") == StreamingLLM(budget=32)
    assert parse("adakv(snapkv(budget=64), floor=0.1)") == AdaKV(method="snapkv:64", floor=0.1)
    assert parse("quantized(rkv:64, 'nvfp4')").inner == RKV(budget=64, storage="nvfp4")
    both = parse("kvzip(ratio=0.3, storage='int8') + rkv:64")
    assert both == Compose(context=both.context, generation="rkv:64") and both.storage == "int8"
    assert both.generation == RKV(budget=64, spare_frozen=True)
    method = RKV(budget=16)
    assert parse(method) is method
    assert all(cls.name == name for name, cls in COMPRESSORS.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snap:10", "compression='snap:10' names no method; known: adakv, compose, expected"),
        ("", "names no method; known: adakv"),
        ("rkv:16 + rkv:16", "context='rkv' is not served; a method that evicts a context once"),
        ("kvzip:0.3 + adakv(rkv:16)", "generation='adakv' is not served after a cut context"),
        ("kvzip:0.3 + rkv(budget=16, scope='layer')", "generation.scope='layer' is not served"),
        ("full+full+full", "joins 3 methods; expected 2"),
        ("adakv(kvzip:0.3)", "method='kvzip' has no budget per head; adakv needs one"),
        ("per_layer(adakv(rkv:16))", "method='adakv' inside per_layer is not served"),
        ("adakv(adakv(rkv:16))", "method='adakv' inside adakv is not served"),
        ("rkv(budget=16, budget=32)", "sets budget twice"),
        ("kvzip:'all'", r"ratio=all must be in \(0, 1\]"),
        ("adakv(rkv:16, floor=2)", "floor=2; expected a share of the budget"),
        ("quantized(rkv:16, 'int3')", "dtype='int3' is not a cache storage format"),
        (
            "quantized(kvzip:0.3, 'int8') + quantized(rkv:16, 'int4')",
            r"storage is \['int4', 'int8'\]; one cache has one storage",
        ),
        ("rkv", r"rkv needs budget, for example 'rkv\(budget=…\)'"),
        ("rkv(budge=4)", "rkv has no 'budge'; it has beta, budget, buffer"),
        ("rkv(256)", r"is not understood; write 'rkv:NUMBER' or 'rkv\(field=value, …\)'"),
        ("rkv:many", "is not understood; write 'rkv:NUMBER'"),
        ("rkv(budget=", "is not understood"),
        ("full:3", "full takes no number"),
        ("kvzip:1.5", r"ratio=1.5 must be in \(0, 1\]"),
        (3, "compression=3; expected a text, a Compressor or None"),
    ],
)
def test_bad_texts_are_named(text, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        parse(text)
