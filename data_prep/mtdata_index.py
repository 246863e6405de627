"""Print address and size of corpora as mtdata's index has them; run by the interpreter of mtdata's own environment.

A line for each corpus on standard input: name, size, address, tab-separated. Exit: 0 done, 1 a name is unknown.
"""

import sys

from mtdata.entry import DatasetId
from mtdata.index import INDEX


def size_of(entry) -> str:  # type: ignore[no-untyped-def]
    """Rows, where the index says so (Hugging Face data sets); most archives it knows by their address alone."""
    rows = ((entry.meta or {}).get("datasetsServerInfo") or {}).get("numRows")
    return f"{rows} rows" if rows else "size not in the index"


def main() -> int:
    unknown = []
    for name in sys.stdin.read().split():
        corpus = DatasetId.parse(name)
        if corpus not in INDEX:
            unknown.append(name)
            continue
        entry = INDEX[corpus]
        addresses = entry.url if isinstance(entry.url, str) else " ".join(entry.url)
        print(name, size_of(entry), addresses, sep="\t")
    for name in unknown:
        print(f"mtdata_index: error: {name}: not in the index of mtdata", file=sys.stderr)
    return 1 if unknown else 0


sys.exit(main())  # no module of the project: nothing imports it
