"""Documents and the sequences they form. Documents lie in a file that is mapped into memory: data may exceed it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, overload

import numpy as np

TOKEN = np.int32
WRITE_BUFFER = 1 << 20

Tokens = np.ndarray[Any, np.dtype[np.int32]]
Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Document:
    """One row as tokens. A label of -100 isn't learnt; the first never is, since nothing comes before it."""

    input_ids: Tokens
    labels: Tokens

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, and which of them share a sequence."""

    documents: Sequence[Document]
    sequences: Sequence[Sequence[int]]
    """Indices of the documents in each sequence. One each without packing."""

    @property
    def lengths(self) -> Numbers:
        """Tokens of each document."""
        if isinstance(self.documents, Documents):
            return self.documents.lengths
        return np.asarray([len(document) for document in self.documents], np.int64)

    @property
    def largest_token(self) -> int:
        """The largest id among all tokens."""
        if isinstance(self.documents, Documents):
            return self.documents.largest_token
        return max(int(document.input_ids.max()) for document in self.documents)

    @property
    def tokens(self) -> int:
        """Tokens of one pass, padding not counted."""
        return int(self.lengths.sum())


class Documents(Sequence[Document]):
    """Documents in a file: 16 bytes of memory each, and pages that the kernel may drop again."""

    def __init__(self, input_ids: Tokens, labels: Tokens, starts: Numbers, lengths: Numbers) -> None:
        self._input_ids, self._labels, self._starts = input_ids, labels, starts
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> Document | Documents:
        if isinstance(index, slice):
            return self.chosen(index)
        place = slice(int(self._starts[index]), int(self._starts[index]) + int(self.lengths[index]))
        return Document(self._input_ids[place], self._labels[place])

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @property
    def largest_token(self) -> int:
        """The largest id in the file, so of those that weren't chosen too."""
        return int(self._input_ids.max())

    def chosen(self, which: Any) -> Documents:
        """Some of them, by a slice, a mask or indices; in the same file."""
        return Documents(self._input_ids, self._labels, self._starts[which], self.lengths[which])


class DocumentWriter:
    """Writes documents to disk, one after the other."""

    def __init__(self, folder: Path, seed: int) -> None:
        # Without a name, they end with the last array that is mapped from them.
        self._input_ids, self._labels = (TemporaryFile(dir=folder, buffering=WRITE_BUFFER) for _ in range(2))  # noqa: SIM115
        self._lengths, self._digests = array("q"), array("Q")
        self._key = seed.to_bytes(8, "big")

    def add(self, input_ids: Sequence[int], labels: Sequence[int]) -> None:
        """Write one."""
        ids, wanted = np.asarray(input_ids, TOKEN).tobytes(), np.asarray(labels, TOKEN).tobytes()
        self._input_ids.write(ids)
        self._labels.write(wanted)
        self._lengths.append(len(input_ids))
        digest = hashlib.blake2b(ids + wanted, digest_size=8, key=self._key).digest()
        self._digests.append(int.from_bytes(digest, "big"))

    def finish(self) -> tuple[Documents, Numbers]:
        """The documents in the order of their adding, and a digest of each: equal where they train the same."""
        lengths = np.array(self._lengths, np.int64)
        starts = np.cumsum(lengths) - lengths
        documents = Documents(_mapped(self._input_ids), _mapped(self._labels), starts, lengths)
        return documents, np.array(self._digests, np.uint64)


def _mapped(file: IO[bytes]) -> Tokens:
    file.flush()
    if not file.tell():
        return np.empty(0, TOKEN)  # nothing can't be mapped
    return np.asarray(np.memmap(file, TOKEN, mode="r"))
