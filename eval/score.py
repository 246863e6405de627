"""Score translations with sacreBLEU: BLEU and chrF2++ with the paper's settings, chrF2 and TER.

xmoe score --hypotheses FILE --references FILE [FILE ...] --target-lang en --out scores.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eval.text import files, metrics
from eval.text.scoring import format_table, score_files
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors
from xmoe_fairseq.files import keep_inputs


def _parser() -> CommandParser:
    parser = command_parser("score", __doc__)
    flag, add = parser.flag, parser.add_argument
    flag("--hypotheses", required=True)
    flag("--references", required=True, nargs="+")
    tokenizers = "chooses BLEU's tokenizer: zh, ja-mecab, ko-mecab, else 13a"
    flag("--target-lang", old="--target-language", required=True, help=tokenizers)
    add("--metrics", nargs="+", choices=metrics.METRICS, default=list(metrics.METRICS))
    add(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="resamples for confidence intervals; 0: none (default 1000)",
    )
    flag("--seed", help="seed of the resampling (default: SACREBLEU_SEED, else 12345)")
    add("--test-set", metavar="NAME", help="what the references are, e.g. flores200.devtest; kept in the JSON")
    flag("--out", old="--json", help="a JSON of all figures, unrounded")
    return parser


@reports_errors("score")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.out:
        keep_inputs(args.out, args.hypotheses, *args.references)
        files.check_writable(args.out)
    report = score_files(
        args.hypotheses,
        args.references,
        target_language=args.target_lang,
        names=args.metrics,
        bootstrap=args.bootstrap,
        seed=args.seed,
    )
    report["test_set"] = args.test_set
    if args.out:
        files.write_json(args.out, report)
    print(format_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
