"""Print address and size of corpora from mtdata's index; the interpreter of mtdata's own environment runs this.

Each name on standard input gives one line of name, size and address, tab-separated. Exit: 0 done, 1 a name is unknown.
"""

import sys

from mtdata.entry import DatasetId
from mtdata.index import INDEX


def size_of(entry) -> str:  # type: ignore[no-untyped-def]
    """The number of rows where the index has it (Hugging Face data sets); of most archives it has the address alone."""
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


sys.exit(main())  # mtdata's environment does not hold this project, so reports_errors is not there
