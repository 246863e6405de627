"""Every YAML of train_configs/: known settings only, the model its name promises, and fair against its neighbours."""

from __future__ import annotations

import argparse
import functools
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import models, registry, tasks
from fairseq.data import Dictionary
from fairseq.data.data_utils import collate_tokens
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import merge_with_parent
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

import xmoe_fairseq  # noqa: F401  registers the architectures and the criterions
from eval.studies.kinds import LANGUAGE_MODEL
from eval.studies.reading import load_study
from eval.table import load_paper
from xmoe_fairseq.moe import MoELayer

FOLDER = Path(__file__).parents[2] / "train_configs"
STUDIES = sorted(FOLDER.glob("studies/*.yaml"))
CONFIGS = sorted(path for path in FOLDER.glob("*/*.yaml") if path not in STUDIES)
TRANSLATION = [path for path in CONFIGS if path.parent.name in ("wmt23", "wmt23_official_recipe", "small", "demo")]
GROUPS = ("task", "model", "criterion", "optimizer", "lr_scheduler")
# Settings of the model in which files of one folder may differ, moe_* and the architecture aside.
MAY_DIFFER = {"checkpoint_activations"}
ROUTERS = {
    "xmoe": "threshold",
    "dense_as_xmoe": "threshold",
    "switch": "switch",
    "top_k": "top_k",
    "hash": "hash",
    "base": "base",
    "adamoe": "adamoe",
    "meo": "top_k",
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@functools.cache
def schema() -> DictConfig:
    return OmegaConf.structured(FairseqConfig)


@functools.cache
def composed(path: Path) -> DictConfig:
    """What fairseq-hydra-train --config-dir --config-name makes of a file, before fairseq fills in defaults.

    hydra merges the file into fairseq's schema just so, but takes half a second a file; one test compares.
    """
    return OmegaConf.merge(schema(), OmegaConf.load(path))


def composed_by_hydra(path: Path) -> DictConfig:
    GlobalHydra.instance().clear()
    hydra_init(path.stem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initialize_config_dir(config_dir=str(path.parent), version_base="1.1"):
            return compose(config_name=path.stem)


def known_settings(group: str, name: str) -> set[str]:
    """The settings of a task, model, criterion, optimiser or scheduler; those of a model are its flags."""
    if group == "model":
        parser = argparse.ArgumentParser()
        models.ARCH_MODEL_REGISTRY[name].add_args(parser)
        return {action.dest for action in parser._actions}
    registered = tasks.TASK_DATACLASS_REGISTRY
    if group != "task":
        registered = registry.REGISTRIES[group]["dataclass_registry"]
    return set(registered[name].__dataclass_fields__)


def check_settings(config: DictConfig) -> None:
    """ValueError for a setting that no code reads; the groups without a _name were checked by hydra."""
    for group, values in config.items():
        if OmegaConf.is_dict(values) and values.get("_name") and group in GROUPS:
            unknown = set(values) - known_settings(group, values._name) - {"_name"}
            if unknown:
                raise ValueError(f"{group}: unknown {sorted(unknown)}")


def filled(path: Path) -> DictConfig:
    """As `composed`, with fairseq's defaults, as its training sees it."""
    config = composed(path).copy()
    add_defaults(config)
    return config


@functools.cache
def built(path: Path, device: str = "meta") -> torch.nn.Module:
    dictionary = Dictionary()
    for number in range(32):
        dictionary.add_symbol(str(number))
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with torch.device(device):
        return models.build_model(filled(path).model, task)


def moe_layers(model: torch.nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def promised(path: Path) -> tuple[str, tuple[int, int] | None]:
    """Method, and experts and hidden units if the name tells them: ``xmoe_64x1024``."""
    method, _, sizes = path.stem.rpartition("_")
    if "x" in sizes and sizes.replace("x", "").isdigit():
        experts, hidden = map(int, sizes.split("x"))
        return method, (experts, hidden)
    return path.stem, None


def test_every_method_has_its_file_in_every_size():
    small = {"dense", "switch", "top_k", "xmoe", "hash", "base", "adamoe", "meo", "dense_as_xmoe"}
    assert {path.stem for path in (FOLDER / "demo").glob("*.yaml")} == small
    assert {path.stem for path in (FOLDER / "small").glob("*.yaml")} == small
    assert {promised(path)[0] for path in (FOLDER / "wmt23").glob("*.yaml")} == small


def test_hydra_makes_the_same_of_a_file():
    path = FOLDER / "wmt23" / "xmoe_64x1024.yaml"
    assert composed_by_hydra(path) == composed(path)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_setting_exists_and_has_the_right_type(path):
    config = composed(path)
    check_settings(config)
    for group in ("criterion", "optimizer", "lr_scheduler"):
        dataclasses = registry.REGISTRIES[group]["dataclass_registry"]
        merge_with_parent(dataclasses[config[group]._name](), config[group])


@pytest.mark.parametrize(
    "misspelt",
    [
        "common.log_intervall",
        "dataset.max_token",
        "optimization.update_frequency",
        "checkpoint.patients",
        "task.source_language",
        "model.moe_treshold",
        "model.dropuot",
        "criterion.balance_weight",
        "optimizer.adam_beta",
        "lr_scheduler.warmup",
    ],
)
def test_a_misspelt_setting_fails(tmp_path, misspelt):
    config = OmegaConf.load(FOLDER / "wmt23" / "xmoe_64x1024.yaml")
    OmegaConf.update(config, misspelt, 1)
    OmegaConf.save(config, tmp_path / "misspelt.yaml")
    with pytest.raises((ConfigKeyError, ValueError), match=misspelt.partition(".")[2]):
        check_settings(composed(tmp_path / "misspelt.yaml"))


@pytest.mark.parametrize("path", TRANSLATION, ids=name_of)
def test_the_model_is_the_one_that_the_name_promises(path):
    method, sizes = promised(path)
    model = built(path)
    layers = moe_layers(model)
    if method == "dense":
        assert layers == []
        return
    assert len(layers) == len(model.encoder.layers) // 2 + len(model.decoder.layers) // 2
    for layer in layers:
        config = layer.config
        assert config.router == ROUTERS[method]
        assert config.merge_experts == (method == "meo")
        assert config.eval_capacity_factor is None, "a translation must not depend on its batch"
        assert sizes in (None, (config.num_experts, config.expert_dim))


@pytest.mark.parametrize("folder", ["wmt23", "wmt23_official_recipe", "small", "demo"])
def test_methods_of_a_folder_have_equal_experts_and_equal_flops(folder):
    dense_dim = built(FOLDER / folder / "dense.yaml").encoder.layers[0].fc1.out_features
    parameters = {}
    for path in (FOLDER / folder).glob("*.yaml"):
        method, _ = promised(path)
        if method == "dense":
            continue
        config = moe_layers(built(path))[0].config
        rows = {
            "dense_as_xmoe": config.num_experts,
            "meo": 1,
            "adamoe": (config.top_k or 0) * config.num_experts / (config.num_experts + config.num_null_experts),
        }.get(method, config.top_k or config.capacity_factor)
        if path.stem != "meo_64x1024":  # half the FLOPs, as the file says
            assert rows * config.expert_dim == dense_dim, path
        if method == "dense_as_xmoe":
            assert (config.threshold, config.capacity_factor) == (1.0, None)
            continue
        assert config.capacity_factor == (None if method == "meo" else rows), path
        parameters[path.stem] = config.num_experts * config.expert_dim
    assert len(set(parameters.values())) == 1, parameters


@pytest.mark.parametrize("folder", ["wmt23", "wmt23_official_recipe", "small", "demo"])
def test_files_of_a_folder_differ_in_model_and_criterion_only(folder):
    dense = OmegaConf.to_container(OmegaConf.load(FOLDER / folder / "dense.yaml"))
    for path in (FOLDER / folder).glob("*.yaml"):
        config = OmegaConf.to_container(OmegaConf.load(path))
        assert {**config, "model": 0, "criterion": 0} == {**dense, "model": 0, "criterion": 0}, path
        assert shared(config["model"]) == shared(dense["model"]), path
        assert config["criterion"]["label_smoothing"] == dense["criterion"]["label_smoothing"]


@pytest.mark.parametrize(("dense", "sparse"), [("small_dense", "small"), ("wikitext103_dense", "wikitext103_xmoe")])
def test_dense_and_sparse_language_models_differ_in_the_ffn_of_moe_layers_only(dense, sparse):
    """fairseq-hydra-train would fill a stock ``transformer_lm`` with other sizes than those of the architecture."""

    def shapes(name: str) -> dict[str, torch.Size]:
        named = built(FOLDER / "lm" / f"{name}.yaml").state_dict()
        return {
            key: tensor.shape for key, tensor in named.items() if not re.search(r"layers\.\d*[13579]\.(fc|moe)", key)
        }

    assert shapes(dense) == shapes(sparse)
    model = built(FOLDER / "lm" / f"{dense}.yaml")
    assert (
        model.decoder.layers[0].activation_fn is built(FOLDER / "lm" / f"{sparse}.yaml").decoder.layers[0].activation_fn
    )
    assert model.decoder.layers[1].fc1.out_features == model.decoder.layers[0].fc1.out_features


@pytest.mark.parametrize("path", sorted((FOLDER / "wmt23_official_recipe").glob("*.yaml")), ids=name_of)
def test_the_official_recipe_is_that_of_its_readme_with_our_models(path):
    config, ours = OmegaConf.load(path), OmegaConf.load(FOLDER / "wmt23" / path.name)
    assert config.dataset.max_tokens * config.optimization.update_freq[0] * 4 == 16384 * 32 * 2
    assert (config.model.dropout, config.lr_scheduler.warmup_updates, config.optimizer.weight_decay) == (0.3, 512, 1e-4)
    assert {config[group][f"max_{side}_positions"] for group in ("task", "model") for side in ("source", "target")} == {
        256
    }
    assert (config.checkpoint.best_checkpoint_metric, config.task.eval_bleu_remove_bpe) == ("bleu", "sentencepiece")
    assert config.checkpoint.maximize_best_checkpoint_metric
    same = {name: value for name, value in config.model.items() if "positions" not in name and name != "dropout"}
    assert same == {name: value for name, value in ours.model.items() if name != "dropout"}
    assert config.criterion == ours.criterion


@pytest.mark.parametrize("path", sorted((FOLDER / "wmt23").glob("*.yaml")), ids=name_of)
def test_wmt23_trains_under_bfloat16_autocast(path):
    common = OmegaConf.load(path).common
    assert (common.amp, common.bf16) == (True, True)


def shared(model: dict) -> dict:
    return {
        name: value
        for name, value in model.items()
        if not name.startswith(("moe_", "_name")) and name not in MAY_DIFFER
    }


@pytest.mark.parametrize("path", sorted((FOLDER / "demo").glob("*.yaml")), ids=name_of)
def test_every_parameter_gets_a_gradient(path):
    """torch's DistributedDataParallel, fairseq's default on several GPUs, stops where one gets none."""
    torch.manual_seed(0)
    model = built(path, device="cpu")
    dictionary = model.decoder.dictionary
    config = filled(path).criterion
    config.sentence_avg = False
    task = SimpleNamespace(target_dictionary=dictionary)
    criterion = registry.REGISTRIES["criterion"]["registry"][config._name].build_criterion(config, task)
    rows = [torch.randint(4, len(dictionary), (length,)) for length in (3, 9, 12, 5)]
    tokens = collate_tokens(rows, dictionary.pad())
    lengths = torch.tensor([len(row) for row in rows])
    sample = {
        "net_input": {"src_tokens": tokens, "src_lengths": lengths, "prev_output_tokens": tokens},
        "target": tokens,
        "ntokens": int(lengths.sum()),
    }
    criterion(model.train(), sample)[0].backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("path", STUDIES, ids=name_of)
def test_studies_name_configurations_and_settings_that_exist(path):
    experts, study = set(), load_study(path)
    paper = load_paper("table1" if study.kind is LANGUAGE_MODEL else "table3")
    for method in study.methods:
        config = OmegaConf.merge(composed(Path(method.config)), OmegaConf.from_dotlist(list(method.settings)))
        check_settings(config)
        assert method.paper in {None, *(row["id"] for row in paper["methods"])}
        as_xmoe = config.model.get("moe_threshold") == 1.0 and config.model.get("moe_num_experts", 1) > 1
        if "moe_num_experts" in config.model and not as_xmoe:  # that is the dense model, cut
            experts.add(config.model.moe_num_experts * config.model.moe_expert_dim)
    assert len(experts) <= 1  # the paper's comparison: equal parameters of experts; wmt23's are the architectures'
