"""Remember which pairs of lines occurred before, by hashes of 64 bits in sorted arrays, for text of any length."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.rules import Settings, mend
from data_prep.textio import read_lines, require_file

HASH_BYTES = 8


@dataclass
class Chunk:
    """The result of a worker: kept lines, hashes of both sides (uint64, kept x 2), counts by name."""

    lines: list[tuple[bytes, bytes]]
    hashes: np.ndarray
    dropped: Counter[str]
    mended: Counter[str]


def side_hash(side: int, text: bytes) -> bytes:
    """A hash of 8 bytes, which differs between the two sides for the same text."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES, person=b"%d" % side).digest()


class SeenHashes:
    """A growing set of 64-bit hashes in a few sorted arrays; each takes 8 bytes, at most 24 while two arrays merge."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """A bool for each of ``hashes`` (uint64): True if it was added before."""
        found = np.zeros(len(hashes), dtype=bool)
        for known in self._sorted:
            place = np.searchsorted(known, hashes)
            found |= known[np.minimum(place, len(known) - 1)] == hashes
        return found

    def add(self, hashes: np.ndarray) -> None:
        """Add new hashes. Arrays of like size merge, so that about log2(n) arrays are left."""
        if len(hashes):
            self._sorted.append(np.sort(hashes))
        while len(self._sorted) > 1 and len(self._sorted[-2]) <= 2 * len(self._sorted[-1]):
            self._sorted[-2:] = [np.sort(np.concatenate(self._sorted[-2:]), kind="stable")]


class Memory:
    """The two rules that look at other lines. The main process applies them, in the input's order."""

    def __init__(self, settings: Settings, exclude: Sequence[Path]) -> None:
        self._columns = _duplicate_columns(settings)
        self._seen = [SeenHashes() for _ in self._columns]
        self._held_out = [SeenHashes(), SeenHashes()]
        for prefix in exclude:
            for side, language in enumerate((settings.source, settings.target)):
                self._held_out[side].add(hashes_of_file(Path(f"{prefix}.{language}"), side))

    def keep(self, chunk: Chunk) -> np.ndarray:
        """A bool for each line of the chunk: True if both rules keep it. Counts what they drop."""
        held_out = self._held_out[0].contains(chunk.hashes[:, 0]) | self._held_out[1].contains(chunk.hashes[:, 1])
        chunk.dropped["held_out"] += int(held_out.sum())
        duplicate = np.zeros(len(held_out), dtype=bool)
        keys = [column(chunk.hashes) for column in self._columns]
        for key, seen in zip(keys, self._seen, strict=True):
            duplicate |= seen.contains(key)
        kept = ~held_out & ~duplicate
        # within the chunk a line is kept only if none of its keys belongs to an earlier kept line
        own: list[set[int]] = [set() for _ in keys]
        for row in np.flatnonzero(kept) if keys else ():
            values = [int(key[row]) for key in keys]
            if any(value in known for value, known in zip(values, own, strict=True)):
                kept[row] = False
                continue
            for value, known in zip(values, own, strict=True):
                known.add(value)
        for key, seen in zip(keys, self._seen, strict=True):
            seen.add(key[kept])
        chunk.dropped["duplicate"] += int((~kept & ~held_out).sum())
        return np.asarray(kept)


def _duplicate_columns(settings: Settings) -> list[Callable[[np.ndarray], np.ndarray]]:
    if settings.duplicates == "none" or "duplicate" in settings.skip:
        return []
    columns: dict[str, list[Callable[[np.ndarray], np.ndarray]]] = {
        # an odd factor mixes the sides, so that swapped or equal hashes do not cancel
        "pair": [lambda hashes: hashes[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ hashes[:, 1]],
        "source": [lambda hashes: hashes[:, 0]],
        "target": [lambda hashes: hashes[:, 1]],
    }
    return columns.get(settings.duplicates) or columns["source"] + columns["target"]


def hashes_of_file(path: Path, side: int) -> np.ndarray:
    """Distinct hashes of the mended lines of a file."""
    counts: Counter[str] = Counter()
    with require_file(path, "text to exclude").open("rb") as file:
        mended = (mend(raw.decode(errors="replace"), counts).encode() for raw in read_lines(file))
        return np.unique(np.frombuffer(b"".join(side_hash(side, line) for line in mended), dtype=np.uint64))
