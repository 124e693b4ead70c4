"""`PSTConfig`: what to prune, how far, and how importance is learned. Fields, defaults and validation, no behaviour."""

from __future__ import annotations

import enum
import math
import re
import typing
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig

from .model_card import CARD_NAME, update_card_above, update_model_card
from .patterns import Coupled, NofM, Pattern, parse_pattern
from .schedule import COOLDOWN_RATIO, WARMUP_RATIO, check_sparsity


class PSTPeftType(str, enum.Enum):  # noqa: UP042  # of the same make as PEFT's own
    """The method's type in PEFT's mappings; PEFT's own enum is closed to other packages."""

    PST = "PST"


# The layout of a saved adapter: names, shapes and meaning of its tensors. It rises when an older release would misread
# what a newer one writes; what older releases may ignore needs no rise.
FORMAT_VERSION = 1

InitWeights = Literal["fan_in", "paper"]
ResidualPositions = Literal["grebsmo", "magnitude", "random"]
Scope = Literal["matrix", "global"]
DEFAULT_SPARSITY = 0.9


@dataclass
class PSTConfig(PeftConfig):
    """Configuration of parameter-efficient sparse training.

    Every argument is optional. With no `target_modules`, all linear layers inside the model's numbered blocks are
    adapted; embeddings, poolers, heads and routers of experts are not.

    Args:
        target_sparsity: fraction of zeros in each adapted matrix at the end, in [0, 1); 0.9 keeps one weight in ten.
            None, the default, means 0.9, and 1 - n / m where `pattern` is "n:m", which has no other.
        initial_sparsity: fraction of zeros from the moment the adapter exists until the ramp starts, in
            [0, target_sparsity].
        pattern: what is pruned together. "unstructured": single entries; "n:m", such as "2:4": n of every m neighbours
            along the input stay; "bxc", such as "4x4": blocks of b rows and c columns; "rows", "columns": whole ones;
            "heads", "neurons", "heads+neurons": attention heads and feed-forward neurons, which are rows of some
            matrices together with columns of another. Groups are ranked by their mean score. With the last three,
            matrices that belong to no such group stay dense.
        scope: "matrix": each matrix has the target sparsity; "global": all have it together. Matrices are made
            comparable by dividing their scores by the root mean square of their base weights. Matrices that
            `sparsity_pattern` names keep a target of their own.
        min_kept: with scope="global", the fraction of each matrix that stays whatever its scores, in (0, 1).
        parts: into how many matrices, one below the other, a module's weight is divided for the ranking, by module,
            {name or regular expression: number}; {"c_attn": 3} ranks GPT-2's queries, keys and values apart.
        projections: what the matrices of heads and neurons are called where a model's names are not known, as ends of
            their names: {"neurons": [{"inputs": ["gate", "up"], "output": "down"}]}, and for "heads" query, key and
            value as inputs.
        r: rank of the weight update U V; 0 trains importance alone.
        score_rank: rank of the low-rank importance A B; 0 leaves it out.
        structured: whether to learn one importance per row (R) and per column (C).
        embedding_r: rank of the update of the token embeddings, which are never pruned; 0 leaves them as they are.
        embedding_modules: names of the embeddings that get it. None: the model's input embeddings, where
            `target_modules` is left open too, r is not 0, and they are not tied to an output layer. What is named here
            may not be named in `target_modules`, `exclude_modules` or `modules_to_save`.
        residual: number of entries, in each matrix, of a sparse residual in the weight update. Their positions are
            fixed when the adapter is made, their values train; 0 leaves it out.
        residual_positions: where these entries stand. "grebsmo": the largest of the sparse part of W0 split into
            low-rank plus sparse; "magnitude": the largest of |W0|; "random".
        beta: scale of the low-rank weight update; the residual is not scaled.
        alpha1: scale of the low-rank importance.
        alpha2: scale of the structured importance.
        warmup_ratio: share of the steps at the initial sparsity, in [0, 1].
        cooldown_ratio: share of the steps at the target sparsity, in [0, 1]; at most 1 together with the warm-up.
        total_steps: optimizer steps of the whole run; `PSTCallback` fills it in when it is None.
        mask_interval: optimizer steps from one selection of the mask to the next, at least 1. At 1 the mask follows
            the scores at every step. Above, the sparsity moves and the mask is selected at multiples of the interval
            only (and when the target is reached); None selects only when the schedule asks for more zeros than are in
            force, so that what was pruned once is held while retraining. A mask that is held is part of the adapter's
            state, at one bit per weight.
        keep_zeros: whether what is zero in the base weight stays zero, for a base that was pruned before. Its zeros
            are pruned first, whatever they score, and count towards the sparsity, which is never below theirs: with
            `target_sparsity=0` the base's own mask is held, and a higher target prunes further.
        init_weights: how U and A start. True or "fan_in": N(0, 1 / in_features); "paper": N(0, 1), as published; the
            rest starts at zero, so the model starts unchanged. Where embeddings are pruned, V and B start so instead,
            and U and A at zero. False: everything random, for tests; with r = 0 such an adapter also starts at its
            target sparsity, or it would change nothing.
        target_modules: names, suffixes, a regular expression, or "all-linear".
        target_parameters: ends of the full names of parameters, beside `target_modules`: matrices (out, in) that a
            module multiplies by itself, or stacks of them (experts, out, in), each of which is a matrix of its own.
            With `target_modules=[]` nothing else is adapted.
        exclude_modules: names, suffixes or a regular expression of modules to leave alone.
        layers_to_transform: indices of the blocks to adapt; needs `target_modules` to be names or None.
        layers_pattern: name of the list of blocks, where `layers_to_transform` cannot find it.
        modules_to_save: further modules to train and save in full, such as a head.
        bias: "none", "all" or "pst_only": which biases train.
        fan_in_fan_out: kept for PEFT's sake. The layer's class decides the orientation: transformers' `Conv1D` is
            read as (in, out), `nn.Linear` as (out, in).
        sparsity_pattern: target sparsity by module, {name or regular expression: sparsity}, over `target_sparsity`.
        rank_pattern: r by module, in the same manner.
        residual_pattern: residual by module, in the same manner.
        score_rank_pattern: score_rank by module, in the same manner.
        format_version: layout of the adapter's file, at most `FORMAT_VERSION`. Written by this package, and not an
            option; PEFT writes a safetensors file's metadata itself, so the configuration is the place that is left.

    Raises:
        ValueError: for a value out of its range, and for combinations that mean nothing. The message names the field,
            the value, the bound and the remedy.

    Source: Li et al. 2022 (arXiv 2205.11005); the residual is S2 of DSEE (Chen et al., ACL 2023, arXiv 2111.00160);
    the patterns are matched as PEFT's `LoraConfig.rank_pattern`.

    Example:
        >>> PSTConfig(target_sparsity=0.7, sparsity_pattern={"output.dense": 0.5}).r
        8
        >>> PSTConfig(target_sparsity=1.0)
        Traceback (most recent call last):
        ...
        ValueError: target_sparsity=1.0 is outside [0, 1); 0.9 means that nine of ten weights are zero.
    """

    target_sparsity: float = field(
        default=None,  # type: ignore[assignment]  # a number once the configuration is made
        metadata={"help": "Fraction of zeros in each adapted matrix at the end, in [0, 1); None: 0.9, or 1 - n/m."},
    )
    initial_sparsity: float = field(
        default=0.0, metadata={"help": "Fraction of zeros until the ramp starts, in [0, target_sparsity]."}
    )
    pattern: str = field(
        default="unstructured",
        metadata={
            "help": (
                'What is pruned together: "unstructured", "n:m" ("2:4"), "bxc" (blocks, "4x4"), "rows", "columns", '
                '"heads", "neurons" or "heads+neurons".'
            )
        },
    )
    scope: Scope = field(
        default="matrix",
        metadata={"help": 'Whether each "matrix" has the target sparsity, or all have it together ("global").'},
    )
    min_kept: float = field(
        default=0.01, metadata={"help": "Fraction of each matrix that stays in any case, with the global scope."}
    )
    parts: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Matrices that a fused one is made of, by module name or regular expression; ranked apart."},
    )
    projections: dict[str, list[dict[str, Any]]] = field(
        default_factory=dict,
        metadata={"help": "What the matrices of heads and neurons are called, where they are not found by themselves."},
    )
    r: int = field(default=8, metadata={"help": "Rank of the weight update U V; 0 trains importance alone."})
    score_rank: int = field(default=8, metadata={"help": "Rank of the low-rank importance A B; 0 leaves it out."})
    structured: bool = field(
        default=True, metadata={"help": "Whether to learn an importance per row (R) and per column (C)."}
    )
    embedding_r: int = field(
        default=8,
        metadata={"help": "Rank of the update of the token embeddings, which are not pruned; 0 leaves them alone."},
    )
    embedding_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of these embeddings; by default found with the linears of the blocks."}
    )
    residual: int = field(
        default=0, metadata={"help": "Trained entries of a sparse residual in the weight update; 0 leaves it out."}
    )
    residual_positions: ResidualPositions = field(
        default="grebsmo",
        metadata={
            "help": (
                'Where the residual stands: "grebsmo" for the largest entries of the sparse part of a low-rank plus '
                'sparse split of the weight, "magnitude" for its largest entries, or "random".'
            )
        },
    )
    beta: float = field(default=1.0, metadata={"help": "Scale of the low-rank weight update."})
    alpha1: float = field(default=1.0, metadata={"help": "Scale of the low-rank importance."})
    alpha2: float = field(default=1.0, metadata={"help": "Scale of the structured importance."})
    warmup_ratio: float = field(default=WARMUP_RATIO, metadata={"help": "Share of the steps at the initial sparsity."})
    cooldown_ratio: float = field(
        default=COOLDOWN_RATIO, metadata={"help": "Share of the steps at the target sparsity."}
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the whole run; PSTCallback fills it in when left open."}
    )
    mask_interval: int | None = field(
        default=1,
        metadata={"help": "Steps from one selection of the mask to the next; None: only to prune further."},
    )
    keep_zeros: bool = field(
        default=False,
        metadata={"help": "Whether what is zero in the base weight stays zero, for a base that was pruned before."},
    )
    init_weights: bool | InitWeights = field(
        default=True,
        metadata={
            "help": (
                'How U and A start: true or "fan_in" for N(0, 1/in_features), "paper" for N(0, 1), false for a random '
                "adapter that changes the model at once (tests)."
            )
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": 'Names, suffixes, a regular expression or "all-linear"; by default the linears of the blocks.'
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of parameters that are matrices or stacks of them, such as the experts of a mixture."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or a regular expression of modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; all when left open."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, used with layers_to_transform."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full, such as a head."}
    )
    bias: Literal["none", "all", "pst_only"] = field(
        default="none", metadata={"help": 'Which biases train: "none", "all" or "pst_only".'}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Kept for PEFT's sake; the layer's class decides the orientation."}
    )
    sparsity_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Target sparsity by module name or regular expression."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "r by module name or regular expression."}
    )
    residual_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "residual by module name or regular expression."}
    )
    score_rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "score_rank by module name or regular expression."}
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Layout of a saved adapter; written by this package, not an option."}
    )

    @property
    def holds_mask(self) -> bool:
        """Whether the mask in force is state of its own rather than a function of the layer's current scores."""
        return self.mask_interval != 1 or isinstance(parse_pattern(self.pattern), Coupled)

    @classmethod
    def paper(cls, **overrides: Any) -> PSTConfig:
        """The whole setting of the paper, whatever the defaults of this package become.

        Example:
            >>> PSTConfig.paper(target_sparsity=0.5).init_weights
            'paper'
        """
        setting: dict[str, Any] = {
            "target_sparsity": DEFAULT_SPARSITY,
            "pattern": "unstructured",
            "scope": "matrix",
            "initial_sparsity": 0.0,
            "r": 8,
            "score_rank": 8,
            "structured": True,
            "embedding_r": 0,
            "beta": 1.0,
            "alpha1": 1.0,
            "alpha2": 1.0,
            "warmup_ratio": 0.1,
            "cooldown_ratio": 0.3,
            "mask_interval": 1,
            "init_weights": "paper",
        }
        return cls(**{**setting, **overrides})

    @classmethod
    def dsee(cls, **overrides: Any) -> PSTConfig:
        """DSEE: a low-rank and a sparse update, no learned scores, and a mask that is made once and held.

        By default dense, for a first stage; `prune_once` or `prune_heads` then prunes, and training goes on with the
        masks held. With a `target_sparsity`, both stages are one run: the weights are pruned at once after half of the
        steps.

        What differs from DSEE: the mask covers the updated weight and not the base alone, so that merging keeps its
        zeros; the update is scaled by `beta` and the residual not at all; and the gradient runs through the magnitude
        too, as everywhere in this package, which makes it larger by a factor of 1 + |W|.

        Source: Chen et al., ACL 2023 (arXiv 2111.00160): r = 16, 16 to 128 entries a matrix, placed by GreBsmo.

        Example:
            >>> config = PSTConfig.dsee()
            >>> config.target_sparsity, config.r, config.residual, config.score_rank, config.mask_interval
            (0.0, 16, 64, 0, None)
            >>> PSTConfig.dsee(target_sparsity=0.5, residual_positions="random").warmup_ratio
            0.5
        """
        setting: dict[str, Any] = {
            "target_sparsity": 0.0,
            "r": 16,
            "embedding_r": 0,
            "residual": 64,
            "score_rank": 0,
            "structured": False,
            "warmup_ratio": 0.5,
            "cooldown_ratio": 0.5,
            "mask_interval": None,
        }
        return cls(**{**setting, **overrides})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and what it says into the model card that `PeftModel.save_pretrained` wrote beside.

        PEFT asks no tuner for its part of the card; the configuration comes last, when the adapter's file is there.
        """
        super().save_pretrained(save_directory, **kwargs)
        if (Path(save_directory) / CARD_NAME).is_file():
            update_model_card(save_directory)
        else:
            update_card_above(Path(save_directory))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PSTPeftType.PST
        for name in ("target_modules", "exclude_modules"):
            _check_selection(name, getattr(self, name))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as every PEFT tuner does
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        _check_format(self)
        _check_kinds(self)
        _check_choices(self)
        if self.target_sparsity is None:
            pattern = parse_pattern(self.pattern)
            self.target_sparsity = pattern.most if isinstance(pattern, NofM) else DEFAULT_SPARSITY
        _check_sparsities(self)
        _check_pattern_and_scope(self)
        _check_ranks_and_scales(self)
        _check_embeddings(self)
        _check_schedule(self)
        _check_layer_selection(self)


def _check_format(config: PSTConfig) -> None:
    version = config.format_version
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"format_version={version!r} is no version of the adapter's layout; they count from 1.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version} is later than {FORMAT_VERSION}, the last one that this release of peft_pst "
            "reads; upgrade it with `pip install --upgrade peft-pst`."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_count(name: str, value: object, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r} is not a {what}; pass an integer of at least 0.")


def _check_kinds(config: PSTConfig) -> None:
    for name in ("sparsity_pattern", "parts", "projections", "rank_pattern", "residual_pattern", "score_rank_pattern"):
        if getattr(config, name) is None:
            setattr(config, name, {})
        if not isinstance(getattr(config, name), dict):
            raise ValueError(f"{name}={getattr(config, name)!r} is not a dict; pass {{module name or pattern: value}}.")
        for key in getattr(config, name):
            _check_pattern(f"a key of {name}", key)
    for name in ("structured", "fan_in_fan_out", "keep_zeros"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r} is neither True nor False.")
    for name, what in (
        ("modules_to_save", "module"),
        ("target_parameters", "parameter"),
        ("embedding_modules", "module"),
    ):
        value = getattr(config, name)
        if value is not None and not _are_names(value):
            raise ValueError(f"{name}={value!r} is no list of names; pass a list of {what} names.")


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)


def _check_selection(name: str, value: object) -> None:
    if isinstance(value, str):
        _check_pattern(name, value)
    elif value is not None and not _are_names(value):
        raise ValueError(f"{name}={value!r} is neither a list of module names nor a regular expression.")


def _check_pattern(what: str, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"{what}: {pattern!r} is neither a module name nor a regular expression.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}: {pattern!r} is no regular expression: {error}.") from error


def _check_sparsities(config: PSTConfig) -> None:
    check_sparsity("target_sparsity", config.target_sparsity)
    check_sparsity("initial_sparsity", config.initial_sparsity)
    targets = {"target_sparsity": config.target_sparsity}
    for key, value in config.sparsity_pattern.items():
        check_sparsity(f"sparsity_pattern[{key!r}]", value)
        targets[f"sparsity_pattern[{key!r}]"] = value
    for name, target in targets.items():
        if config.initial_sparsity > target:
            raise ValueError(
                f"initial_sparsity={config.initial_sparsity} is above {name}={target}; a schedule only prunes further. "
                "Lower the initial or raise the target sparsity."
            )


def _check_pattern_and_scope(config: PSTConfig) -> None:
    for key, value in config.parts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"parts[{key!r}]={value!r} is not a number of matrices; pass an integer of at least 1.")
    if not _is_number(config.min_kept) or not 0 < config.min_kept < 1:
        raise ValueError(f"min_kept={config.min_kept!r} is outside (0, 1); 0.01 keeps one weight in a hundred.")
    pattern, is_global = parse_pattern(config.pattern), config.scope == "global"
    if is_global and config.min_kept > 1 - config.target_sparsity + 1e-9:
        raise ValueError(
            f"min_kept={config.min_kept} of each matrix is more than target_sparsity={config.target_sparsity} leaves; "
            "lower one of the two."
        )
    _check_projections(config, pattern)
    if isinstance(pattern, Coupled) and config.keep_zeros:
        raise ValueError(
            f"keep_zeros=True cannot be combined with pattern={config.pattern!r}, which prunes whole groups over "
            "several matrices; leave one of the two out."
        )
    if isinstance(pattern, NofM):
        _check_n_of_m(config, pattern, is_global)


def _check_projections(config: PSTConfig, pattern: Pattern) -> None:
    kinds = pattern.kinds if isinstance(pattern, Coupled) else ()
    for kind, named in config.projections.items():
        if kind not in kinds:
            raise ValueError(
                f"projections[{kind!r}] names matrices of groups that pattern={config.pattern!r} does not prune; there "
                'are "heads" and "neurons".'
            )
        for one in named if isinstance(named, list) else [named]:
            known = isinstance(one, dict) and {"inputs", "output"} <= set(one) <= {"inputs", "output", "interleaved"}
            if not known or not _are_names(one["inputs"]) or not isinstance(one["output"], str):
                raise ValueError(
                    f"projections[{kind!r}] holds {one!r}; pass a list of dicts such as "
                    '{"inputs": ["gate", "up"], "output": "down"}.'
                )


def _check_n_of_m(config: PSTConfig, pattern: NofM, is_global: bool) -> None:
    targets = {"target_sparsity": config.target_sparsity}
    targets |= {f"sparsity_pattern[{key!r}]": value for key, value in config.sparsity_pattern.items()}
    for name, target in targets.items():
        if target and abs(target - pattern.most) > 1e-6:
            raise ValueError(
                f"{name}={target} is not the {pattern.most:g} that pattern={pattern.name!r} comes to; leave it out, or "
                "set it to 0 where nothing is to be pruned."
            )
    if is_global:
        raise ValueError(
            f"pattern={pattern.name!r} gives every matrix the same sparsity, so scope='global' has nothing to share "
            "out; leave the scope at 'matrix'."
        )


def _check_embeddings(config: PSTConfig) -> None:
    _check_count("embedding_r", config.embedding_r, "rank")
    if config.embedding_modules and not config.embedding_r:
        raise ValueError(
            f"embedding_modules={config.embedding_modules!r} get no update, because embedding_r=0; set a rank, or "
            "leave embedding_modules out."
        )


def _check_ranks_and_scales(config: PSTConfig) -> None:
    used = {
        name: _any_positive(config, name, pattern, what)
        for name, pattern, what in (
            ("r", "rank_pattern", "rank"),
            ("score_rank", "score_rank_pattern", "rank"),
            ("residual", "residual_pattern", "number of entries"),
        )
    }
    if not any(used.values()) and not config.structured:
        raise ValueError(
            "r=0, residual=0, score_rank=0 and structured=False leave nothing to train; switch on at least one of the "
            "four parts."
        )
    if not used["residual"] and config.residual_positions != "grebsmo":
        raise ValueError(
            f"residual_positions={config.residual_positions!r} has nothing to place, because residual=0; set residual "
            "to the number of entries, or leave residual_positions out."
        )
    parts = (
        ("beta", used["r"], "r=0"),
        ("alpha1", used["score_rank"], "score_rank=0"),
        ("alpha2", config.structured, "structured=False"),
    )
    for name, is_on, off in parts:
        value = getattr(config, name)
        if not _is_number(value):
            raise ValueError(f"{name}={value!r} is not a finite number; 1.0 is the paper's value.")
        if is_on and value == 0:
            raise ValueError(f"{name}=0 switches a part off that would still take memory; set {off} instead.")
        if not is_on and value != 1.0:
            raise ValueError(
                f"{name}={value} has nothing to scale, because {off}; leave it at 1.0 or switch the part on."
            )


def _any_positive(config: PSTConfig, name: str, pattern: str, what: str) -> bool:
    """Whether a field, or its pattern for some modules, is above 0; every value of both is checked."""
    values = {name: getattr(config, name)}
    values |= {f"{pattern}[{key!r}]": value for key, value in getattr(config, pattern).items()}
    for label, value in values.items():
        _check_count(label, value, what)
    return any(values.values())


def _check_schedule(config: PSTConfig) -> None:
    for name in ("warmup_ratio", "cooldown_ratio"):
        value = getattr(config, name)
        if not _is_number(value) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value!r} is outside [0, 1]; it is a share of the training steps.")
    if config.warmup_ratio + config.cooldown_ratio > 1.0:
        raise ValueError(
            f"warmup_ratio={config.warmup_ratio} and cooldown_ratio={config.cooldown_ratio} sum to more than 1; "
            "leave room for the ramp between them."
        )
    total = config.total_steps
    if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
        raise ValueError(f"total_steps={total!r} is not a number of steps; pass an integer of at least 1, or None.")
    interval = config.mask_interval
    if interval is not None and (not isinstance(interval, int) or isinstance(interval, bool) or interval < 1):
        raise ValueError(
            f"mask_interval={interval!r} is not a number of steps; pass an integer of at least 1, or None to hold the "
            "mask while the sparsity stays."
        )


def _check_choices(config: PSTConfig) -> None:
    if not isinstance(config.init_weights, bool) and config.init_weights not in ("fan_in", "paper"):
        raise ValueError(f'init_weights={config.init_weights!r} is none of True, False, "fan_in" and "paper".')
    if config.residual_positions not in typing.get_args(ResidualPositions):
        raise ValueError(
            f'residual_positions={config.residual_positions!r} is none of "grebsmo", "magnitude" and "random".'
        )
    parse_pattern(config.pattern)
    if config.scope not in typing.get_args(Scope):
        raise ValueError(f'scope={config.scope!r} is neither "matrix" nor "global".')
    if config.bias not in ("none", "all", "pst_only"):
        raise ValueError(f'bias={config.bias!r} is none of "none", "all" and "pst_only".')


def _check_layer_selection(config: PSTConfig) -> None:
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            f"layers_pattern={config.layers_pattern!r} says where blocks are counted, but layers_to_transform is None; "
            "set layers_to_transform to the blocks to adapt."
        )
    blocks = config.layers_to_transform
    for block in blocks if isinstance(blocks, list) else [] if blocks is None else [blocks]:
        if not isinstance(block, int) or isinstance(block, bool) or block < 0:
            raise ValueError(f"layers_to_transform={blocks!r} holds {block!r}; blocks are counted from 0.")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} cannot be combined with target_modules="
            f"{config.target_modules!r}, a pattern; name the blocks in the pattern or pass target_modules as a list."
        )
