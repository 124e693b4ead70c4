"""The update of token embeddings: against the formula in plain torch, in PEFT's life of an adapter, and where it is."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_pst import PSTConfig, compare_sparsity, get_sparsity, parameter_groups, report_model, update_sparsity
from peft_pst.embedding import PSTEmbeddingUpdate, updated_rows
from peft_pst.targets import find_token_embeddings

IDS = torch.tensor([[5, 9, 5, 0], [1, 2, 0, 0]])
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 48}
NAME = "bert.embeddings.word_embeddings"


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)).eval()


def adapted(base: nn.Module | None = None, **options: object) -> PeftModel:
    settings = {"target_sparsity": 0.5, "r": 2, "score_rank": 2, "embedding_r": 3, **options}
    return get_peft_model(bert() if base is None else base, PSTConfig(**settings))


def embedding_of(model: nn.Module) -> PSTEmbeddingUpdate:
    (found,) = (module for module in model.modules() if isinstance(module, PSTEmbeddingUpdate))
    return found


def shake(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pst_" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
        for module in model.modules():
            if isinstance(module, PSTEmbeddingUpdate) and module.get_base_layer().padding_idx is not None:
                for U in module.pst_embedding_U.values():
                    U[module.get_base_layer().padding_idx] = 0.0  # as it stays in training


def slow_rows(weight: Tensor, U: Tensor, V: Tensor, beta: float, ids: Tensor) -> Tensor:
    """One row after another, in float64."""
    table = [weight[token].double() + beta * sum(u * v for u, v in zip(U[token].double(), V.double(), strict=True))
             for token in range(len(weight))]  # fmt: skip
    return torch.stack(table)[ids]


def test_comparing_sees_the_updated_rows() -> None:
    """An embedding with zeros of its own loses them to an update, and the comparison says so before merging."""
    base = bert()
    with torch.no_grad():
        base.get_input_embeddings().weight[1:, 0] = 0
    masks = {NAME: base.get_input_embeddings().weight != 0}
    model = adapted(base)
    assert compare_sparsity(model, masks).lost == 0
    shake(embedding_of(model))
    assert compare_sparsity(model, masks).lost == 47  # not the padding's
    with model.disable_adapter():
        assert compare_sparsity(model, masks).lost == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_is_the_same_by_itself_and_among_all(tokens: int, dim: int, r: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens * 100 + dim)
    rows, U, V = (torch.randn(shape, generator=generator) for shape in ((tokens, dim), (tokens, r), (r, dim)))
    rows = rows.to(dtype)
    whole = updated_rows(rows, U, V, 0.7)
    assert whole.dtype == dtype
    alone = torch.stack([updated_rows(rows[i], U[i], V, 0.7) for i in range(tokens)])
    assert torch.equal(alone, whole)
    expected = slow_rows(rows, U, V, 0.7, torch.arange(tokens))
    assert torch.allclose(whole.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.06)


def test_lookup_and_gradients_are_those_of_the_formula() -> None:
    model = adapted(beta=0.5)
    layer = embedding_of(model)
    shake(layer)
    table, U, V = (
        tensor.detach().clone().requires_grad_()
        for tensor in (layer.weight, layer.pst_embedding_U["default"], layer.pst_embedding_V["default"])
    )
    expected = nn.functional.embedding(IDS, table + 0.5 * U @ V, padding_idx=0)
    found = layer.train()(IDS)
    assert torch.allclose(found, expected, atol=1e-6)
    (found * torch.arange(16)).sum().backward()
    (expected * torch.arange(16)).sum().backward()
    assert torch.allclose(layer.pst_embedding_U["default"].grad, U.grad, atol=1e-4)
    assert torch.allclose(layer.pst_embedding_V["default"].grad, V.grad, atol=1e-4)
    assert layer.pst_embedding_U["default"].grad.any()
    assert layer.weight.grad is None


def test_in_evaluation_only_the_peft_model_trains_embeddings_and_a_step_without_is_told() -> None:
    model = adapted()
    update_sparsity(model, 0, 10)
    assert not model.get_input_embeddings()(IDS).requires_grad
    with torch.no_grad():
        model(IDS)
    with warnings.catch_warnings(action="error"):
        model.train()(IDS).logits.sum().backward()
        update_sparsity(model, 1, 10)
    assert model.get_input_embeddings()(IDS).requires_grad
    model.zero_grad()
    with warnings.catch_warnings(action="error"):
        model.eval()(IDS).logits.sum().backward()
        update_sparsity(model, 1, 10)
    assert embedding_of(model).pst_embedding_V["default"].grad is not None
    assert not model.get_input_embeddings()(IDS).requires_grad
    model.get_base_model()(IDS).logits.sum().backward()
    with pytest.warns(UserWarning, match=f"the update of {NAME} does not train; call model.train()"):
        update_sparsity(model, 2, 10)
    with warnings.catch_warnings(action="error"):
        update_sparsity(model, 3, 10)


def test_the_model_starts_unchanged_and_is_dense_again_when_disabled() -> None:
    base = bert()
    model = adapted(copy.deepcopy(base)).eval()
    assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    shake(model)
    assert not torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_saved_loaded_merged_and_unmerged_bit_for_bit(tmp_path: Path) -> None:
    base = bert()
    model = adapted(copy.deepcopy(base), task_type="SEQ_CLS")
    update_sparsity(model, 10, 10)
    shake(model)
    model.eval()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert loaded.peft_config["default"].embedding_modules == [NAME]
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    model.merge_adapter()
    assert torch.equal(model(input_ids=IDS).logits, expected)
    model.unmerge_adapter()
    assert torch.equal(embedding_of(model).weight, base.get_input_embeddings().weight)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain.get_input_embeddings()) is nn.Embedding
    assert torch.equal(plain(input_ids=IDS).logits, expected)
    assert torch.equal(plain.get_input_embeddings().weight[0], base.get_input_embeddings().weight[0])  # the padding


def test_a_broken_update_is_not_merged() -> None:
    model = adapted()
    embedding_of(model).pst_embedding_V["default"].data.fill_(torch.nan)
    embedding_of(model).pst_embedding_U["default"].data.fill_(1.0)
    before = embedding_of(model).weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        embedding_of(model).merge(safe_merge=True)
    assert torch.equal(embedding_of(model).weight, before)


def test_embeddings_are_never_pruned_and_not_counted() -> None:
    model = adapted(llama())
    assert update_sparsity(model, 10, 10) == get_sparsity(model) == 0.5
    assert report_model(model).sparsity == 0.5
    assert not any("embed" in row.name for row in report_model(model).layers)
    embedding_of(model).merge()
    assert not (embedding_of(model).weight == 0).any()


def test_zeros_of_the_base_stay_where_they_are_to() -> None:
    base = bert()
    with torch.no_grad():
        base.get_input_embeddings().weight[:, ::2] = 0
    model = adapted(base, keep_zeros=True)
    shake(embedding_of(model))
    layer = embedding_of(model).eval()
    assert not layer(IDS)[..., ::2].any()
    assert layer(IDS)[..., 1::2][IDS != 0].all()
    expected = layer(IDS)
    assert torch.equal(layer.get_weight_in_force()[IDS], expected)
    layer.merge()
    assert torch.equal(layer(IDS), expected)
    assert torch.equal(layer.get_weight_in_force(), layer.weight)


def test_several_adapters_add_their_updates() -> None:
    model = adapted()
    model.add_adapter("second", PSTConfig(embedding_r=2, beta=2.0))
    layer = embedding_of(model)
    shake(layer)
    alone = {}
    for name in ("default", "second"):
        layer.set_adapter(name)
        alone[name] = layer(IDS) - layer.base_layer(IDS)
    layer.set_adapter(["default", "second"])
    assert torch.allclose(layer(IDS), layer.base_layer(IDS) + alone["default"] + alone["second"], atol=1e-5)
    both = layer.eval()(IDS)
    layer.merge()
    assert torch.equal(layer(IDS), both)
    layer.unmerge()
    model.delete_adapter("second")
    assert list(layer.pst_embedding_U) == ["default"]


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        (bert, {}, [NAME]),
        (llama, {}, ["model.embed_tokens"]),
        (lambda: llama(tied=True), {}, []),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=48)), {}, []),
        (bert, {"r": 0}, None),
        (bert, {"embedding_r": 0}, None),
        (bert, {"modules_to_save": ["word_embeddings"]}, []),
        (bert, {"target_modules": ["query"]}, None),
        (bert, {"target_modules": ["query"], "embedding_modules": ["word_embeddings"]}, ["word_embeddings"]),
    ],
)
def test_which_embeddings_are_updated(base, options, expected) -> None:  # type: ignore[no-untyped-def]
    model = adapted(base(), **options)
    assert model.peft_config["default"].embedding_modules == expected
    found = [name for name, module in model.named_modules() if isinstance(module, PSTEmbeddingUpdate)]
    assert len(found) == len(expected or [])


def test_the_published_setting_leaves_embeddings_alone() -> None:
    assert PSTConfig.paper().embedding_r == PSTConfig.dsee().embedding_r == 0


def test_other_lookups_are_left_alone() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 4 * super().forward(input)

    base = bert()
    for other in (Scaled(48, 16), nn.Embedding(48, 16, max_norm=1.0), nn.Embedding(48, 16, sparse=True)):
        base.set_input_embeddings(other)
        assert find_token_embeddings(base) == []
    assert find_token_embeddings(nn.Linear(2, 2)) == []


def test_the_update_learns_at_the_rate_of_the_others() -> None:
    groups = {group["name"]: group["params"] for group in parameter_groups(adapted(), lr=1.0)}
    layer = embedding_of(adapted())
    sizes = [parameter.shape for parameter in groups["weight_update"]]
    assert layer.pst_embedding_U["default"].shape in sizes
    assert layer.pst_embedding_V["default"].shape in sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_r": -1}, "embedding_r=-1 is not a rank"),
        ({"embedding_r": 1000}, "embedding_r=1000 is above 64"),
        ({"embedding_r": 0, "embedding_modules": ["word_embeddings"]}, "get no update, because embedding_r=0"),
        (
            {"target_modules": ["query"], "embedding_modules": ["value"]},
            "value, named in embedding_modules, is a Linear",
        ),
    ],
)
def test_what_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(**options)


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"target_modules": ["query", "word_embeddings"]}, "target_modules, which prunes it"),
        ({"target_modules": r".*(query|word_embeddings)"}, "target_modules, which prunes it"),
        ({"target_modules": ["query"], "exclude_modules": [NAME]}, "exclude_modules, which leaves it out"),
        ({"exclude_modules": r".*embeddings.*"}, "exclude_modules, which leaves it out"),
        ({"modules_to_save": ["word_embeddings"]}, "modules_to_save, which leaves it out"),
        ({"target_modules": ["query"], "modules_to_save": ["embeddings"]}, "modules_to_save, which leaves it out"),
    ],
)
def test_an_embedding_that_is_named_for_something_else_too_is_refused(options: dict, other: str) -> None:
    base = bert()
    message = f"^{NAME} is named in embedding_modules, which updates it and leaves it dense, and in {other}; name it in"
    with pytest.raises(ValueError, match=message):
        adapted(base, embedding_modules=["word_embeddings"], **options)
    assert type(base.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["word_embeddings"]},
        {"exclude_modules": r".*embeddings.*"},
        {"modules_to_save": ["word_embeddings"]},
        {"modules_to_save": ["embeddings"]},
    ],
)
def test_where_nobody_names_the_embeddings_others_have_them(options: dict, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = adapted(**options)
        assert model.peft_config["default"].embedding_modules == []
        if options != {"modules_to_save": ["embeddings"]}:  # which PEFT itself loses on the way to the file
            model.save_pretrained(tmp_path)
            PeftModel.from_pretrained(bert(), str(tmp_path))


def test_a_name_that_matches_nothing_is_told() -> None:
    with pytest.warns(
        RuntimeWarning, match=r"embedding_modules did not match any module and were ignored: \['tokns'\]"
    ):
        model = adapted(target_modules=["query"], embedding_modules=["word_embeddings", "tokns"])
    embedding_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        adapted()
        adapted(target_modules=["query"], embedding_modules=[NAME])


@pytest.mark.parametrize("name", ["word_embeddings", "query"])
def test_what_carries_an_adapter_is_not_trained_in_full_beside_it(name: str) -> None:
    model = adapted()
    with torch.no_grad():
        before = model(IDS).logits
    with pytest.raises(ValueError, match=rf"{name} is named in modules_to_save, but adapters \['default'\].*delete"):
        model.add_adapter("second", PSTConfig(target_modules=["key"], modules_to_save=[name]))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    with pytest.raises(ValueError, match="delete the adapters first"):
        inject_adapter_in_model(
            PSTConfig(target_modules=["key"], modules_to_save=[name]), model.get_base_model(), "second"
        )
    assert set(model.peft_config) == {"default"}
    model.add_adapter("second", PSTConfig(target_modules=["key"], modules_to_save=["pooler"]))


def test_an_adapter_injected_from_its_tensors_names_each_module_once() -> None:
    state = get_peft_model_state_dict(adapted())
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    config = PSTConfig(r=2, score_rank=2, embedding_r=3)
    base = inject_adapter_in_model(config, bert(), state_dict=state)
    assert config.embedding_modules == [NAME]
    assert NAME not in config.target_modules
    assert embedding_of(base).module_name == NAME
    inject_adapter_in_model(PSTConfig.from_peft_type(**config.to_dict()), bert())


def test_tied_embeddings_are_refused_where_they_are_asked_for() -> None:
    message = "are one tensor, .*an update would change all of them.*embedding_modules, or set embedding_r=0"
    with pytest.raises(ValueError, match=message):
        adapted(llama(tied=True), embedding_modules=["embed_tokens"])


def test_a_tie_made_after_the_update_names_the_remedy_when_merging() -> None:
    model = adapted(llama())
    base = model.get_base_model()
    base.lm_head.weight = base.model.embed_tokens.get_base_layer().weight
    with pytest.raises(ValueError, match=r"Merging model\.embed_tokens is refused.*an update would change all of them"):
        model.merge_adapter()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    (key,) = (key for key in state if "pst_embedding_V" in key)
    for damaged in (state[key] * torch.nan, state[key][:1].clone()):
        save_file({**state, key: damaged}, path)
        with pytest.raises(ValueError, match=f"Layer {NAME}, adapter 'default': pst_embedding_V"):
            PeftModel.from_pretrained(bert(), tmp_path)


def gradient_of_eval_step(compute) -> Tensor | None:  # type: ignore[no-untyped-def]
    model = adapted().eval()
    compute(model)
    return embedding_of(model).pst_embedding_U["default"].grad


def test_which_forwards_train_embeddings_in_evaluation() -> None:
    def partly(model: PeftModel) -> None:
        model.train().get_base_model().bert.eval()
        model(IDS).logits.sum().backward()

    def nested(model: PeftModel) -> None:
        def again(*_: object) -> None:
            hook.remove()
            model(IDS)

        hook = model.get_base_model().bert.register_forward_pre_hook(again)
        model(IDS).logits.sum().backward()

    def by_the_tuner(model: PeftModel) -> None:
        model.base_model(IDS).logits.sum().backward()

    def after_an_error(model: PeftModel) -> None:
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            model(IDS, inputs_embeds=torch.zeros(2, 4, 16))
        model.get_base_model()(IDS).logits.sum().backward()

    for compute in (partly, nested, by_the_tuner):
        assert gradient_of_eval_step(compute) is not None, compute.__name__
    assert gradient_of_eval_step(after_an_error) is None


def test_an_update_that_another_tuner_put_in_trains_too() -> None:
    model = adapted(embedding_r=0)
    inject_adapter_in_model(PSTConfig(), model.get_base_model(), "other")
    model.set_adapter("other")
    model.eval()(IDS).logits.sum().backward()
    assert embedding_of(model).pst_embedding_U["other"].grad is not None


def test_one_forward_compiles_with_and_without_gradients() -> None:
    model = adapted().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(IDS)
    compiled(IDS).logits.sum().backward()
    assert embedding_of(model).pst_embedding_U["default"].grad is not None


def test_forwards_of_two_threads_do_not_meet() -> None:
    model, direct = adapted().eval(), []
    hook = model.get_base_model().bert.register_forward_pre_hook(
        lambda *_: direct.append(in_thread(lambda: model.get_input_embeddings()(IDS).requires_grad))
    )
    assert in_thread(lambda: model(IDS).logits.requires_grad)
    hook.remove()
    assert direct == [False]


def in_thread(compute):  # type: ignore[no-untyped-def]
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def test_a_step_is_told_by_its_own_lookups_alone() -> None:
    model = adapted()
    with warnings.catch_warnings(action="error"):
        model.train()(IDS)
        model.eval().get_input_embeddings()(IDS)  # such as an attribution, between step and schedule
        update_sparsity(model, 1, 10)
    model.get_base_model()(IDS)
    with torch.no_grad():
        model(IDS)
    with pytest.warns(UserWarning, match="does not train; call model.train"):
        update_sparsity(model, 2, 10)
