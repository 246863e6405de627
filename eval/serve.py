"""Try a model in the browser: type a sentence, see its translation and the experts of every token.

xmoe serve --checkpoint runs/demo/uk-en/xmoe/checkpoints/averaged.pt

Only this machine can open the page unless --host says otherwise. The server is Python's own. It needs no package and
no network, and it bounds the size and the rate of requests.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fairseq.data.data_utils import infer_language_pair

from eval.page.server import Page, Server
from eval.text.translator import Translator, TranslatorConfig
from xmoe_fairseq.command_line import CommandParser, command_parser, parse_overrides, reports_errors


def _parser() -> CommandParser:
    parser = command_parser("serve", __doc__)
    flag, add = parser.flag, parser.add_argument
    flag("--checkpoint", required=True, help="the model; of xmoe run: OUT/checkpoints/averaged.pt")
    flag("--data", help="folder of fairseq-preprocess (default: data-bin beside the checkpoint's folder)")
    flag("--subwords", help="subword folder or model (default: subwords beside the checkpoint's folder)")
    flag("--source-lang", help="default: that of the data")
    flag("--target-lang", help="default: that of the data")
    user_dir = str(Path(__file__).resolve().parents[1] / "xmoe_fairseq")
    flag("--user-dir", default=user_dir, help="package with the model (default: xmoe_fairseq)")
    flag("--beam", default=5)
    add("--max-length", type=int, default=200, metavar="N", help="longest sentence in subwords (default 200)")
    flag("--model-overrides", default="{}")
    listen = "address to listen on; any but the default lets others in (default 127.0.0.1)"
    add("--host", default="127.0.0.1", help=listen)
    add("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    add("--requests-per-minute", type=int, default=60, metavar="N", help="of all clients together (default 60)")
    parser.device_flag()
    return parser


def build_page(args: argparse.Namespace) -> Page:
    """Load the model. Raises: FileNotFoundError or ValueError, which name what is missing."""
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"--checkpoint: no such file: {checkpoint}")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port ({args.port}) must be from 0 to 65535")
    if args.requests_per_minute < 1:
        raise ValueError(f"--requests-per-minute ({args.requests_per_minute}) must be at least 1")
    run = checkpoint.resolve().parent.parent
    data = Path(args.data) if args.data else run / "data-bin"
    subwords = Path(args.subwords) if args.subwords else run / "subwords"
    for flag, place in (("--data", data), ("--subwords", subwords)):
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist; say where it is with {flag}")
    source, target = args.source_lang, args.target_lang
    if not (source and target):
        found = infer_language_pair(str(data))
        source, target = source or found[0], target or found[1]
        if not (source and target):
            raise ValueError(f"{data} does not tell the languages; give --source-lang and --target-lang")
    config = TranslatorConfig(
        paths=[str(checkpoint)],
        data=str(data),
        source_lang=source,
        target_lang=target,
        subwords=str(subwords),
        user_dir=args.user_dir,
        beam=args.beam,
        max_length=args.max_length,
        split_long=False,
        model_overrides=parse_overrides(args.model_overrides),
        device=args.device,
    )
    return Page(Translator(config), requests_per_minute=args.requests_per_minute)


@reports_errors("serve")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", force=True)
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    page = build_page(args)
    try:
        server = Server((args.host, args.port), page)
    except OSError as error:
        way_out = "choose another --port (0 takes a free one) or --host"
        raise ValueError(f"cannot listen on {args.host}:{args.port}: {error.strerror}; {way_out}") from None
    host, port = (f"[{part}]" if ":" in str(part) else part for part in server.server_address[:2])
    if not server.is_local:
        print(f"serve: warning: {args.host} is open to other machines; there is no password", file=sys.stderr)
    print(f"serve: open http://{host}:{port} (Ctrl-C ends)", file=sys.stderr, flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
