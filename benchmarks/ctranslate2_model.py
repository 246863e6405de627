"""CTranslate2's int8 of the dense model, timed like fairseq-generate: the record for dense models on a CPU.

    python -m benchmarks.ctranslate2_model --checkpoint DENSE.pt --data DATA_BIN --beam 5 --batch-size 64 --length 24

CTranslate2 is in no requirements file: pip install ctranslate2. Prints one line of JSON. Loading and converting are
left out of the time; the model is converted once, beside the checkpoint.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import xmoe_fairseq  # noqa: F401  lets the checkpoint load safely
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors


def converted(checkpoint: Path, data: Path, quantization: str) -> Path:
    """CTranslate2's folder of a fairseq checkpoint."""
    from ctranslate2.converters import FairseqConverter

    folder = checkpoint.with_suffix(f".ctranslate2-{quantization}")
    if not folder.exists():
        FairseqConverter(str(checkpoint), str(data), source_lang="xx", target_lang="yy").convert(
            str(folder), quantization=quantization
        )
    return folder


def _parser() -> CommandParser:
    parser = command_parser("ctranslate2_model", __doc__, prog="python -m benchmarks.ctranslate2_model")
    parser.flag("--checkpoint", type=Path, required=True, help="a dense model")
    parser.flag("--data", type=Path, required=True)
    parser.add_argument("--quantization", default="int8", help="CTranslate2's name of it (default int8)")
    parser.flag("--beam", default=5)
    parser.flag("--batch-size", default=64)
    parser.add_argument("--length", type=int, default=24, help="tokens of every translation (default 24)")
    parser.add_argument("--sentences", type=int, help="translate only the first N sentences of the test set")
    return parser


@reports_errors("ctranslate2_model")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        import ctranslate2
    except ImportError:
        raise ValueError("ctranslate2 is not installed; pip install ctranslate2") from None
    folder = converted(options.checkpoint, options.data, options.quantization)
    lines = (options.data.parent / "test.xx").read_text().splitlines()[: options.sentences]
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    translator = ctranslate2.Translator(str(folder), inter_threads=1, intra_threads=threads)
    start = time.perf_counter()
    results = translator.translate_batch(
        [line.split() for line in lines],
        beam_size=options.beam,
        max_batch_size=options.batch_size,
        min_decoding_length=options.length,
        max_decoding_length=options.length,
    )
    seconds = time.perf_counter() - start
    tokens = sum(len(result.hypotheses[0]) for result in results)
    size = sum(file.stat().st_size for file in folder.iterdir())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {"sentences": len(results) / seconds, "tokens": tokens / seconds, "memory": memory, "bytes": size}
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
