"""Short texts as bags of hashed character n-grams, and pairs of them: a German-English dictionary."""

import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from contrastive.data import Dataset
from iotsolve.progress import bar

__all__ = ["BUCKETS", "german_english", "ngrams"]

BUCKETS = 2**14  # numbers that an n-gram may have; 0 is none
_LENGTH = 40  # n-grams of a text that count
_DEBIAN = Path("/usr/share/trans/de-en")


def ngrams(texts: Iterable[str], *, sizes: tuple[int, ...] = (3, 4), length: int = _LENGTH) -> Tensor:
    """Return each text as the hashed numbers of its character n-grams, words bounded by `<` and `>` (Bojanowski et al., 2017).

    Args:
        texts: N strings; upper and lower case are the same.
        sizes: Lengths of the n-grams, in characters.
        length: How many of a text's n-grams are kept, from its beginning.

    Returns:
        int64, shape (N, length), from 1 to `BUCKETS` - 1, filled up with 0.

    Example:
        >>> codes = ngrams(["eel", "Eel fishing"])
        >>> int((codes[0] > 0).sum()), bool((codes[0, :2] == codes[1, :2]).all())
        (5, True)
    """
    texts = list(texts)
    rows = np.zeros((len(texts), length), np.int64)
    with bar("reading texts", len(texts)) as advance:
        for row, text in zip(rows, texts, strict=True):
            codes = [1 + zlib.crc32(gram.encode()) % (BUCKETS - 1) for gram in _grams(text.lower(), sizes)][:length]
            row[: len(codes)] = codes
            advance("")
    return torch.from_numpy(rows)


def _grams(text: str, sizes: tuple[int, ...]) -> Iterator[str]:
    for word in text.split():
        bounded = f"<{word}>"
        for size in sizes:
            yield from (bounded[k : k + size] for k in range(len(bounded) - size + 1))


def german_english(path: str | Path | None = None, *, each: int = 4, test_entries: int = 1000) -> Dataset:
    """Return pairs of German and English words from the dictionary of Chemnitz, split by entry.

    An entry has synonyms on both sides: each of them is in a pair, and all pairs of an entry share its id, so that a batch in
    which they meet knows that they are no negatives. The pairs of an entry are neighbours in the data.

    Args:
        path: The dictionary; None is where Debian's package puts it.
        each: Most pairs of one entry.
        test_entries: Entries held out, drawn once and for all.

    Raises:
        ValueError: The dictionary is not there, or has no entries.
    """
    path = _DEBIAN if path is None else Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no dictionary at {path}: install Debian's package trans-de-en, or give the path of its file de-en."
        )
    entries = [found for line in path.open(encoding="utf-8") if (found := _entry(line))]
    if len(entries) <= test_entries:
        raise ValueError(
            f"{path} has {len(entries)} entries of the form 'German :: English': more than {test_entries} are needed."
        )
    order = np.random.default_rng(0).permutation(len(entries))
    parts = []
    for chosen in (order[test_entries:], order[:test_entries]):
        pairs = [(left, right, int(k)) for k in chosen for left, right in _pairs(*entries[k], each)]
        left, right, ids = zip(*pairs, strict=True)
        parts.append((ngrams(left), ngrams(right), torch.tensor(ids)))
    (left, right, ids), (left_test, right_test, ids_test) = parts
    return Dataset(left, None, left_test, None, "german-english", right, right_test, ids, ids_test)


def _entry(line: str) -> tuple[list[str], list[str]] | None:
    """The synonyms on both sides of a line's first meaning, without what the dictionary says about them."""
    if line.startswith("#") or line.count(" :: ") != 1:
        return None
    sides = [[_NOTES.sub("", form).strip() for form in side.split("|")[0].split(";")] for side in line.split(" :: ")]
    sides = [[" ".join(form.split()) for form in forms if 2 <= len(form) <= 40] for forms in sides]
    return (sides[0], sides[1]) if all(sides) else None


_NOTES = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|<[^>]*>")


def _pairs(left: list[str], right: list[str], most: int) -> Iterator[tuple[str, str]]:
    for k in range(min(most, max(len(left), len(right)))):
        yield left[k % len(left)], right[k % len(right)]
