"""The two kinds of study, translation models and language models: what a cell is, and what its scores.json says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

COSTS = {
    "moe_flops_inference": "MoE FLOPs / dense, inference",
    "moe_flops_training": "MoE FLOPs / dense, training",
    "mflops_inference": "MFLOPs a token, inference",
    "mflops_training": "MFLOPs a token, training",
}
_DEV_LOSS = {"dev_loss": ("validation loss, bits", False)}


@dataclass(frozen=True)
class Kind:
    """What differs between studies of translation models and of language models.

    Attributes:
        script: below scripts/; a cell is a run of it.
        measures: name -> what it is, and whether more is better; methods are tested and ranked by them.
        further: name -> what it is; shown beside the measures.
        cell_flags: flags of the script that a study may give to all cells; those of the data are the same for both.
        figures: one cell from its scores.json. Raises: KeyError.
        speeds: what depends on time and place, from the same.
        token: what FLOPs are counted for; words: what the speed of training counts.
    """

    name: str
    script: str
    measures: Mapping[str, tuple[str, bool]]
    further: Mapping[str, str]
    cell_flags: tuple[str, ...]
    figures: Callable[[dict[str, Any]], dict[str, Any]]
    speeds: Callable[[dict[str, Any]], dict[str, Any]]
    token: str
    words: str

    @property
    def columns(self) -> dict[str, str]:
        """Name -> title of the measures and of what is shown beside them."""
        return {**{name: title for name, (title, _) in self.measures.items()}, **self.further}


def _costs(report: dict[str, Any], inference: float) -> dict[str, float]:
    """FLOPs of the MoE layers relative to dense FFNs, and MFLOPs a token; ``inference``: the former, as measured."""
    per_token = report["flops_per_token"]
    training = report["routing"]["train"]["overall"].get("flops", 1.0)
    forward = {
        name: per_token["shared"] + per_token["moe_as_dense"] * share
        for name, share in (("inference", inference), ("training", training))
    }
    return {
        "moe_flops_inference": inference,
        "moe_flops_training": training,
        "mflops_inference": forward["inference"] / 1e6,
        "mflops_training": 3 * forward["training"] / 1e6,  # the backward pass costs two forward passes
    }


def _price(part: dict[str, Any], per_token: dict[str, float], quality: dict[str, float | None]) -> dict[str, Any]:
    after = part["after"]
    return {
        "moe_threshold": after["moe_threshold"],
        "moe_max_experts": after["moe_max_experts"],
        "dev_loss_before": part["before"]["loss_bits"],
        "dev_loss": after["loss_bits"],
        "moe_flops": after["flops"],
        "mflops": (per_token["shared"] + per_token["moe_as_dense"] * after["flops"]) / 1e6,
        "experts": after["experts"],
        **quality,
    }


def _of_translation(report: dict[str, Any]) -> dict[str, Any]:
    valid, per_token = report["evaluation"]["valid"], report["flops_per_token"]
    metrics = ("bleu", "chrf++")
    prices = {
        goal: _price(part, per_token, {metric: part["scores"][metric]["score"] for metric in metrics})
        for goal, part in report["calibrated"].items()
    }
    return {
        "dev_loss": valid["loss_bits"],
        "dev_loss_in_training": report["training"]["best_valid_nll_loss"],
        **{metric: report["scores"][metric]["score"] for metric in metrics},
        **_costs(report, 1.0 if valid["flops"] is None else valid["flops"]),
        "experts_inference": valid["experts"],
        "parameters": report["num_parameters"],
        "updates": report["training"]["updates"],
        "prices": prices,
        "signatures": {metric: report["scores"][metric]["signature"] for metric in metrics},
        "translations_sha256": report["hypotheses"]["sha256"],
        "commit": report["commit"],
        "versions": report["versions"],
    }


def _of_language_model(report: dict[str, Any]) -> dict[str, Any]:
    evaluation, per_token = report["evaluation"], report["flops_per_token"]
    valid, test = evaluation["valid"], evaluation["test"]
    measured = ("perplexity", "word_perplexity", "bits_per_byte")
    prices = {
        goal: _price(part, per_token, {name: part["test"][name] for name in measured})
        for goal, part in report["calibrated"].items()
    }
    return {
        "dev_loss": valid["loss_bits"],
        **{name: test[name] for name in measured},
        **_costs(report, 1.0 if valid["flops"] is None else valid["flops"]),
        "experts_inference": valid["experts"],
        "parameters": report["num_parameters"],
        "updates": report["training"]["updates"],
        "prices": prices,
        "sweep": _swept(valid["sweep"], test["sweep"], per_token),
        "commit": report["commit"],
        "versions": report["versions"],
    }


def _swept(valid: list[dict[str, float]], test: list[dict[str, float]], per_token: dict[str, float]) -> list[Any]:
    """A point for each threshold; FLOPs and experts are those of the validation set."""
    return [
        {
            "threshold": point["threshold"],
            "dev_loss": point["loss_bits"],
            "dev_perplexity": point["perplexity"],
            "perplexity": tested["perplexity"],
            "moe_flops": point["flops"],
            "mflops": (per_token["shared"] + per_token["moe_as_dense"] * point["flops"]) / 1e6,
            "experts": point["experts"],
        }
        for point, tested in zip(valid, test, strict=True)
    ]


def _training_speed(report: dict[str, Any]) -> dict[str, Any]:
    training = report["training"]
    return {
        "training_words_per_second": training["words_per_second"],
        "training_seconds": training["seconds"],
    }


def _translation_speed(report: dict[str, Any]) -> dict[str, Any]:
    return {
        **_training_speed(report),
        "translated_tokens_per_second": report["generation"]["tokens_per_second"],
    }


TRANSLATION = Kind(
    name="translation",
    script="run_pair.sh",
    measures={**_DEV_LOSS, "bleu": ("BLEU", True), "chrf++": ("chrF2++", True)},
    further={},
    cell_flags=("average", "beam", "lenpen", "max-tokens", "device", "launcher", "user-dir"),
    figures=_of_translation,
    speeds=_translation_speed,
    token="one source and one target token",
    words="words of the target side",
)
LANGUAGE_MODEL = Kind(
    name="language model",
    script="run_lm.sh",
    measures={**_DEV_LOSS, "perplexity": ("test perplexity", False)},
    further={"word_perplexity": "test perplexity a word", "bits_per_byte": "test bits a byte"},
    cell_flags=("average", "max-tokens", "device", "launcher", "user-dir"),
    figures=_of_language_model,
    speeds=_training_speed,
    token="one token",
    words="tokens",
)
KINDS = {kind.name: kind for kind in (TRANSLATION, LANGUAGE_MODEL)}


def kind_of(study: dict[str, Any]) -> Kind:
    """The kind of the content of a study.json; without the key it is of translation models."""
    return KINDS[study.get("kind", TRANSLATION.name)]
