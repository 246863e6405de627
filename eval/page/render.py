"""The HTML page of a report, made from runs alone; it opens offline and uses no network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from eval.page import TEMPLATES, figures
from eval.page.chart import Figure
from eval.page.sweep_figures import speed_figure
from eval.run.record import Json, Run

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


def render(
    runs: Sequence[Run],
    *,
    title: str,
    benchmarks: Sequence[dict[str, Any]] = (),
    study: dict[str, Any] | None = None,
) -> str:
    """Render the page; sentences of the explorer are left out, evenly, until it fits ``MAX_BYTES``.

    ``study``: tables and figures that come first (eval/studies/page.py).
    """
    _check_names(runs)
    page = _page(runs, title, benchmarks, study)
    share = 1.0
    while len(page.encode()) > MAX_BYTES and share > 0.01:
        share /= 2
        page = _page(runs, title, benchmarks, study, share)
    return page


def _check_names(runs: Sequence[Run]) -> None:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have the same name ({', '.join(names)}); name them: NAME=FOLDER")


def _page(runs: Sequence[Run], title: str, benchmarks: Sequence[Any], study: Any, share: float = 1.0) -> str:
    comparison = [_placed(figure, "all") for figure in figures.comparison_figures(runs)]
    if benchmarks:
        comparison.append(_placed(speed_figure(benchmarks), "all"))
    described = [_describe_run(run, f"run-{number}") for number, run in enumerate(runs)]
    own = [_placed(figure, "study") for figure in study["figures"]] if study else []
    every = own + comparison + [figure for part in described for figure in part["figures"]]
    explorers = [{"name": run.name, "sentences": _explored(run, share)} for run in runs]
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
        study={"tables": study["tables"], "figures": own} if study else None,
        sections=[*([("study", "Study")] if study else []), *_sections(described, comparison, explorers, runs)],
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
    """JSON in which no text can end the script element around it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _placed(figure: Figure, place: str) -> dict[str, Any]:
    return asdict(figure) | {
        "id": f"{place}-{figure.key}",
        "choices": figure.layout.get("meta", {}).get("choices", []),
    }


def _describe_run(run: Run, key: str) -> dict[str, Any]:
    typical = []
    for label, layer in run.layers.items():
        rows = [
            [str(expert), ", ".join(f"{token} ({share:.0%})" for token, _, share in tokens) or "–"]
            for expert, tokens in enumerate(layer["typical_tokens"])
        ]
        typical.append((label, rows))
    placed = [_placed(figure, key) for figure in figures.run_figures(run)]
    return {"key": key, "name": run.name, "figures": placed, "typical": typical}


def _explored(run: Run, share: float) -> list[Any]:
    return run.listed("explorer")[:: round(1 / share)]


def _sections(described: Any, comparison: Any, explorers: Any, runs: Any) -> list[tuple[str, str]]:
    found = [("summary", "Summary")]
    if comparison:
        found.append(("figures-all", "Comparison" if len(runs) > 1 else "Quality and compute"))
    for part in described:
        if part["figures"]:
            found.append((part["key"], f"Routing: {part['name']}" if len(runs) > 1 else "Routing"))
    if explorers:
        found.append(("explorer", "Explorer"))
    if configuration(runs)["rows"]:
        found.append(("configuration", "Configuration"))
    return found


def _problems(runs: Sequence[Run]) -> list[str]:
    found = []
    for run in runs:
        own = list(run.listed("problems"))
        training = run.reported("training")
        for name in ("train_loss", "valid_loss"):
            value = training.get(name)
            if isinstance(value, float) and not math.isfinite(value):
                own.append(f"the last {name.replace('_', ' ')} is not a number: look for the update at which it broke")
        found += [f"{run.name}: {problem}" if len(runs) > 1 else problem for problem in own]
    return found


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = []
    for run in runs:
        if run.analysis is None:
            notes.append(f"{run.name}: no analysis.json, so no routing figures; run xmoe analyse.")
        elif not run.layers:
            notes.append(
                f"{run.name}: no mixture-of-experts layer; every token goes through dense feed-forward networks."
            )
    return notes


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """A table with one column per run: scores with confidence intervals, loss, size, FLOPs, speed."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.reported("scores")))
    rows = [[_metric_name(runs, name), *(_score(run, name) for run in runs)] for name in metrics]
    facts = {
        "test perplexity": lambda run: _analysed(run, "quality", "perplexity", form="{:.3f}"),
        "test loss (bits per token)": lambda run: _analysed(run, "quality", "loss_bits", form="{:.3f}"),
        "MoE FLOPs / dense FLOPs": _flops,
        "router": lambda run: _analysed(run, "checkpoint", "router"),
        "router settings": _router_settings,
        "experts x size": _experts,
        "parameters": lambda run: _analysed(run, "checkpoint", "num_parameters", form="{:,}"),
        "updates": lambda run: _analysed(run, "checkpoint", "num_updates", form="{:,}"),
        "validation loss": lambda run: _scored(run, "training", "valid_loss", form="{:.3f}"),
        "training words/s": lambda run: _scored(run, "training", "words_per_second", form="{:,.0f}"),
        "translated tokens/s": lambda run: _scored(run, "generation", "tokens_per_second", form="{:,.0f}"),
        "test sentences": lambda run: _analysed(run, "data", "sentences", form="{:,}"),
        "training pairs": lambda run: _scored(run, "data", "train_pairs", form="{:,}"),
        "routing figures are of": _routed,
    }
    for name, fact in facts.items():
        cells = [fact(run) for run in runs]
        if any(cell != "–" for cell in cells):
            rows.append([name, *cells])
    return {"headers": ["", *(run.name for run in runs)], "rows": rows + _price_rows(runs)}


def _routed(run: Run) -> str:
    """Checkpoint and set whose routing the page and report.md show."""
    path, name = run.analysed("checkpoint").get("path"), run.analysed("data").get("set")
    return f"{Path(path).name} on {name}" if path and name else "–"


def _price_rows(runs: Sequence[Run]) -> list[list[str]]:
    """What a model is worth at every price of inference that was tried, a row for each goal such as ``loss:0.01``."""
    goals = dict.fromkeys(goal for run in runs for goal in run.reported("calibrated"))
    return [[f"at the price {goal}", *(_price(run.reported("calibrated").get(goal)) for run in runs)] for goal in goals]


def _price(part: Json | None) -> str:
    if part is None:
        return "–"
    if "test" in part:  # a language model's
        quality = f"test perplexity {part['test']['perplexity']:.3f}"
    else:
        scores = part["scores"]
        quality = f"BLEU {scores['bleu']['score']:.2f}, chrF2++ {scores['chrf++']['score']:.2f}"
    return f"MoE FLOPs / dense {part['after']['flops']:.2f}: {quality}"


def _metric_name(runs: Sequence[Run], key: str) -> str:
    found = next(run.reported("scores")[key] for run in runs if key in run.reported("scores"))
    return found["name"]


def _score(run: Run, key: str) -> str:
    found = run.reported("scores").get(key)
    if found is None:
        return "–"
    interval = f" (95% interval {found['mean']:.2f} ± {found['ci95']:.2f})" if found.get("ci95") is not None else ""
    return f"{found['score']:.2f}{interval}"


def _cell(part: Json, name: str, form: str) -> str:
    value = part.get(name)
    if value is None:
        return "–"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number"
    return form.format(value)


def _analysed(run: Run, part: str, name: str, form: str = "{}") -> str:
    return _cell(run.analysed(part), name, form)


def _scored(run: Run, part: str, name: str, form: str = "{}") -> str:
    return _cell(run.reported(part), name, form)


def _flops(run: Run) -> str:
    layers = run.layers.values()
    tokens = sum(layer["tokens"] for layer in layers)
    return f"{sum(layer['flops'] * layer['tokens'] for layer in layers) / tokens:.2f}" if tokens else "–"


def _router_settings(run: Run) -> str:
    chosen = run.analysed("checkpoint").get("router_settings") or {}
    return ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None) or "–"


def _experts(run: Run) -> str:
    checkpoint = run.analysed("checkpoint")
    return f"{checkpoint['num_experts']} x {checkpoint['expert_dim']}" if checkpoint.get("num_experts") else "–"


def _signatures(runs: Sequence[Run]) -> list[str]:
    found = [
        f"{score['name']}: {score.get('bootstrap_signature') or score['signature']}"
        for run in runs
        for score in run.reported("scores").values()
    ]
    return list(dict.fromkeys(found))


def configuration(runs: Sequence[Run]) -> dict[str, Any]:
    """All settings of the runs and those that differ, without file names."""
    flat = []
    for run in runs:
        config = run.reported("config")
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
        "headers": ["setting", *(run.name for run in runs)],
        "rows": rows,
        "differing": differing if len(runs) > 1 else [],
    }
