"""What PEFT offers for an adapter, and what it means with PST or why it is refused: one list for tests and docs.

Each entry is a function that does the operation on a case (a model and a configuration) and checks what its text says.
`test_peft_contract.py` runs them all; `compatibility_page.py` writes docs/compatibility.md from their texts.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from contract_cases import Case, attentive
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    cast_mixed_precision_params,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
from peft.peft_model import get_layer_status, get_model_status
from peft.utils.hotswap import hotswap_adapter
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_models import assert_same_tensors, layers_of, shake, snapshot, train_a_little

from peft_pst import PSTConfig, get_sparsity, merge_keeping_zeros, update_sparsity
from peft_pst.tuner_layer import PSTWrapper


@dataclass(frozen=True)
class Operation:
    """One line of the table, and the function that shows it true."""

    section: str
    name: str
    meaning: str  # what it means with PST, or why it is refused
    refusal: tuple[type[Exception], str] | None
    applies: Callable[[Case], bool]
    run: Callable[[Case, Path], None]


OPERATIONS: list[Operation] = []
Check = Callable[[Case, Path], None]


def operation(
    section: str,
    name: str,
    meaning: str,
    refused: tuple[type[Exception], str] | None = None,
    only: Callable[[Case], bool] | None = None,
) -> Callable[[Check], Check]:
    """Put an operation on the list; `refused` is the error that it ends in, where the meaning is a reason."""

    def enter(run: Check) -> Check:
        applies = only or (is_bare if refused else lambda case: True)
        OPERATIONS.append(Operation(section, name, meaning, refused, applies, run))
        return run

    return enter


@contextmanager
def without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


MIXTURE = "mixture of experts"


def freezes_biases(case: Case) -> bool:
    return case.options.get("bias", "none") == "none"


def is_plain(case: Case) -> bool:
    """Whether nothing but the adapted matrices differs from the base."""
    return freezes_biases(case) and "modules_to_save" not in case.options


def names_parameters(case: Case) -> bool:
    return "target_parameters" in case.targets


def is_bare(case: Case) -> bool:
    """Whether the case is there for its model; a refusal that no option touches is not tried on all of them."""
    return not case.options


def starts_unchanged(case: Case) -> bool:
    return case.options.get("init_weights") is not False and not case.options.get("initial_sparsity")


def is_transformer(case: Case) -> bool:
    return case.name in (
        "sequence classifier",
        "decoder with Conv1D",
        "encoder and decoder",
        "feature extraction",
        MIXTURE,
    )


def generates(case: Case) -> bool:
    return case.name in ("decoder with Conv1D", "encoder and decoder", MIXTURE)


def zeros(model: torch.nn.Module) -> dict[str, int]:
    """Zeros in force in each adapted matrix, by its name in the base model."""
    return {la.module_name: int((la.get_masked_weight() == 0).sum()) for la in layers_of(model).values()}


def stored_weight(base: torch.nn.Module, name: str) -> torch.Tensor:
    """The matrix that a layer of this name adapts: a module's weight, a parameter, or one of a stack of them."""
    path, _, last = name.rpartition(".")
    if path and not isinstance(owner := base.get_submodule(path.rpartition(".")[0]), torch.nn.ModuleList):
        stack = getattr(owner, path.rpartition(".")[2])
        if isinstance(stack, torch.nn.Parameter):
            return stack[int(last)]
    found = getattr(base.get_submodule(path), last)
    return found if isinstance(found, torch.nn.Parameter) else found.weight


LIFE = "Life of an adapter"
STORAGE = "Saving and loading"
BESIDE = "Beside other tuners"
AFTER = "After merging"
REFUSED = "What has no meaning here"


@operation(
    LIFE,
    "`get_peft_model`",
    "the model starts unchanged, unless `init_weights=False` or `initial_sparsity` is set",
    only=starts_unchanged,
)
def make(case: Case, folder: Path) -> None:
    assert torch.equal(case.outputs(case.fresh().eval()), case.outputs(case.base()))


@operation(
    LIFE,
    "`init_weights=False`",
    "a random adapter that changes the model at once, for tests",
    only=lambda case: not starts_unchanged(case),
)
def make_changed(case: Case, folder: Path) -> None:
    assert not torch.allclose(case.outputs(case.fresh().eval()), case.outputs(case.base()), atol=1e-4)


@operation(LIFE, "training", "every trainable parameter gets a gradient at once, also at sparsity 0; nothing else does")
def train(case: Case, folder: Path) -> None:
    model = case.fresh().train()
    shake(model, 0)
    case.forward(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad == any(part in name for part in trainable_parts(case)), name


def trainable_parts(case: Case) -> tuple[str, ...]:
    parts = ["pst_"]
    if case.options.get("bias") == "all":
        parts.append(".bias")
    if case.options.get("bias") == "pst_only":
        parts.append(".base_layer.bias")
    return (*parts, *(f"{name}.modules_to_save." for name in case.options.get("modules_to_save", [])))


@operation(
    LIFE,
    "`add_adapter`, `set_adapter`",
    "each adapter has its own sparsity, ranks, targets and schedule; a new one waits until it is activated",
    only=freezes_biases,
)
def add_and_switch(case: Case, folder: Path) -> None:
    model = case.pruned()
    first = case.outputs(model)
    model.add_adapter("other", case.second_config())
    assert torch.equal(case.outputs(model.eval()), first)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".other"))
    model.set_adapter("other")
    train_a_little(model, seed=3).eval()
    assert not torch.equal(case.outputs(model), first)
    model.set_adapter("default")
    assert torch.equal(case.outputs(model), first)


@operation(
    LIFE,
    "several active adapters, `model.base_model.set_adapter([...])`",
    "updates add up; a weight is zero where any of them prunes; the order does not matter, and it merges exactly",
)
def activate_several(case: Case, folder: Path) -> None:
    model = case.two()
    model.base_model.set_adapter(["default", "other"])
    both, counted = case.outputs(model), zeros(model)
    model.base_model.set_adapter(["other", "default"])
    torch.testing.assert_close(case.outputs(model), both)
    for layer in layers_of(model).values():
        promised = [layer.get_num_pruned(adapter) for adapter in ("default", "other") if adapter in layer.pst_plans]
        assert counted[layer.module_name] >= max(promised)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter()
    assert torch.equal(case.outputs(model), both)


@operation(LIFE, "`delete_adapter`", "as in PEFT; deleting the active one activates another")
def delete(case: Case, folder: Path) -> None:
    model = case.two()
    model.set_adapter("other")
    other = case.outputs(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert not any(name.endswith(".default") for name in model.state_dict() if "pst_" in name)
    assert set(model.peft_config) == {"other"}
    if is_plain(case) and "modules_to_save" not in case.options:
        # Layers that only the deleted adapter had are dense again.
        model.set_adapter("other")
        assert torch.equal(case.outputs(model), other)


@operation(
    LIFE,
    "`disable_adapter`",
    'the dense base model, bit for bit, also while merged (with `bias="none"`)',
    only=freezes_biases,
)
def disable(case: Case, folder: Path) -> None:
    model, dense = case.pruned(), case.outputs(case.base())
    pruned, trains = case.outputs(model), [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        assert torch.equal(case.outputs(model), dense)
    assert torch.equal(case.outputs(model), pruned)
    assert [p.requires_grad for p in model.parameters()] == trains
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(case.outputs(model), dense)
    assert torch.equal(case.outputs(model), pruned)


@operation(
    LIFE,
    "`merge_adapter`, `unmerge_adapter`",
    "the masked weight replaces the dense one, which is kept on the "
    "CPU; unmerging restores it bit for bit, however often and in whatever order",
)
def merge_and_unmerge(case: Case, folder: Path) -> None:
    model = case.two()
    before, outputs = snapshot(model), case.outputs(model)
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(case.outputs(model), outputs)
        model.unmerge_adapter()
        assert_same_tensors(snapshot(model), before)
    model.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter(["default"])
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model), before)


@operation(LIFE, '`merge_adapter(["name"])`', "merges this adapter, active or not")
def merge_chosen(case: Case, folder: Path) -> None:
    model = case.two()
    model.set_adapter("other")
    other = case.outputs(model)
    model.merge_adapter(["other"])
    assert torch.equal(case.outputs(model), other)
    assert model.get_model_status().merged_adapters == ["other"]


@operation(
    LIFE,
    "`merge_and_unload`",
    "the dense weights are dropped layer by layer; a plain model with exact zeros, "
    "counted against the promise of each layer",
)
def merge_and_unload(case: Case, folder: Path) -> None:
    model = case.pruned()
    outputs, promised = case.outputs(model), zeros(model)
    classes = [type(module) for module in case.base().modules()]
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == classes
    assert torch.equal(case.outputs(merged), outputs)
    for name, count in promised.items():
        assert int((stored_weight(merged, name) == 0).sum()) == count


@operation(
    LIFE,
    "`merge_and_unload(safe_merge=True)`",
    "looks for NaN and infinity in the scores too, which may leave the weights finite",
)
def safe_merge(case: Case, folder: Path) -> None:
    model = case.pruned()
    for name, parameter in model.named_parameters():
        if "pst_" in name:
            parameter.data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_and_unload(safe_merge=True)


@operation(
    LIFE,
    "`unload`, then `get_peft_model` again",
    "the dense base model, bit for bit, with the head that was trained; it can be adapted anew. Of a merged model, the "
    "merged one",
    only=is_plain,
)
def unload(case: Case, folder: Path) -> None:
    base = case.pruned().unload()
    assert torch.equal(case.outputs(base), case.outputs(case.base()))
    with without_warnings():
        again = get_peft_model(base, case.config())
    assert again.get_sparsity() == case.fresh().get_sparsity()
    merged = case.pruned()
    outputs = case.outputs(merged)
    merged.merge_adapter()
    assert torch.equal(case.outputs(merged.unload()), outputs)


@operation(
    LIFE,
    "`get_layer_status`, `get_model_status`",
    "regular at every stage",
    only=lambda case: "modules_to_save" not in case.options,
)
def status(case: Case, folder: Path) -> None:
    model = case.two()
    for change in (lambda: None, model.merge_adapter, model.unmerge_adapter, lambda: model.set_adapter("other")):
        change()
        status = model.get_model_status()
        assert "irregular" not in [status.enabled, status.active_adapters, status.merged_adapters]
        assert "irregular" not in status.requires_grad.values()
        assert status.peft_types == {"default": "PST", "other": "PST"}
        assert status.available_adapters == ["default", "other"]
        assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    kinds = {status.module_type for status in get_layer_status(model)} - {"ModulesToSaveWrapper"}
    adapted = [module for module in model.modules() if isinstance(module, PSTWrapper)]
    assert kinds == {f"pst.{type(layer).__name__}" for layer in adapted}


@operation(
    LIFE,
    "`print_trainable_parameters`, `get_nb_trainable_parameters`",
    "counts what trains; the zeros in force and held masks are buffers and not counted",
)
def count_parameters(case: Case, folder: Path) -> None:
    model = case.fresh()
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())


@operation(
    LIFE,
    "`set_requires_grad`, `inference_mode`, `set_adapter(..., inference_mode=True)`",
    "freezes and thaws adapters; a frozen adapter still prunes",
)
def freeze(case: Case, folder: Path) -> None:
    model = case.two()
    model.set_requires_grad("other")
    model.set_requires_grad(["default"], False)
    assert model.get_model_status().requires_grad == {"default": False, "other": True}
    outputs = case.outputs(model)
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "pst_" in name)
    assert torch.equal(case.outputs(model), outputs)
    frozen = get_peft_model(case.base(), case.config(inference_mode=True))
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if "pst_" in name)


@operation(LIFE, "`copy.deepcopy`, `pickle`", "independent copies, with the sparsity in force")
def duplicate(case: Case, folder: Path) -> None:
    model = case.pruned()
    outputs = case.outputs(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.outputs(twin), outputs)
        shake(twin, 5)
    assert torch.equal(case.outputs(model), outputs)


@operation(
    LIFE,
    "`generate`, with and without KV cache",
    "in evaluation and between training steps, as the merged model",
    only=generates,
)
def generate(case: Case, folder: Path) -> None:
    model = train_a_little(get_peft_model(case.base(), case.config(task_type=TASKS[case.name])))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
    tokens = {"input_ids": case.inputs["input_ids"]}
    between = model.train().generate(**tokens, **options, use_cache=True) if not has_dropout(model) else None
    case.forward(model).square().sum().backward()
    model.eval()
    cached, uncached = (model.generate(**tokens, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert between is None or torch.equal(between, cached)
    assert torch.equal(model.merge_and_unload().generate(**tokens, **options), cached)


TASKS = {"decoder with Conv1D": "CAUSAL_LM", MIXTURE: "CAUSAL_LM", "encoder and decoder": "SEQ_2_SEQ_LM"}


def has_dropout(model: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def assert_loads_as(case: Case, loaded: PeftModel, model: PeftModel) -> None:
    assert_same_tensors(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    assert torch.equal(case.outputs(loaded.eval()), case.outputs(model))


@operation(
    LIFE,
    "`prepare_model_for_kbit_training`, `cast_mixed_precision_params`, `disable_input_dtype_casting`",
    "as in PEFT; inputs are never cast, as the base layer would not",
)
def casts(case: Case, folder: Path) -> None:
    model = get_peft_model(
        prepare_model_for_kbit_training(case.base(), use_gradient_checkpointing=False), case.config()
    )
    with disable_input_dtype_casting(model):
        case.forward(model).square().sum().backward()
    cast_mixed_precision_params(model, torch.bfloat16)
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


@operation(
    STORAGE,
    "`save_pretrained`, `PeftModel.from_pretrained`",
    "the number of zeros in force is part of the adapter's "
    "tensors, so a checkpoint in mid-schedule loads as it was; merged or not, the same file is written",
)
def save_and_load(case: Case, folder: Path) -> None:
    model = case.fresh()
    shake(model, 0)
    update_sparsity(model.eval(), 6, 10)
    model.save_pretrained(folder)
    with without_warnings():
        assert_loads_as(case, PeftModel.from_pretrained(case.base(), folder, torch_device="cpu"), model)
    model.merge_adapter()
    model.save_pretrained(folder / "merged")
    model.unmerge_adapter()
    assert_loads_as(case, PeftModel.from_pretrained(case.base(), folder / "merged"), model)


@operation(
    STORAGE,
    "`low_cpu_mem_usage=True`, `is_trainable`, `torch_device`",
    "as in PEFT, and the same adapter to the bit: one stored in float32 is not rounded to a base in half precision",
)
def load_economically(case: Case, folder: Path) -> None:
    model = case.pruned()
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(
        case.base(), folder, low_cpu_mem_usage=True, is_trainable=True, torch_device="cpu"
    )
    assert any(p.requires_grad for p in loaded.parameters())
    assert_loads_as(case, loaded, model)


@operation(
    STORAGE,
    "`load_adapter`",
    "beside others. Under a name that exists it puts new tensors into this adapter, which "
    "keeps its configuration: the way to swap adapters of one configuration, unmerged ones",
    only=freezes_biases,
)
def load_beside(case: Case, folder: Path) -> None:
    model = case.pruned()
    model.save_pretrained(folder)
    expected = case.outputs(model)
    other = train_a_little(case.fresh("first"), seed=7).eval()
    before = case.outputs(other)
    other.load_adapter(folder, adapter_name="second")
    assert torch.equal(case.outputs(other), before)
    other.set_adapter("second")
    assert torch.equal(case.outputs(other), expected)
    swapped = train_a_little(case.fresh(), seed=7).eval()
    swapped.load_adapter(folder, adapter_name="default")
    assert torch.equal(case.outputs(swapped), expected)


@operation(
    STORAGE,
    "a file that cannot be read, or is refused",
    "leaves the model as it was, with the very modules that it had and without the adapter, for another try",
)
def load_in_vain(case: Case, folder: Path) -> None:
    model, base = case.pruned(), case.base()
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    modules, tensors = list(base.named_modules()), snapshot(base)
    file.write_bytes(content[:-1])
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(base, folder)
    assert list(base.named_modules()) == modules
    assert_same_tensors(snapshot(base), tensors)
    file.write_bytes(content)
    assert_loads_as(case, PeftModel.from_pretrained(base, folder), model)


@operation(
    STORAGE,
    "`autocast_adapter_dtype`",
    "half-precision adapters are raised to float32, or with `False` rounded as the base is",
)
def cast_adapter(case: Case, folder: Path) -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(case.base().bfloat16(), case.config(), autocast_adapter_dtype=autocast)
        assert {p.dtype for name, p in model.named_parameters() if "pst_" in name} == {dtype}
        counts = {b.dtype for name, b in model.named_buffers() if "pst_num_pruned" in name}
        assert counts == {torch.int64}


@operation(
    STORAGE,
    "`get_peft_model_state_dict`, `set_peft_model_state_dict`",
    "checked as a whole before anything is "
    "written: a tensor that is missing, too many, misshapen or damaged is refused by its layer's name",
)
def set_state(case: Case, folder: Path) -> None:
    model, other = case.pruned(), train_a_little(case.fresh(), seed=9).eval()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert_loads_as(case, other, model)


@operation(
    STORAGE,
    "`inject_adapter_in_model`",
    "without a `PeftModel` round it",
    only=is_plain,
)
def inject(case: Case, folder: Path) -> None:
    model = case.pruned()
    state = get_peft_model_state_dict(model)
    plain = inject_adapter_in_model(case.config(), case.base())
    set_peft_model_state_dict(plain, state)
    assert torch.equal(case.outputs(plain), case.outputs(model))
    late = inject_adapter_in_model(case.config(), case.base(), low_cpu_mem_usage=True)
    set_peft_model_state_dict(late, state, low_cpu_mem_usage=True)
    assert torch.equal(case.outputs(late), case.outputs(model))


@operation(
    STORAGE,
    "`inject_adapter_in_model(state_dict=...)`",
    "the state dict alone says which layers, also of modules that hold several matrices; a configuration that names "
    "none is filled in",
    only=lambda case: is_plain(case) and not names_parameters(case),
)
def inject_by_state(case: Case, folder: Path) -> None:
    model = case.pruned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of PEFT, that configuration and tensors differ
        config = case.config(target_modules=None, layers_to_transform=None, layers_pattern=None)
        found = inject_adapter_in_model(config, case.base(), state_dict=unwrapped_state(model))
    assert set(layers_of(found)) == {name.removeprefix("base_model.model.") for name in layers_of(model)}
    set_peft_model_state_dict(found, get_peft_model_state_dict(model))
    assert torch.equal(case.outputs(found.eval()), case.outputs(model))
    again = inject_adapter_in_model(config, case.base())
    assert set(layers_of(again)) == set(layers_of(found))


@operation(
    STORAGE,
    "`inject_adapter_in_model(state_dict=...)` with tensors of `target_parameters`",
    "PEFT adapts parameters by name only; name them, and set the state dict afterwards",
    (ValueError, "holds the adapters of 2 parameters, such as model.layers.0.mlp.experts.down_proj"),
    only=lambda case: names_parameters(case),
)
def inject_parameters_by_state(case: Case, folder: Path) -> None:
    config = case.config(target_parameters=None)
    inject_adapter_in_model(config, case.base(), state_dict=unwrapped_state(case.pruned()))


def unwrapped_state(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(model).items()}


@operation(
    STORAGE,
    "`get_base_model_state_dict`, `set_base_model_state_dict`",
    "the dense base; while merged, the merged one",
    only=lambda case: is_plain(case),
)
def base_state(case: Case, folder: Path) -> None:
    model, base = case.pruned(), case.base()
    state = get_base_model_state_dict(model)
    assert_same_tensors(dict(state), base.state_dict())
    set_base_model_state_dict(model, {name: 2 * t if t.is_floating_point() else t for name, t in state.items()})
    assert_same_tensors(
        {n: t / 2 if t.is_floating_point() else t for n, t in get_base_model_state_dict(model).items()},
        base.state_dict(),
    )


def holds_several(case: Case) -> bool:
    """Whether a module that holds several matrices is adapted."""
    return "attn" in case.targets.get("target_modules", []) or names_parameters(case)


@operation(
    STORAGE, "`check_if_peft_model`, `PeftConfig.from_pretrained`", "knows the folder, once `peft_pst` is imported"
)
def recognise(case: Case, folder: Path) -> None:
    case.pruned().save_pretrained(folder)
    assert check_if_peft_model(str(folder))


@operation(STORAGE, "`ephemeral_gpu_offload=True`", "ignored with PEFT's warning: nothing of PST is kept on the CPU")
def offload(case: Case, folder: Path) -> None:
    case.pruned().save_pretrained(folder)
    with pytest.warns(UserWarning, match="Ephemeral GPU offloading is not supported for this model"):
        PeftModel.from_pretrained(case.base(), folder, ephemeral_gpu_offload=True)


@operation(
    STORAGE,
    "transformers' `add_adapter`, `load_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`",
    "as in transformers, `AutoModel.from_pretrained(adapter)` too, with adapters in float32. What its loader has "
    "loaded is checked as PEFT's is, and taken back if it is refused; but it casts before anyone can look, so that a "
    "count of 3.5 passes as 3",
    only=is_transformer,
)
def transformers_methods(case: Case, folder: Path) -> None:
    base, model = case.base(), case.base()
    model.add_adapter(case.config(), adapter_name="mine")
    train_a_little(model).eval()
    outputs = case.outputs(model)
    model.save_pretrained(folder)
    loaded = case.base()
    loaded.load_adapter(str(folder), adapter_name="loaded")
    assert torch.equal(case.outputs(loaded.eval()), outputs)
    assert get_sparsity(loaded) == get_sparsity(model)
    model.disable_adapters()
    assert torch.equal(case.outputs(model), case.outputs(base))
    model.enable_adapters()
    model.add_adapter(case.second_config(), adapter_name="other")
    model.set_adapter(["mine"])
    assert model.active_adapters() == ["mine"]
    assert torch.equal(case.outputs(model.eval()), outputs)
    model.delete_adapter("mine")
    assert not any(name.endswith(".mine") for name in model.state_dict())


@operation(
    BESIDE,
    "another tuner on other layers",
    "`inject_adapter_in_model(config, model.get_base_model(), name)`, with a "
    "name of its own; each is saved and merged by itself",
    only=is_bare,
)
def beside_lora(case: Case, folder: Path) -> None:
    model = get_peft_model(case.base(), case.second_config(), "sparse")
    alone = case.outputs(train_a_little(model).eval())
    base = model.get_base_model()
    inject_adapter_in_model(LoraConfig(target_modules=[case.free], init_lora_weights=False), base, "dense")
    both = case.outputs(model.eval())
    assert not torch.allclose(both, alone)
    lora, sparse = (get_peft_model_state_dict(model, adapter_name=name) for name in ("dense", "sparse"))
    assert all("lora_" in name for name in lora)
    assert all("pst_" in name for name in sparse)
    counted = zeros(model)
    merged = model.merge_and_unload(adapter_names=["sparse", "dense"])
    torch.testing.assert_close(case.outputs(merged), both)
    for name, count in counted.items():
        assert int((stored_weight(merged, name) == 0).sum()) == count


@operation(
    BESIDE,
    "PST on a layer that carries another tuner",
    "PST replaces the base weight by a masked one, which has no meaning under an update that is added outside",
    (ValueError, "already carries a peft.tuners.lora"),
)
def over_lora(case: Case, folder: Path) -> None:
    model = inject_adapter_in_model(LoraConfig(**lora_targets(case)), case.base(), "lora")
    inject_adapter_in_model(case.config(**lora_targets(case)), model, "pst")


def lora_targets(case: Case) -> dict[str, list[str]]:
    """Something that the case adapts, and LoRA can adapt too: parameters where there are some."""
    names = case.targets.get("target_parameters", [])
    module = "attn" if case.make is attentive else case.linear
    return {"target_modules": [] if names else [module], "target_parameters": names}


@operation(
    BESIDE,
    "another tuner over a layer that carries PST",
    "merging it would write below the mask, and unloading it would drop the PST adapter unseen",
    (ValueError, "over its PST adapter|is not a valid target"),
)
def under_lora(case: Case, folder: Path) -> None:
    inject_adapter_in_model(LoraConfig(**lora_targets(case)), case.pruned().get_base_model(), "lora")


@operation(
    BESIDE,
    "`add_adapter` with another tuner's configuration",
    "PEFT has one tuner in a `PeftModel`",
    (ValueError, "Cannot combine adapters with different peft types"),
)
def add_lora(case: Case, folder: Path) -> None:
    case.pruned().add_adapter("dense", LoraConfig(target_modules=[case.linear]))


@operation(
    BESIDE,
    "`PeftMixedModel`, `get_peft_model(..., mixed=True)`",
    "PEFT's list of tuners that mix is closed; use `inject_adapter_in_model` on other layers",
    (ValueError, "PST.* is not (compatible with|supported for)"),
)
def mix(case: Case, folder: Path) -> None:
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(case.base(), case.config(), mixed=True)
    case.pruned().save_pretrained(folder)
    PeftMixedModel.from_pretrained(case.base(), folder)


@operation(
    AFTER,
    "LoRA, or another tuner, trained on the merged model",
    "the masks are gone, so `merge_and_unload` fills nearly every zero; `peft_pst.merge_keeping_zeros(model)` sets "
    "back to zero what was zero in the base and says how many entries that were; `PSTConfig(keep_zeros=True)` trains "
    "within the zeros in the first place",
    only=is_bare,
)
def merge_over_zeros(case: Case, folder: Path) -> None:
    def lora() -> PeftModel:
        torch.manual_seed(2)
        config = LoraConfig(target_modules=[case.linear], init_lora_weights=False)
        return get_peft_model(case.pruned().merge_and_unload(), config)

    before = case.pruned().merge_and_unload()
    dense, (merged, kept) = lora().merge_and_unload(), merge_keeping_zeros(lora())
    assert kept
    for name, count in kept.items():
        zero = before.get_parameter(name) == 0
        assert zero.any()
        assert dense.get_parameter(name)[zero].all()
        assert not merged.get_parameter(name)[zero].any()
        assert count.zeros == count.refilled == int(zero.sum())


@operation(
    REFUSED,
    "`get_peft_model` with PST on a `PeftModel`, or with another tuner on one with PST adapters",
    "nested wrappers hide adapters from each other",
    (ValueError, "The model is a .* already, and PST is not nested with"),
)
def nest(case: Case, folder: Path) -> None:
    get_peft_model(case.pruned(), case.config())


@operation(
    REFUSED,
    "`get_peft_model` twice on one base",
    "under the same name the adapter would start afresh, unasked",
    (ValueError, "carries a PST adapter named 'default', which would lose what it learned"),
)
def make_twice(case: Case, folder: Path) -> None:
    get_peft_model(case.pruned().get_base_model(), case.config())


@operation(
    REFUSED,
    "two adapters with `bias`",
    "as with every tuner in PEFT: a bias belongs to the base, so only one trains it",
    (ValueError, "supports only 1 adapter with bias"),
    only=lambda case: not freezes_biases(case),
)
def two_biases(case: Case, folder: Path) -> None:
    case.pruned().add_adapter("other", case.config())


@operation(
    REFUSED,
    "`model(x, adapter_names=[...])`",
    "each adapter has its own masked weight, so a mixed batch would need one product per adapter",
    (ValueError, "PST cannot mix adapters within a batch"),
)
def mixed_batch(case: Case, folder: Path) -> None:
    case.pruned()(**case.inputs, adapter_names=["default"] * len(next(iter(case.inputs.values()))))


@operation(
    REFUSED,
    "`add_weighted_adapter`",
    "a weighted sum of masked weights is zero only where all of them are; activate several adapters instead",
    (NotImplementedError, "PST adapters have no weighted sum"),
)
def add_weighted(case: Case, folder: Path) -> None:
    case.two().add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")


@operation(
    REFUSED,
    "`merge_adapter` of a name that does not exist",
    "PEFT merges nothing and says nothing; a typing error would end in a dense model",
    (ValueError, r"no adapters \['nowhere'\] to merge"),
)
def merge_unknown(case: Case, folder: Path) -> None:
    case.pruned().merge_and_unload(adapter_names=["nowhere"])


@operation(
    REFUSED,
    "`delete_adapter` while merged",
    "as in PEFT: unmerge first",
    (ValueError, "Cannot delete adapter.* while they are merged"),
)
def delete_merged(case: Case, folder: Path) -> None:
    model = case.pruned()
    model.merge_adapter()
    model.delete_adapter("default")


@operation(
    REFUSED,
    "`load_adapter`, `set_peft_model_state_dict` while merged",
    "the head would be the new one, and the weights the old ones: unmerge first",
    (RuntimeError, "Nothing can be loaded into adapter 'default' while it is merged"),
)
def load_into_merged(case: Case, folder: Path) -> None:
    model = case.pruned()
    model.save_pretrained(folder)
    model.merge_adapter()
    model.load_adapter(folder, "default")


@operation(
    REFUSED,
    "a file without any tensor of the adapter",
    "PEFT only warns, and the model would be dense; what one of many ranks passes to `set_peft_model_state_dict` may "
    "be empty",
    (ValueError, "The file holds no tensor of adapter 'default'"),
)
def load_nothing(case: Case, folder: Path) -> None:
    case.pruned().save_pretrained(folder)
    save_file({}, folder / "adapter_model.safetensors")
    PeftModel.from_pretrained(case.base(), folder)


@operation(
    REFUSED,
    "`hotswap_adapter`",
    "PEFT swaps LoRA alone; `load_adapter` under the same name does it for PST",
    (ValueError, "Hotswapping only supports .* but PST was passed"),
)
def hotswap(case: Case, folder: Path) -> None:
    model = case.pruned()
    model.save_pretrained(folder)
    hotswap_adapter(model, str(folder), adapter_name="default")


@operation(
    REFUSED,
    "`convert_to_lora`",
    "a masked weight is not the base plus a low rank",
    (TypeError, "do not support LoRA conversion"),
)
def to_lora(case: Case, folder: Path) -> None:
    convert_to_lora(case.pruned(), 2)


@operation(
    REFUSED,
    "`rescale_adapter_scale`",
    "a mask has no scale between on and off; PEFT has it for LoRA",
    (ValueError, "scaling is only supported for models with `LoraLayer`s"),
)
def rescale(case: Case, folder: Path) -> None:
    with rescale_adapter_scale(case.pruned(), 0.5):
        pass


def more_than_second(case: Case) -> PSTConfig:
    return case.second_config(target_modules=[*case.second["target_modules"], case.free])


@operation(
    REFUSED,
    "an adapter saved for fewer layers",
    "the missing layers would stay dense, although the configuration promises zeros in them",
    (ValueError, "pst_.* is missing"),
)
def fewer_layers(case: Case, folder: Path) -> None:
    get_peft_model(case.base(), case.second_config()).save_pretrained(folder)
    PeftModel.from_pretrained(case.base(), folder, config=more_than_second(case))


@operation(
    REFUSED,
    "an adapter saved for more layers",
    "what it learned there would be lost unseen",
    (ValueError, "has no place in adapter 'default' of this model"),
)
def more_layers(case: Case, folder: Path) -> None:
    get_peft_model(case.base(), more_than_second(case)).save_pretrained(folder)
    PeftModel.from_pretrained(case.base(), folder, config=case.second_config())


@operation(
    REFUSED,
    "an adapter of another base or rank, also with `ignore_mismatched_sizes=True`",
    "a mask belongs to the weight that it was ranked with",
    (ValueError, "has shape"),
)
def other_base(case: Case, folder: Path) -> None:
    case.pruned().save_pretrained(folder)
    PeftModel.from_pretrained(case.base(), folder, config=case.config(r=5), ignore_mismatched_sizes=True)
