"""Write one HTML page about a run, or a comparison of runs: scores, curves, routing figures, routing explorer.

python -m eval.report runs/demo/uk-en/xmoe [MORE_RUNS...] --output report.html

A run is a folder with analysis.json (python -m eval.analyse) and, from scripts/run_pair.sh, scores.json; either may be
missing. NAME=FOLDER gives it another name. The page opens offline and asks no network for anything.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from eval.page import TEMPLATES, figures
from eval.text import files
from xmoe_fairseq.command_line import CommandParser, command_parser, reports_errors

MAX_BYTES = 10_000_000
_CONFIG_GROUPS = (
    "model",
    "task",
    "criterion",
    "optimization",
    "optimizer",
    "lr_scheduler",
    "dataset",
    "common",
)


def load_run(text: str) -> dict[str, Any]:
    """A run from ``FOLDER``, ``FILE.json`` or ``NAME=`` one of these.

    Raises: FileNotFoundError if neither analysis.json nor scores.json is there; ValueError for broken JSON.
    """
    name, place = ("", text) if Path(text).exists() or "=" not in text else text.split("=", 1)
    path = Path(place)
    folder = path if path.is_dir() else path.parent
    analysis = path if path.is_file() else folder / "analysis.json"
    scores = folder / "scores.json"
    if not path.exists() or not (analysis.is_file() or scores.is_file()):
        raise FileNotFoundError(
            f"{place}: no analysis.json and no scores.json there; "
            "run python -m eval.analyse or scripts/run_pair.sh first"
        )
    run: dict[str, Any] = {"name": name or path.resolve().name, "analysis": None, "scores": None}
    if analysis.is_file():
        run["analysis"] = files.read_json(analysis)
        if run["analysis"].get("schema") != 1:
            raise ValueError(f"{analysis}: not written by this version of eval.analyse; run it again")
    if scores.is_file() and path.is_dir():
        run["scores"] = files.read_json(scores)
    return run


def render(runs: Sequence[dict[str, Any]], *, title: str, benchmarks: Sequence[dict[str, Any]] = ()) -> str:
    """The page. Sentences of the explorer are left out, evenly, until it fits ``MAX_BYTES``."""
    _check_names(runs)
    page = _page(runs, title, benchmarks)
    share = 1.0
    while len(page.encode()) > MAX_BYTES and share > 0.01:
        share /= 2
        page = _page(runs, title, benchmarks, share)
    return page


def _check_names(runs: Sequence[dict[str, Any]]) -> None:
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have the same name ({', '.join(names)}); name them: NAME=FOLDER")


def _page(runs: Sequence[dict[str, Any]], title: str, benchmarks: Sequence[Any], share: float = 1.0) -> str:
    comparison = [_placed(figure, "all") for figure in figures.comparison_figures(runs)]
    if benchmarks:
        comparison.append(_placed(figures.speed_figure(benchmarks), "all"))
    described = [_describe_run(run, f"run-{number}") for number, run in enumerate(runs)]
    every = comparison + [figure for run in described for figure in run["figures"]]
    explorers = [{"name": run["name"], "sentences": _explored(run, share)} for run in runs]
    explorers = [found for found in explorers if found["sentences"]]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        css=_asset("style.css"),
        theme_js=_asset("theme.js"),
        explorer_js=_asset("explorer.js"),
        report_js=_asset("report.js"),
        plotly_js=get_plotlyjs().replace("</script", "<\\/script") if every else "",
        draws_figures=bool(every),
        sections=_sections(described, comparison, explorers, runs),
        problems=_problems(runs),
        summary=summary(runs),
        signatures=_signatures(runs),
        notes=_notes(runs),
        comparison=comparison,
        runs=described,
        explorer_names=[found["name"] for found in explorers],
        config=configuration(runs),
        figures_json=_embedded([{k: figure[k] for k in ("id", "traces", "layout")} for figure in every]),
        sentences_json=_embedded(explorers),
    )


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _placed(figure: figures.Figure, place: str) -> dict[str, Any]:
    return asdict(figure) | {
        "id": f"{place}-{figure.key}",
        "choices": figure.layout.get("meta", {}).get("choices", []),
    }


def _describe_run(run: dict[str, Any], key: str) -> dict[str, Any]:
    typical = []
    for label, layer in figures.layers_of(run).items():
        rows = [
            [str(expert), ", ".join(f"{token} ({share:.0%})" for token, _, share in tokens) or "–"]
            for expert, tokens in enumerate(layer["typical_tokens"])
        ]
        typical.append((label, rows))
    placed = [_placed(figure, key) for figure in figures.run_figures(run)]
    return {"key": key, "name": run["name"], "figures": placed, "typical": typical}


def _explored(run: dict[str, Any], share: float) -> list[Any]:
    sentences = (run["analysis"] or {}).get("explorer") or []
    step = round(1 / share)
    return sentences[::step]


def _sections(described: Any, comparison: Any, explorers: Any, runs: Any) -> list[tuple[str, str]]:
    found = [("summary", "Summary")]
    if comparison:
        found.append(("figures-all", "Comparison" if len(runs) > 1 else "Quality and compute"))
    for run in described:
        if run["figures"]:
            found.append((run["key"], f"Routing: {run['name']}" if len(runs) > 1 else "Routing"))
    if explorers:
        found.append(("explorer", "Explorer"))
    if configuration(runs)["rows"]:
        found.append(("configuration", "Configuration"))
    return found


def _problems(runs: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for run in runs:
        own = list((run["analysis"] or {}).get("problems") or [])
        training = (run["scores"] or {}).get("training") or {}
        for name in ("train_loss", "valid_loss"):
            value = training.get(name)
            if isinstance(value, float) and not math.isfinite(value):
                own.append(f"the last {name.replace('_', ' ')} is not a number: look for the update at which it broke")
        found += [f"{run['name']}: {problem}" if len(runs) > 1 else problem for problem in own]
    return found


def _notes(runs: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for run in runs:
        if run["analysis"] is None:
            notes.append(f"{run['name']}: no analysis.json, so no routing figures; run python -m eval.analyse.")
        elif not run["analysis"]["layers"]:
            notes.append(
                f"{run['name']}: no mixture-of-experts layer; every token goes through dense feed-forward networks."
            )
    return notes


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One column per run: scores with confidence intervals, loss, size, FLOPs, speed."""
    metrics = list(dict.fromkeys(name for run in runs for name in ((run["scores"] or {}).get("scores") or {})))
    rows = [[_metric_name(runs, name), *(_score(run, name) for run in runs)] for name in metrics]
    facts = {
        "test perplexity": lambda run: _analysed(run, "quality", "perplexity", form="{:.3f}"),
        "test loss (bits per token)": lambda run: _analysed(run, "quality", "loss_bits", form="{:.3f}"),
        "MoE FLOPs / dense FLOPs": _flops,
        "router": lambda run: _analysed(run, "checkpoint", "router"),
        "experts x size": _experts,
        "parameters": lambda run: _analysed(run, "checkpoint", "num_parameters", form="{:,}"),
        "updates": lambda run: _analysed(run, "checkpoint", "num_updates", form="{:,}"),
        "validation loss": lambda run: _scored(run, "training", "valid_loss", form="{:.3f}"),
        "training words/s": lambda run: _scored(run, "training", "words_per_second", form="{:,.0f}"),
        "translated tokens/s": lambda run: _scored(run, "generation", "tokens_per_second", form="{:,.0f}"),
        "test sentences": lambda run: _analysed(run, "data", "sentences", form="{:,}"),
    }
    for name, fact in facts.items():
        cells = [fact(run) for run in runs]
        if any(cell != "–" for cell in cells):
            rows.append([name, *cells])
    return {"headers": ["", *(run["name"] for run in runs)], "rows": rows}


def _metric_name(runs: Sequence[dict[str, Any]], key: str) -> str:
    found = next(run["scores"]["scores"][key] for run in runs if key in ((run["scores"] or {}).get("scores") or {}))
    return found["name"]


def _score(run: dict[str, Any], key: str) -> str:
    found = ((run["scores"] or {}).get("scores") or {}).get(key)
    if found is None:
        return "–"
    interval = f" (95% interval {found['mean']:.2f} ± {found['ci95']:.2f})" if found.get("ci95") is not None else ""
    return f"{found['score']:.2f}{interval}"


def _cell(part: Any, name: str, form: str) -> str:
    value = (part or {}).get(name)
    if value is None:
        return "–"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number"
    return form.format(value)


def _analysed(run: dict[str, Any], part: str, name: str, form: str = "{}") -> str:
    return _cell((run["analysis"] or {}).get(part), name, form)


def _scored(run: dict[str, Any], part: str, name: str, form: str = "{}") -> str:
    return _cell((run["scores"] or {}).get(part), name, form)


def _flops(run: dict[str, Any]) -> str:
    layers = figures.layers_of(run).values()
    tokens = sum(layer["tokens"] for layer in layers)
    return f"{sum(layer['flops'] * layer['tokens'] for layer in layers) / tokens:.2f}" if tokens else "–"


def _experts(run: dict[str, Any]) -> str:
    checkpoint = (run["analysis"] or {}).get("checkpoint") or {}
    return f"{checkpoint['num_experts']} x {checkpoint['expert_dim']}" if checkpoint.get("num_experts") else "–"


def _signatures(runs: Sequence[dict[str, Any]]) -> list[str]:
    found = [
        f"{score['name']}: {score.get('bootstrap_signature') or score['signature']}"
        for run in runs
        for score in ((run["scores"] or {}).get("scores") or {}).values()
    ]
    return list(dict.fromkeys(found))


def configuration(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every setting of the runs, and those that differ (file names left out)."""
    flat = []
    for run in runs:
        config = (run["scores"] or {}).get("config") or {}
        settings = {}
        for group in _CONFIG_GROUPS:
            part = config.get(group)
            settings |= {f"{group}.{key}": str(value) for key, value in part.items()} if isinstance(part, dict) else {}
        flat.append(settings)
    keys = sorted({key for settings in flat for key in settings})
    rows = [[key, *(settings.get(key, "–") for settings in flat)] for key in keys]
    machine = ("data", "user_dir", "save_dir", "tensorboard_logdir")
    differing = [row for row in rows if len(set(row[1:])) > 1 and row[0].split(".")[-1] not in machine]
    return {
        "headers": ["setting", *(run["name"] for run in runs)],
        "rows": rows,
        "differing": differing if len(runs) > 1 else [],
    }


def _benchmarks(path: str | None) -> list[dict[str, Any]]:
    """Timed rows of a result file of benchmarks/ that say what they compute; of several sweeps the one over FLOPs."""
    if path is None:
        return []
    rows = files.read_json(path).get("rows") or []
    rows = [row for row in rows if row.get("sweep", "flops").startswith("flops")]
    timed = [row for row in rows if row.get("flops") is not None and row.get("ms") is not None]
    if not timed:
        raise ValueError(f"{path}: no row has both flops (relative to the dense FFN) and ms; is it of benchmarks/?")
    return timed


def _parser() -> CommandParser:
    parser = command_parser("report", __doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="folder with analysis.json and scores.json, or an analysis JSON",
    )
    parser.flag("--out", old="--output", required=True, help="the HTML page to write")
    add("--title", metavar="TEXT", help="heading of the page (default: the names of the runs)")
    add("--benchmarks", metavar="JSON", help="result of benchmarks/ with flops and ms a row: wall time against FLOPs")
    return parser


@reports_errors("report")
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    files.check_writable(args.out)
    runs = [load_run(text) for text in args.runs]
    title = args.title or " and ".join(run["name"] for run in runs)
    page = render(runs, title=title, benchmarks=_benchmarks(args.benchmarks))
    files.write_text(args.out, page)
    print(f"report: {args.out}, {len(page.encode()) / 1e6:.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
