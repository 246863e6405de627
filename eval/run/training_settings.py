"""Answer a script's questions about the settings of a training; one command for each question.

``overrides`` prints KEY=VALUE words quoted for hydra, ``signature`` the settings that decide the trained model,
``limits`` the positions and tokens that they allow, and ``check`` compares them with the settings that a training keeps
in CHECKPOINTS/settings.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eval.run.hydra_settings import limits, parse_override, quoted, read_settings
from eval.run.resume import OtherTraining, Training, signature
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors


def _check(args: argparse.Namespace) -> int:
    settings, facts = read_settings(args.config, args.set), dict(fact.split("=", 1) for fact in args.fact)
    training = Training(args.save_dir)
    try:
        changed = training.check(settings, facts)
    except OtherTraining as other:
        where = "an unknown update" if other.updates is None else f"update {other.updates}"
        print(f"the training in {args.save_dir}, at {where}, was begun with other settings:", file=sys.stderr)
        for line in other.differences:
            print(f"  {line}", file=sys.stderr)
        return 2
    if args.write:
        training.write(settings, facts)
    for line in changed:
        print(f"continues with {line}", file=sys.stderr)
    if args.state:
        state = "done" if training.is_done(settings) else "continue" if training.is_begun else "fresh"
        print(state, "?" if training.updates is None else training.updates)
    return 0


def _parser() -> CommandParser:
    parser = command_parser("training_settings", __doc__, prog="python -m eval.run.training_settings")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("overrides", help="print words quoted for hydra, one a line")
    sub.add_argument("--text", action="append", default=[], metavar="KEY=TEXT", help="TEXT is taken literally")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="VALUE as hydra reads it")
    for name, what in {
        "signature": "print the settings that decide the trained model",
        "limits": "print the most source and target positions, and the tokens of a batch (0: no limit)",
        "check": "exit 2 and name what differs if the training in DIR cannot be continued",
    }.items():
        sub = commands.add_parser(name, help=what)
        sub.add_argument("--config", required=True, metavar="YAML", help="a file of train_configs/")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes one setting of it")
    sub.add_argument("--save-dir", required=True, metavar="DIR", help="folder of the training's checkpoints")
    sub.add_argument("--fact", action="append", default=[], metavar="NAME=VALUE", help="what else must not change")
    sub.add_argument("--state", action="store_true", help="print fresh, continue N or done N (N updates)")
    sub.add_argument("--write", action="store_true", help="note the settings in DIR/settings.json")
    return parser


@reports_errors("training_settings")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.command == "check":
        return _check(args)
    if args.command == "overrides":
        for text in args.text:
            key, _, value = text.partition("=")
            print(f"++{key}={quoted(value)}")
        for override in args.set:
            print(f"++{parse_override(override)[2]}")
        return 0
    settings = read_settings(args.config, args.set)
    if args.command == "signature":
        print("\n".join(signature(settings)))
    else:
        print(*limits(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
