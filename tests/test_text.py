"""Text in, text out: the command line on a Hugging Face folder with its tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jaxeff import cli
from jaxeff.generate import generate
from jaxeff.models import hf
from jaxeff.text import TextStream, load_text_model

LLAMA = Path(__file__).parent / "data" / "hf" / "llama3"


def _tokenizer(size: int) -> Tokenizer:
    """A byte-level BPE without merges: one token a byte, and <s> in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 3]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "llama3"
    shutil.copytree(LLAMA, copy)
    _tokenizer(256).save(str(copy / "tokenizer.json"))
    return copy


def test_generate_prints_what_the_model_generates(folder, capsys):
    cli.main(["generate", "--checkpoint", str(folder), "--prompt", "ab c", "--max-new-tokens", "9"])
    printed = capsys.readouterr().out
    loaded = load_text_model(folder)
    ids = loaded.encode("ab c")
    assert ids[0] == 1 and len(ids) == 5 and loaded.stop_tokens == (2,)
    result = generate(hf.from_pretrained(folder), [ids], max_new_tokens=9, stop_tokens=(2,))
    tokens = np.asarray(result.tokens[0])[: int(result.lengths[0])]
    assert printed == "ab c" + loaded.decode(tokens[tokens != 2]) + "\n"


def test_a_wrong_option_prints_nothing_but_the_message(folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--checkpoint", str(folder), "--prompt", "ab", "--cache", "lru"])
    printed = capsys.readouterr()
    assert printed.out == "" and "lru" in printed.err


def test_several_ends_of_text(folder):
    config = json.loads((folder / "generation_config.json").read_text())
    for ids in ([7, 9], None):
        (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ids}))
        expected = tuple(ids or [json.loads((folder / "config.json").read_text())["eos_token_id"]])
        assert load_text_model(folder).stop_tokens == expected


def test_what_is_wrong_with_a_folder_is_said(folder):
    _tokenizer(259).save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"ids up to 258; the model's vocabulary has 256"):
        load_text_model(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_text_model(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        load_text_model(folder)


def test_a_stream_waits_for_whole_characters_and_skips_stop_tokens():
    pieces = []
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), pieces.append, skip=[0])
    data = "aé".encode()
    stream(np.array([list(data[:2])]), 0)
    stream(np.array([[*data[2:], 0]]), 2)
    stream(np.array([[data[1]]]), 4)
    stream.close()
    assert pieces == ["aé", "\ufffd"]
