"""Text to token ids and back: raw bytes by default, or a Hugging Face `tokenizers` JSON file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

# Names under which published tokenizers keep their end-of-document token, tried in this order.
COMMON_EOS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    vocab_size: int
    eos_id: int
    fingerprint: str
    """equal for tokenizers that give the same ids"""

    def encode(self, text: bytes) -> np.ndarray:
        """UTF-8 bytes -> ids int32 [N], with no end-of-document token."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text, on all CPU cores where the tokenizer can."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids -> text; ids without text (end of document, padding of the vocabulary) vanish."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes themselves, 256 ends (and starts) a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        """UTF-8 bytes -> int32 [N]."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids -> text; invalid UTF-8 becomes the replacement character."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class UnknownTokenError(ValueError):
    """The token that should separate documents is not in the vocabulary."""


class FileTokenizer:
    """A tokenizer read from a Hugging Face `tokenizers` JSON file.

    Args:
        path: the JSON file.
        eos_token: the token that separates documents; by default the first of `COMMON_EOS` in the
            vocabulary, and if there is none, one new id after the last.

    Attributes:
        json: the file's bytes.
        eos_token: as given.
        eos_name: the token of `eos_id`; None where that is a new id.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a tokenizer.
        UnknownTokenError: `eos_token` is not in its vocabulary.
    """

    def __init__(self, path: str | Path, eos_token: str | None = None):
        from tokenizers import Tokenizer as HFTokenizer  # here, as the byte tokenizer does without it

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer file not found: {path}")
        self.json = path.read_bytes()
        self.eos_token = eos_token
        try:
            self._tokenizer = HFTokenizer.from_buffer(self.json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizers JSON file ({error})") from error
        # Not the number of tokens: a vocabulary may have holes.
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        names = (eos_token,) if eos_token is not None else COMMON_EOS
        found = [i for name in names if (i := self._tokenizer.token_to_id(name)) is not None]
        if eos_token is not None and not found:
            raise UnknownTokenError(f"{path}: no token {eos_token!r} in the vocabulary")
        self.eos_id: int = found[0] if found else size
        self.eos_name: str | None = self._tokenizer.id_to_token(self.eos_id)
        self.vocab_size: int = max(size, self.eos_id + 1)
        self.fingerprint = f"{hashlib.sha256(self.json).hexdigest()[:16]}-eos{self.eos_id}"

    def encode(self, text: bytes) -> np.ndarray:
        """UTF-8 bytes -> int32 [N]; invalid UTF-8 is replaced first."""
        encoding = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text, in parallel."""
        strings = [text.decode("utf-8", errors="replace") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids -> text, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i != self.eos_id])


def load_tokenizer(path: str | None, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer of a JSON file, or bytes when `path` is None."""
    return ByteTokenizer() if path is None else FileTokenizer(path, eos_token)


class TextStream:
    """Text of ids that come one at a time: every piece as soon as its characters are whole.

    All pieces together are what `decode` makes of all ids, unless it takes back whole characters.

    Args:
        tokenizer: decodes them.
        ids: what comes before, a prompt say; its text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray = ()):
        self._decode = tokenizer.decode
        # Decoded together with some ids before them: a tokenizer may write a token as its neighbours ask.
        self._ids = [int(i) for i in ids][-_CONTEXT:]
        self._said = self._decode(self._ids)
        self._pending = 0

    def push(self, token: int) -> str:
        """The text that is whole with this id, or "" where a character is not."""
        self._ids.append(int(token))
        self._pending += 1
        text = self._decode(self._ids)
        whole = _whole(text)
        # Some tokenizers read all bytes in a row as replacement characters while the last ones make none.
        if not whole.startswith(_whole(self._said)) and self._pending < _BYTES:
            return ""
        return self._say(text, len(whole))

    def finish(self) -> str:
        """What is left, whole or not."""
        text = self._decode(self._ids)
        return self._say(text, len(text))

    def _say(self, text: str, end: int) -> str:
        """The text up to there that was not said before."""
        new, self._pending = text[len(self._said) : end], 0
        self._said = text[: max(end, len(self._said))]
        if len(self._ids) > 2 * _CONTEXT:
            self._forget(text, len(text) - len(self._said))
        return new

    def _forget(self, text: str, left: int) -> None:
        """Drops ids long said, where the others alone read as they do among them: between characters."""
        for count in range(_CONTEXT, _CONTEXT + _BYTES):
            tail = self._decode(self._ids[-count:])
            if text.endswith(tail) and len(tail) >= left:
                self._ids, self._said = self._ids[-count:], tail[: len(tail) - left]
                return


def _whole(text: str) -> str:
    """Text less what bytes to come may change: a character lacks three at most, each one read as U+FFFD."""
    return text[: max(len(text.rstrip("\ufffd")), len(text) - (_BYTES - 1))]


_CONTEXT = 8
_BYTES = 4  # of a character, at most
