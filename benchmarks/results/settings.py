"""What an experiment is: a model, tasks, methods, sparsities and seeds, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from peft_pst.distillation import check_settings
from peft_pst.schedule import check_sparsity

from .methods import METHODS

RATES = ("lr", "score_lr")
_ABOVE_0 = (
    "steps",
    "epochs",
    "batch_size",
    "train_examples",
    "max_length",
    "head_lr",
    "eval_examples",
    "beams",
    "max_new_tokens",
)

Rates = dict[str, float]


@dataclass(frozen=True)
class Training:
    """How every method is trained alike.

    What is left at its default does not enter a run's key, so that a new field keeps old results: never change a
    default, add a field.

    Attributes:
        steps: optimizer steps; None to go by `epochs`.
        epochs: passes over the training examples; None to go by `steps`.
        batch_size: examples a step.
        train_examples: so many, the first of one fixed shuffle; None for all.
        shuffle_seed: of that shuffle, the same for every seed of a run.
        max_length: tokens that a text is cut to.
        head_lr: learning rate of the head: modules that start at random, such as a classifier, and `head_modules`.
        head_modules: further modules that train in full with the head, whatever the method, such as a pooler.
        warmup_steps: optimizer steps over which the learning rates rise.
        precision: bf16 is autocast over float32 weights.
        label_smoothing: of the loss, in [0, 1).
        eval_examples: sources that are decoded, the first of a fixed shuffle, for text generation; None for all.
        beams: of the search that decodes them.
        max_new_tokens: of a decoded text at most.
        dropout: of every `nn.Dropout` of the model, in [0, 1), the same for every method; None for the checkpoint's.
        group_by_length: whether a batch holds examples of like length, for less padding.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    train_examples: int | None = None
    shuffle_seed: int = 0
    max_length: int = 128
    head_lr: float = 1e-3
    head_modules: tuple[str, ...] = ()
    warmup_steps: int = 0
    precision: Literal["bf16", "float32"] = "bf16"
    label_smoothing: float = 0.0
    eval_examples: int | None = None
    beams: int = 10
    max_new_tokens: int = 128
    dropout: float | None = None
    group_by_length: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: give one of the two.")
        for name in _ABOVE_0:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"{name}={value!r} must be a number above 0; YAML reads 1e-3 as text, write 1.0e-3.")
        if self.dropout is not None and not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={self.dropout!r} must be a number in [0, 1), or left out.")
        object.__setattr__(self, "head_modules", tuple(self.head_modules))  # YAML and JSON have lists
        if self.precision not in ("bf16", "float32"):
            raise ValueError(f"precision={self.precision!r} is neither bf16 nor float32.")

    def given(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class Row:
    """One method as the table shows it.

    Attributes:
        method: a key of `METHODS`.
        options: what the method's own file documents.
        rates: learning rates that are fixed; None to take those of the search.
        candidates: learning rates to search among.
        rates_of: another row, whose learning rates are taken over.
        teacher: a row that prunes nothing, from whose finished run of the same seed this one also learns.
        teacher_weight: the teacher's part of the loss, in [0, 1].
        temperature: of the distance to the teacher's predictions.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rates: Rates | None = None
    candidates: tuple[Rates, ...] = ()
    rates_of: str | None = None
    teacher: str | None = None
    teacher_weight: float = 0.5
    temperature: float = 2.0


@dataclass(frozen=True)
class Search:
    """How learning rates are searched, alike for every method.

    Attributes:
        budget: candidates a method has, the same for all.
        held_out: training examples, the last of the fixed shuffle, that are scored and not trained on.
        held_out_of: the same for tasks that have too few examples for it, by name.
        seed: of the search's runs; none of the table's.
        steps: optimizer steps of a candidate; None for as many as the table's runs have.
        groups: sparsities that share their learning rates; each group is searched at its last sparsity.
    """

    budget: int = 4
    held_out: int = 1000
    held_out_of: dict[str, int] = field(default_factory=dict)
    seed: int = 1000
    steps: int | None = None
    groups: tuple[tuple[float, ...], ...] = ()

    def group_of(self, sparsity: float) -> tuple[float, ...]:
        """The group that a sparsity belongs to; one that is in no group is one of its own."""
        return next((group for group in self.groups if sparsity in group), (sparsity,))


@dataclass(frozen=True)
class Settings:
    """A whole experiment.

    Attributes:
        name: of the YAML file, and of the folder that results go to.
        model: "minilm", "smollm2", a folder, or a name on the hub.
        tasks: how each task is trained, by name.
        rows: methods, by the name that the table shows.
        sparsities: for every method that prunes.
        seeds: of head, adapter, dropout and the order of the batches.
        search: how learning rates are found.
        local_data: whether the data are read from files rather than from the hub.
    """

    name: str
    model: str
    tasks: dict[str, Training]
    rows: dict[str, Row]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    search: Search
    local_data: bool = False

    def sparsities_of(self, row: str) -> tuple[float, ...]:
        """The sparsities at which a row is run: one that does not prune has 0 alone."""
        return self.sparsities if METHODS[self.rows[row].method].prunes else (0.0,)


def read_settings(path: str | Path) -> Settings:
    """Read and check a settings file.

    Raises:
        ValueError: for a field that does not exist, a value out of its range, or a method that is not known.
    """
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    known = {*(f.name for f in fields(Settings)), "training", "methods"} - {"name", "rows"}
    _check_names(content, known, str(path))
    training = content.get("training", {})
    groups = tuple(tuple(group) for group in content.get("search", {}).get("groups", ()))
    settings = Settings(
        name=Path(path).stem,
        model=content["model"],
        tasks={task: _training(training, overrides or {}, task) for task, overrides in content["tasks"].items()},
        rows={row: _row(row, values or {}) for row, values in content["methods"].items()},
        sparsities=tuple(content["sparsities"]),
        seeds=tuple(content["seeds"]),
        search=_from(Search, {**content.get("search", {}), "groups": groups}, "search"),
        local_data=content.get("local_data", False),
    )
    for name, row in settings.rows.items():
        _check_references(settings, name, row)
    for sparsity in settings.sparsities:
        check_sparsity("sparsities", sparsity)
    if settings.search.seed in settings.seeds:
        raise ValueError(f"search.seed={settings.search.seed} is one of the table's seeds; choose another.")
    return settings


def with_max_steps(settings: Settings, max_steps: int | None) -> Settings:
    """The same experiment, no run of it longer than `max_steps`, for a trial; None changes nothing."""
    if max_steps is None:
        return settings
    tasks = {task: replace(training, steps=max_steps, epochs=None) for task, training in settings.tasks.items()}
    return replace(settings, tasks=tasks)


def _training(common: Mapping[str, Any], overrides: Mapping[str, Any], task: str) -> Training:
    lengths = {"steps", "epochs"}
    kept = {key: value for key, value in common.items() if not (key in lengths and lengths & set(overrides))}
    return _from(Training, {**kept, **overrides}, f"training of {task}")


def _row(name: str, values: Mapping[str, Any]) -> Row:
    row = _from(Row, {"method": name, **values, "candidates": tuple(values.get("candidates", ()))}, name)
    if row.method not in METHODS:
        raise ValueError(f"{name}: method {row.method!r} is none of {', '.join(METHODS)}.")
    wanted = set(METHODS[row.method].rates)
    for rates in (*row.candidates, *([row.rates] if row.rates else [])):
        if set(rates) != wanted or not all(_is_number(rate) and rate >= 0 for rate in rates.values()):
            raise ValueError(
                f"{name}: learning rates {rates}; {row.method} takes {', '.join(sorted(wanted))}, each a number of at "
                "least 0. YAML reads 1e-3 as text, write 1.0e-3."
            )
    return row


def _check_references(settings: Settings, name: str, row: Row) -> None:
    for field_name, other in (("rates_of", row.rates_of), ("teacher", row.teacher)):
        if other is not None and other not in settings.rows:
            raise ValueError(f"{name}: {field_name} {other!r} is none of the rows {', '.join(settings.rows)}.")
    if row.teacher is not None:
        check_settings(row.teacher_weight, row.temperature)
        if METHODS[settings.rows[row.teacher].method].prunes:
            raise ValueError(f"{name}: teacher {row.teacher!r} prunes; choose a row that stays dense.")
        if row.candidates:
            raise ValueError(f"{name}: a row with a teacher is not searched; give it rates, or rates_of another row.")
    if row.rates_of is None:
        return
    other_row = settings.rows[row.rates_of]
    if row.rates is not None or row.candidates or other_row.rates_of is not None:
        raise ValueError(f"{name}: rates_of goes with neither rates nor candidates, nor to a row that has it too.")
    if set(METHODS[other_row.method].rates) != set(METHODS[row.method].rates):
        raise ValueError(f"{name}: {row.rates_of!r} has other learning rates than {row.method} takes.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_names(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}.")


def _from(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    _check_names(values, {f.name for f in fields(kind)}, where)
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
