"""Coupled groups: the arithmetic of their scores and masks, and that what is found in a model belongs together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import net
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    FalconConfig,
    FalconModel,
    GPT2Config,
    GPT2Model,
    GPTBigCodeConfig,
    GPTBigCodeModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    MptConfig,
    MptModel,
    OPTConfig,
    OPTModel,
    Phi3Config,
    Phi3Model,
    PhiConfig,
    PhiModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)
from transformers.pytorch_utils import Conv1D

from peft_pst import Projections, PSTConfig, find_heads, find_neurons
from peft_pst.coupling import CoupledGroups, Part, group_masks, group_scores

# Arithmetic


@st.composite
def coupled(draw: st.DrawFn) -> CoupledGroups:
    """Groups in the rows of two matrices, of which the second has two ranges, and in the columns of a third."""
    num_groups, widths = draw(st.integers(1, 5)), [draw(st.integers(1, 3)) for _ in range(4)]
    before, size = draw(st.integers(0, 2)), draw(st.integers(1, 4))
    first, second, third, columns = (num_groups * width for width in widths)
    parts = (
        Part("a", 0, before, widths[0], (before + first, size)),
        Part("b", 0, 0, widths[1], (second + third, size)),
        Part("b", 0, second, widths[2], (second + third, size)),
        Part("c", 1, 0, widths[3], (size, columns)),
    )
    return CoupledGroups("block", "heads", num_groups, parts)


def group_of(part: Part, num_groups: int, row: int, column: int) -> int | None:
    for group in range(num_groups):
        begin = part.start + group * part.width
        if begin <= (row, column)[part.axis] < begin + part.width:
            return group
    return None


@given(coupled(), st.data())
def test_scores_and_masks_entry_by_entry(groups: CoupledGroups, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shapes = {part.module: part.shape for part in groups.parts}
    scores = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=groups.num_groups, max_size=groups.num_groups)))
    expected = [0.0] * groups.num_groups
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for part in groups.parts:
        for row in range(part.shape[0]):
            for column in range(part.shape[1]):
                group = group_of(part, groups.num_groups, row, column)
                if group is not None:
                    expected[group] += scores[part.module][row, column].item()
                    masks[part.module][row, column] &= keep[group]
    torch.testing.assert_close(group_scores(groups, scores), torch.tensor(expected, dtype=torch.float64))
    actual = group_masks(groups, keep)
    assert actual.keys() == masks.keys() == set(groups.modules)
    assert all(torch.equal(actual[name], mask) for name, mask in masks.items())


NEURONS = CoupledGroups("mlp", "neurons", 2, (Part("up", 0, 0, 1, (2, 3)), Part("down", 1, 0, 1, (3, 2))))


def test_narrow_scores_are_summed_in_float32() -> None:
    scores = {"up": torch.full((2, 3), 1000.0), "down": torch.ones(3, 2)}
    narrow = {name: matrix.to(torch.bfloat16) for name, matrix in scores.items()}
    assert torch.equal(group_scores(NEURONS, narrow), torch.tensor([3003.0, 3003.0]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The scores of down have shape None, but the neurons of mlp lie in a matrix"):
        group_scores(NEURONS, {"up": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"The scores of up have shape \(3, 2\), but .* of shape \(2, 3\)"):
        group_scores(NEURONS, {"up": torch.ones(3, 2), "down": torch.ones(3, 2)})
    for keep in (torch.ones(3, dtype=torch.bool), torch.ones(2)):
        with pytest.raises(ValueError, match=r"boolean tensor of shape \(2,\), one value for each of the neurons of"):
            group_masks(NEURONS, keep)


# Architectures

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SHAPE, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**TEXT)),
    "bert-cross": lambda: BertModel(BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)),
    "deberta-v2": lambda: DebertaV2Model(DebertaV2Config(**TEXT)),
    "albert": lambda: AlbertModel(AlbertConfig(**TEXT, embedding_size=8)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=40, dim=16, n_heads=4, n_layers=2, hidden_dim=24)
    ),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**TEXT, attn_implementation="eager")),
    "vit": lambda: ViTModel(ViTConfig(**SHAPE, image_size=8, patch_size=4)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_inner=24)),
    "opt": lambda: OPTModel(
        OPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24)
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**TEXT)),
    "llama-grouped": lambda: LlamaModel(LlamaConfig(**TEXT, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8)),
    "phi": lambda: PhiModel(PhiConfig(**TEXT)),
    "phi3": lambda: Phi3Model(Phi3Config(**TEXT, num_key_value_heads=2)),
    "gpt-neox": lambda: GPTNeoXModel(GPTNeoXConfig(**TEXT)),
    "bloom": lambda: BloomModel(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4)),
    "falcon": lambda: FalconModel(FalconConfig(**FALCON, multi_query=False)),
    "falcon-grouped": lambda: FalconModel(FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "gpt-bigcode": lambda: GPTBigCodeModel(
        GPTBigCodeConfig(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_inner=24, multi_query=False)
    ),
    "mpt": lambda: MptModel(MptConfig(vocab_size=40, d_model=16, n_heads=4, n_layers=2)),
    "t5": lambda: T5Model(T5Config(**T5)),
    "t5-gated": lambda: T5Model(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "bart": lambda: BartModel(
        BartConfig(**BART, encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20)
    ),
}
FALCON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 24}
GROUPED = ("llama-grouped", "qwen3", "phi3", "falcon-grouped")
FOUR_TIMES = ("bloom", "mpt")  # neurons for each feature, whatever the configuration says


def made(kind: str) -> PreTrainedModel:
    """Weights large enough that every head and neuron matters, and no bias zero."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    config = model.config
    if config.model_type == "vit":
        return model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)).last_hidden_state
    tokens = {"input_ids": torch.tensor([[3, 7, 11, 30], [5, 2, 39, 1]])}
    if getattr(config, "add_cross_attention", False):
        tokens["encoder_hidden_states"] = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16)
    if config.is_encoder_decoder:
        tokens["decoder_input_ids"] = torch.tensor([[1, 8, 9], [4, 4, 2]])
    return model(**tokens).last_hidden_state


@torch.no_grad()
def change(model: nn.Module, groups: CoupledGroups, group: int, axis: int, value: float) -> None:
    """Add to (rows and their biases) or multiply (columns) what a group has in each of its matrices."""
    for part in groups.parts:
        if part.axis != axis:
            continue
        module = model.get_submodule(part.module)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        assert weight.shape == part.shape
        lines = slice(part.start + group * part.width, part.start + (group + 1) * part.width)
        if axis:
            weight[:, lines] *= value
        else:
            weight[lines] += value * torch.randn(weight[lines].shape)
            if module.bias is not None:
                module.bias[lines] += value


def assert_belongs_together(model: nn.Module, groups: CoupledGroups) -> None:
    """Where the columns of a group are zero, its rows have nothing to say, and those of other groups have."""
    last = groups.num_groups - 1
    change(model, groups, last, axis=1, value=0.0)
    before = answer(model)
    change(model, groups, last, axis=0, value=1.0)
    torch.testing.assert_close(answer(model), before)
    change(model, groups, 0, axis=0, value=1.0)
    assert not torch.allclose(answer(model), before, atol=1e-3)


def number(kind: str, groups: CoupledGroups) -> int:
    """Of heads or neurons, as the configurations have it."""
    in_bart_decoder = kind == "bart" and groups.name.startswith("decoder")
    if groups.kind == "heads":
        return 2 if kind in GROUPED or in_bart_decoder else 4
    return 64 if kind in FOUR_TIMES else 20 if in_bart_decoder else 24


@pytest.mark.parametrize("kind", MODELS)
def test_the_rows_of_a_group_are_read_by_its_columns_alone(kind: str) -> None:
    model = made(kind)
    for find in (find_heads, find_neurons):
        for groups in find(model):
            assert groups.num_groups == number(kind, groups), groups.name
            assert_belongs_together(model, groups)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_of_a_block_is_missed_or_in_two_groups(kind: str) -> None:
    model = made(kind)
    found = [*find_heads(model), *find_neurons(model)]
    assert len({(groups.kind, groups.name) for groups in found}) == len(found)
    blocks = {"bert-cross": 6, "t5": 10, "t5-gated": 10, "bart": 10, "albert": 2}.get(kind, 4)
    assert len(found) == blocks
    for groups in found:
        masks = group_masks(groups, torch.zeros(groups.num_groups, dtype=torch.bool))
        assert not any(mask.any() for mask in masks.values()), groups.name
        covered = sum(groups.num_groups * part.width * part.shape[1 - part.axis] for part in groups.parts)
        assert covered == sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
@pytest.mark.parametrize("config", [PSTConfig, LoraConfig])
def test_the_same_is_found_with_adapters(config: type[PSTConfig | LoraConfig], kind: str) -> None:
    heads, neurons = find_heads(made(kind)), find_neurons(made(kind))
    options = {"fan_in_fan_out": kind == "gpt2"} if config is LoraConfig else {}
    adapted = get_peft_model(made(kind), config(target_modules="all-linear", **options))
    assert find_heads(adapted) == find_heads(adapted.base_model) == heads
    assert find_neurons(adapted) == find_neurons(adapted.base_model) == neurons


# Names given by the user


class Attention(nn.Module):
    def __init__(self, rows: int = 48) -> None:
        super().__init__()
        self.mixer, self.out = nn.Linear(16, rows), nn.Linear(16, 16)


def test_projections_named_by_the_user() -> None:
    neurons = find_neurons(net(), [Projections(("up",), "down")])
    assert [(groups.name, groups.num_groups) for groups in neurons] == [("layers.0", 12), ("layers.1", 12)]
    model = nn.Sequential(Attention())
    (stacked,) = find_heads(model, [Projections(("mixer",), "out")], num_heads=4)
    inputs = [Part("0.mixer", 0, start, 4, (48, 16)) for start in (0, 16, 32)]
    assert stacked == ("0", "heads", 4, (*inputs, Part("0.out", 1, 0, 4, (16, 16))))
    (mixed,) = find_heads(model, [Projections(("mixer",), "out", interleaved=True)], num_heads=4)
    assert mixed.parts == (Part("0.mixer", 0, 0, 12, (48, 16)), stacked.parts[-1])
    (shared,) = find_heads(nn.Sequential(Attention(32)), [Projections(("mixer",), "out")], num_heads=4)
    inputs = [Part("0.mixer", 0, start, width, (32, 16)) for start, width in ((0, 8), (16, 4), (24, 4))]
    assert shared == ("0", "heads", 2, (*inputs, Part("0.out", 1, 0, 8, (16, 16))))


def test_what_is_not_understood_is_refused() -> None:
    for find, what in ((find_heads, "attention layer"), (find_neurons, "feed-forward")):
        with pytest.raises(
            ValueError, match=rf"no {what} whose projections bear names that are known.*'layers\.0\.up'"
        ):
            find(net())
        with pytest.raises(ValueError, match=rf"no {what} whose projections bear the names given"):
            find(made("bert"), [Projections(("wi",), "wo")])
    model = nn.Sequential(Attention())
    with pytest.raises(ValueError, match=r"The number of heads of 0 is not known.*Pass num_heads"):
        find_heads(model, [Projections(("mixer",), "out")])
    for heads in (3, 32):
        with pytest.raises(ValueError, match=rf"0 is not made of {heads} heads of one width: .* 48 rows"):
            find_heads(model, [Projections(("mixer",), "out")], num_heads=heads)
    with pytest.raises(ValueError, match=r"The neurons of 0 are not understood: 0\.mixer have \[48\] rows, but"):
        find_neurons(model, [Projections(("mixer",), "out")])


def test_one_matrix_of_query_key_and_value_is_divided_only_where_the_type_of_the_model_is_known() -> None:
    model = made("gpt2")
    model.config.model_type = "other"
    with pytest.raises(ValueError, match="no attention layer whose projections bear names that are known"):
        find_heads(model)
