"""Compressors by name."""

import pytest

from jaxeff.compress import COMPRESSORS, RKV, FullKV, KVzip, parse


def test_spellings():
    assert parse(None) == parse("full") == FullKV()
    assert parse("rkv:256") == RKV(budget=256)
    assert parse("rkv(budget=256, buffer=64)") == RKV(budget=256, buffer=64)
    assert parse("kvzip:0.3") == KVzip(ratio=0.3)
    assert parse(" kvzip(ratio=0.3, storage='int8') ").storage == "int8"
    assert parse("kvzip(ratio=0.3, repeat_prompt=[1, 2])").repeat_prompt == (1, 2)
    method = RKV(budget=16)
    assert parse(method) is method
    assert all(cls.name == name for name, cls in COMPRESSORS.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv:10", "compression='snapkv:10' names no method; known: full, kvzip, rkv"),
        ("", "names no method; known: full, kvzip, rkv"),
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
    with pytest.raises(ValueError, match=message):
        parse(text)
