"""The lengths of lines in fairseq's binary data, from its index files alone, without the seconds of its import."""

import struct
from pathlib import Path

import numpy as np

from data_prep.textio import DataError

# fairseq.data.indexed_dataset.MMapIndexedDataset: this mark with version 1, a byte for the type of the numbers in the
# .bin file, the number of lines, and each line's length as int32.
_MARK = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
_HEADER = struct.Struct(f"<{len(_MARK)}sBQ")


def line_lengths(prefix: Path) -> np.ndarray:
    """Subwords of each line of ``PREFIX.idx``, end mark included, (lines,) int32.

    Raises: FileNotFoundError if ``.idx`` or ``.bin`` is missing; DataError if it is no index of fairseq-preprocess.
    """
    index = Path(f"{prefix}.idx")
    for file in (index, Path(f"{prefix}.bin")):
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}; it is written by fairseq-preprocess")
    data = index.read_bytes()
    if len(data) < _HEADER.size or not data.startswith(_MARK):
        raise DataError(f"{index}: not an index of fairseq-preprocess --dataset-impl mmap; binarise the text again")
    lines = _HEADER.unpack_from(data)[2]
    if len(data) < _HEADER.size + 4 * lines:
        raise DataError(f"{index}: ends before its {lines} lines do; binarise the text again")
    return np.frombuffer(data, dtype="<i4", count=lines, offset=_HEADER.size)
