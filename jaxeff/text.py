"""A language model with its tokenizer: text in, text out, whatever the checkpoint's origin."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxeff.typing import DTypeLike

__all__ = ["TextModel", "TextStream", "load_text_model"]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model and the two directions of its tokenizer.

    Args:
      model: ``model(tokens [B, T]) -> logits [B, T, V]``.
      encode: text to token ids, with the special tokens that the model expects in front.
      decode: token ids to text; special tokens are left out.
      stop_tokens: ids that end a text; none for byte-level models.

    Example:
      >>> TextModel(None, lambda text: list(text.encode()), lambda ids: bytes(ids).decode()).encode(
      ...     "ab"
      ... )
      [97, 98]
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop_tokens: tuple[int, ...] = ()


def load_text_model(path: str | Path, *, dtype: DTypeLike = jnp.float32) -> TextModel:
    """Loads a checkpoint of ``save_model`` (bytes are its tokens) or of Hugging Face.

    A folder with ``config.json`` is read as Hugging Face's: weights by ``hf.from_pretrained``, text
    by its ``tokenizer.json``, end-of-text ids from ``generation_config.json`` or ``config.json``.

    Args:
      path: the folder.
      dtype: dtype of the activations, and of the weights of a Hugging Face checkpoint.

    Returns:
      The TextModel.

    Raises:
      ValueError: the checkpoint or the tokenizer is missing or damaged.
      NotImplementedError: a checkpoint of ``save_model`` whose vocabulary is not the 256 bytes.
      ModuleNotFoundError: naming the extra that brings ``tokenizers``.

    Example:
      >>> load_text_model("/nowhere")
      Traceback (most recent call last):
      ...
      ValueError: path /nowhere is not a checkpoint directory
    """
    path = Path(path)
    if (path / "config.json").exists():
        return _hugging_face(path, dtype)
    from jaxeff.checkpoint import load_model

    model, _ = load_model(path, dtype=dtype)
    if model.config.vocab_size != 256:
        raise NotImplementedError(
            f"{path} has a vocabulary of {model.config.vocab_size} tokens and no tokenizer; "
            "byte-level models (256) and Hugging Face folders are served"
        )
    return TextModel(
        model,
        lambda text: list(text.encode()),
        lambda ids: np.asarray(ids, np.uint8).tobytes().decode(errors="replace"),
    )


def _hugging_face(path: Path, dtype) -> TextModel:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading tokenizer.json needs the package tokenizers: pip install 'jaxeff[hf]'"
        ) from error
    from jaxeff.models import hf

    file = path / "tokenizer.json"
    if not file.exists():
        raise ValueError(
            f"{file} does not exist; text needs it (jaxeff.generate.generate takes token ids)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for every kind of damage
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    model = hf.from_pretrained(path, dtype=dtype)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"{file} has token ids up to {largest}; the model's vocabulary has "
            f"{model.config.vocab_size}"
        )
    return TextModel(
        model,
        lambda text: tokenizer.encode(text).ids,
        lambda ids: tokenizer.decode([int(token) for token in ids]),
        _end_of_text(path),
    )


def _end_of_text(path: Path) -> tuple[int, ...]:
    """The ids that end a text: one or a list, in the first file that names any."""
    for name in ("generation_config.json", "config.json"):
        file = path / name
        ids = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


class TextStream:
    """Turns growing token ids into text as it becomes final, for ``generate(on_tokens=…)``.

    Several tokens can form one character, and a tokenizer may change a word's spacing by what
    follows; so the whole row is decoded each time, and the text before an unfinished character is
    written once.

    Args:
      decode: token ids to text.
      write: receives each new piece of text.
      skip: ids that are not text, such as stop tokens.
      lead: text in front of the first piece, such as the prompt: nothing is written before there
        is something to write.

    Example:
      >>> pieces = []
      >>> stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), pieces.append)
      >>> for byte in "é!".encode():
      ...     stream(np.array([[byte]]), 0)
      >>> pieces
      ['é', '!']
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        write: Callable[[str], Any],
        skip: Sequence[int] = (),
        lead: str = "",
    ):
        self._decode, self._write, self._skip = decode, write, frozenset(skip)
        self._lead = lead
        self._ids: list[int] = []
        self._written = ""

    def __call__(self, tokens: np.ndarray, step: int) -> None:
        """Take the new tokens ``[1, n]`` from step ``step`` on."""
        self._ids += [int(token) for token in tokens[0] if int(token) not in self._skip]
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return  # the last character is not complete yet
        self._emit(text)

    def close(self) -> None:
        """Write what is left, with a replacement mark for an unfinished character."""
        self._emit(self._decode(self._ids))

    def _emit(self, text: str) -> None:
        piece = self._lead + text[len(self._written) :]
        if piece:
            self._write(piece)
            self._lead, self._written = "", text
