"""`PSTConfig`: what it refuses and in which words, what it writes, and its defaults."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftConfig, PeftType

from peft_pst import PSTConfig
from peft_pst.config import PSTPeftType

REFUSALS = [
    ({"target_sparsity": 1.0}, "target_sparsity=1.0 is outside [0, 1); 0.9 means that nine of ten weights are zero."),
    ({"target_sparsity": -0.1}, "target_sparsity=-0.1 is outside [0, 1); 0.9 means that nine of ten weights are zero."),
    ({"target_sparsity": 90}, "target_sparsity=90 is outside [0, 1); 0.9 means that nine of ten weights are zero."),
    (
        {"target_sparsity": math.nan},
        "target_sparsity=nan is outside [0, 1); 0.9 means that nine of ten weights are zero.",
    ),
    (
        {"target_sparsity": "0.9"},
        "target_sparsity='0.9' is outside [0, 1); 0.9 means that nine of ten weights are zero.",
    ),
    (
        {"target_sparsity": False},
        "target_sparsity=False is outside [0, 1); 0.9 means that nine of ten weights are zero.",
    ),
    (
        {"initial_sparsity": 1.2},
        "initial_sparsity=1.2 is outside [0, 1); 0.9 means that nine of ten weights are zero.",
    ),
    (
        {"initial_sparsity": 0.6, "target_sparsity": 0.5},
        "initial_sparsity=0.6 is above target_sparsity=0.5; a schedule only prunes further. Lower the initial or raise "
        "the target sparsity.",
    ),
    (
        {"initial_sparsity": 0.6, "sparsity_pattern": {"query": 0.3}},
        "initial_sparsity=0.6 is above sparsity_pattern['query']=0.3; a schedule only prunes further. Lower the "
        "initial or raise the target sparsity.",
    ),
    (
        {"sparsity_pattern": {"query": 1}},
        "sparsity_pattern['query']=1 is outside [0, 1); 0.9 means that nine of ten weights are zero.",
    ),
    ({"r": -1}, "r=-1 is not a rank; pass an integer of at least 0."),
    ({"r": 2.0}, "r=2.0 is not a rank; pass an integer of at least 0."),
    ({"r": True}, "r=True is not a rank; pass an integer of at least 0."),
    ({"score_rank": -3}, "score_rank=-3 is not a rank; pass an integer of at least 0."),
    ({"rank_pattern": {"key": -1}}, "rank_pattern['key']=-1 is not a rank; pass an integer of at least 0."),
    (
        {"score_rank_pattern": {"key": 1.5}},
        "score_rank_pattern['key']=1.5 is not a rank; pass an integer of at least 0.",
    ),
    ({"residual": -1}, "residual=-1 is not a number of entries; pass an integer of at least 0."),
    ({"residual": 0.01}, "residual=0.01 is not a number of entries; pass an integer of at least 0."),
    (
        {"residual_pattern": {"key": None}},
        "residual_pattern['key']=None is not a number of entries; pass an integer of at least 0.",
    ),
    (
        {"residual": 4, "residual_positions": "largest"},
        'residual_positions=\'largest\' is none of "grebsmo", "magnitude" and "random".',
    ),
    (
        {"residual_positions": "random"},
        "residual_positions='random' has nothing to place, because residual=0; set residual to the number of entries, "
        "or leave residual_positions out.",
    ),
    (
        {"r": 0, "score_rank": 0, "structured": False},
        "r=0, residual=0, score_rank=0 and structured=False leave nothing to train; switch on at least one of the four "
        "parts.",
    ),
    ({"beta": 0.0}, "beta=0 switches a part off that would still take memory; set r=0 instead."),
    ({"alpha1": 0}, "alpha1=0 switches a part off that would still take memory; set score_rank=0 instead."),
    ({"alpha2": 0}, "alpha2=0 switches a part off that would still take memory; set structured=False instead."),
    ({"beta": math.inf}, "beta=inf is not a finite number; 1.0 is the paper's value."),
    ({"alpha1": None}, "alpha1=None is not a finite number; 1.0 is the paper's value."),
    (
        {"r": 0, "beta": 2.0},
        "beta=2.0 has nothing to scale, because r=0; leave it at 1.0 or switch the part on.",
    ),
    (
        {"score_rank": 0, "alpha1": 0.5},
        "alpha1=0.5 has nothing to scale, because score_rank=0; leave it at 1.0 or switch the part on.",
    ),
    (
        {"structured": False, "alpha2": 0.0},
        "alpha2=0.0 has nothing to scale, because structured=False; leave it at 1.0 or switch the part on.",
    ),
    ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1 is outside [0, 1]; it is a share of the training steps."),
    ({"cooldown_ratio": 30}, "cooldown_ratio=30 is outside [0, 1]; it is a share of the training steps."),
    (
        {"warmup_ratio": 0.8},
        "warmup_ratio=0.8 and cooldown_ratio=0.3 sum to more than 1; leave room for the ramp between them.",
    ),
    ({"total_steps": 0}, "total_steps=0 is not a number of steps; pass an integer of at least 1, or None."),
    ({"total_steps": 10.0}, "total_steps=10.0 is not a number of steps; pass an integer of at least 1, or None."),
    ({"init_weights": "gaussian"}, 'init_weights=\'gaussian\' is none of True, False, "fan_in" and "paper".'),
    ({"bias": "lora_only"}, 'bias=\'lora_only\' is none of "none", "all" and "pst_only".'),
    (
        {"layers_pattern": "layer"},
        "layers_pattern='layer' says where blocks are counted, but layers_to_transform is None; set "
        "layers_to_transform to the blocks to adapt.",
    ),
    (
        {"target_modules": ".*query", "layers_to_transform": [0]},
        "layers_to_transform=[0] cannot be combined with target_modules='.*query', a pattern; name the blocks in the "
        "pattern or pass target_modules as a list.",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS, ids=[str(options) for options, _ in REFUSALS])
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in full below
        PSTConfig(**options)
    assert str(caught.value) == message


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="density"):
        PSTConfig(density=0.1)


def test_defaults() -> None:
    config = PSTConfig()
    defaults = {
        "target_sparsity": 0.9,
        "initial_sparsity": 0.0,
        "r": 8,
        "score_rank": 8,
        "structured": True,
        "residual": 0,
        "residual_positions": "grebsmo",
        "beta": 1.0,
        "alpha1": 1.0,
        "alpha2": 1.0,
        "warmup_ratio": 0.1,
        "cooldown_ratio": 0.3,
        "total_steps": None,
        "init_weights": True,
        "target_modules": None,
        "bias": "none",
    }
    assert {name: getattr(config, name) for name in defaults} == defaults
    assert config.peft_type == PSTPeftType.PST == "PST"


def test_the_type_is_none_of_pefts_own() -> None:
    assert "PST" not in {member.value for member in PeftType}
    assert PSTPeftType("PST") is PSTPeftType.PST


@pytest.mark.parametrize(
    "options",
    [
        {"target_sparsity": 0, "initial_sparsity": 0},
        {"initial_sparsity": 0.9},
        {"r": 0},
        {"r": 0, "rank_pattern": {"query": 4}, "beta": 0.5},
        {"score_rank": 0, "structured": False},
        {"warmup_ratio": 0.7, "cooldown_ratio": 0.3},
        {"warmup_ratio": 0, "cooldown_ratio": 0},
        {"alpha1": -1.0, "beta": 1},
        {"r": 0, "score_rank": 0, "structured": False, "residual": 64},
        {"residual_pattern": {"query": 8}, "residual_positions": "magnitude"},
        {"layers_to_transform": 0},
        {"init_weights": False},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_accepted(options: dict[str, object]) -> None:
    config = PSTConfig(**options)
    for name, value in options.items():
        assert getattr(config, name) == value


def test_the_papers_setting() -> None:
    config = PSTConfig.paper()
    paper = (0.9, 0.0, 8, 8, True, 1.0, 1.0, 1.0, 0.1, 0.3, "paper")
    names = "target_sparsity initial_sparsity r score_rank structured beta alpha1 alpha2 warmup_ratio cooldown_ratio"
    assert tuple(getattr(config, name) for name in [*names.split(), "init_weights"]) == paper
    changed = PSTConfig.paper(target_sparsity=0.5, task_type="SEQ_CLS")
    assert (changed.target_sparsity, changed.task_type, changed.init_weights) == (0.5, "SEQ_CLS", "paper")
    with pytest.raises(ValueError, match="target_sparsity=2 is outside"):
        PSTConfig.paper(target_sparsity=2)


RICH = {
    "target_sparsity": 0.75,
    "initial_sparsity": 0.25,
    "r": 3,
    "score_rank": 0,
    "beta": 0.5,
    "total_steps": 1000,
    "init_weights": "paper",
    "target_modules": ["value", "query"],
    "exclude_modules": ["key"],
    "modules_to_save": ["classifier"],
    "bias": "pst_only",
    "sparsity_pattern": {"query": 0.5},
    "rank_pattern": {"query": 4},
    "score_rank_pattern": {"value": 0},
    "residual": 16,
    "residual_positions": "random",
    "residual_pattern": {"value": 8},
    "task_type": "SEQ_CLS",
}


@pytest.mark.parametrize("options", [{}, RICH], ids=["defaults", "everything"])
def test_json_is_stable(tmp_path: Path, options: dict[str, object]) -> None:
    config = PSTConfig(**options)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is PSTConfig
    for field in dataclasses.fields(PSTConfig):
        if field.name not in ("inference_mode", "peft_version"):
            assert getattr(loaded, field.name) == getattr(config, field.name), field.name
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    unordered = ("target_modules", "exclude_modules")
    assert {name: value for name, value in again.items() if name not in unordered} == {
        name: value for name, value in written.items() if name not in unordered
    }
    for name in unordered:
        assert sorted(again[name] or []) == sorted(written[name] or [])


@given(
    target=st.integers(0, 10**4 - 1).map(lambda n: n / 10**4),
    other=st.integers(0, 10**4 - 1).map(lambda n: n / 10**4),
    r=st.integers(0, 64),
    ratio=st.integers(0, 100).map(lambda n: n / 100),
)
def test_what_is_accepted_survives_json(target: float, other: float, r: int, ratio: float) -> None:
    config = PSTConfig(
        target_sparsity=max(target, other),
        initial_sparsity=min(target, other),
        r=r,
        warmup_ratio=ratio,
        cooldown_ratio=0,
    )
    state = json.loads(json.dumps(config.to_dict()))
    assert PSTConfig(**{name: value for name, value in state.items() if name != "peft_type"}) == config


def test_every_field_says_what_it_does() -> None:
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(PSTConfig) if field.name not in inherited]
    assert len(own) > 15
    for field in own:
        assert field.metadata["help"].endswith("."), field.name
        assert f"\n        {field.name}: " in PSTConfig.__doc__, field.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sparsity_pattern": ["up"]},
            r"sparsity_pattern=\['up'\] is not a dict; pass \{module name or pattern: value\}",
        ),
        ({"rank_pattern": 3}, "rank_pattern=3 is not a dict"),
        ({"residual_pattern": [8]}, r"residual_pattern=\[8\] is not a dict"),
        ({"score_rank_pattern": "up"}, "score_rank_pattern='up' is not a dict"),
        ({"structured": "yes"}, "structured='yes' is neither True nor False"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out=1 is neither True nor False"),
        ({"modules_to_save": "head"}, "modules_to_save='head' is no list of names; pass a list"),
        ({"target_modules": [["up"]]}, r"target_modules=\[\['up'\]\] is neither a list of module names nor"),
        ({"exclude_modules": 3}, "exclude_modules=3 is neither a list of module names nor a regular expression"),
        ({"target_modules": "up("}, r"target_modules: 'up\(' is no regular expression"),
        ({"rank_pattern": {"(": 3}}, r"a key of rank_pattern: '\(' is no regular expression"),
        ({"format_version": 2}, "format_version=2 is later than 1.*upgrade"),
        ({"format_version": 0}, "format_version=0 is no version of the adapter's layout"),
        ({"layers_to_transform": -1}, "layers_to_transform=-1 holds -1; blocks are counted from 0"),
        ({"layers_to_transform": [0, "1"]}, "holds '1'; blocks are counted from 0"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PSTConfig(**options)


def test_patterns_may_be_none() -> None:
    config = PSTConfig(sparsity_pattern=None, rank_pattern=None, residual_pattern=None, score_rank_pattern=None)
    patterns = ("sparsity_pattern", "rank_pattern", "residual_pattern", "score_rank_pattern")
    assert all(getattr(config, name) == {} for name in patterns)
