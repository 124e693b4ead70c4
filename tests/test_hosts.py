"""Attention modules and stacks of experts: matrices that a module holds as parameters, each ranked on its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from test_base_layers import oracle_adapter, relative_error
from tiny_models import assert_same_tensors, layers_of, shake, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MixtralConfig, MixtralForCausalLM

from peft_pst import PSTConfig, merge_keeping_zeros, num_pruned, prune_once, report_model, update_sparsity
from peft_pst.keeping import KeptZeros

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Attending(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attn(query, key, value)[0]


ATTENTIONS = {
    "fused": {},
    "without biases, sequence first": {"bias": False, "batch_first": False},
    "separate": {"kdim": 6, "vdim": 10},
    "with bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
}
every_attention = pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)


def attention(options: dict[str, object]) -> Attending:
    torch.manual_seed(0)
    # Frozen as PEFT will have it, since torch chooses its kernels by who wants a gradient.
    return Attending(**options).eval().requires_grad_(False)


def batch(options: dict[str, object]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 5, 8, generator=generator)
    if "kdim" not in options:
        return query, query, query  # one and the same tensor: what torch's fast path asks for
    key, value = (torch.randn(2, 7, options[name], generator=generator) for name in ("kdim", "vdim"))
    return query, key, value


def adapted(base: nn.Module, **options: object) -> PeftModel:
    config = PSTConfig(**{"target_modules": ["attn"], "target_sparsity": 0.6, "r": 2, "score_rank": 3, **options})
    model = get_peft_model(base, config)
    shake(model, seed=3)
    update_sparsity(model, 10, 10)
    return model.eval()


@torch.no_grad()
def output(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model(*inputs)


# Attention


@every_attention
@pytest.mark.parametrize("names", [["default"], ["default", "second"]], ids=["one adapter", "two adapters"])
def test_attention_against_the_formulas(options: dict[str, object], names: list[str]) -> None:
    """The module with each weight replaced by what autograd of the formulas makes of it."""
    base = attention(options).double()
    model = adapted(copy.deepcopy(base), residual=5)
    if len(names) > 1:
        model.add_adapter("second", PSTConfig(target_modules=["attn"], initial_sparsity=0.4, r=1))
        model.base_model.set_adapter(names)
        shake(model, seed=4)
    inputs = [tensor.double() for tensor in batch(options)]
    y = model.train()(*inputs)
    y.square().sum().backward()

    leaves, weights = {}, {}
    for name, layer in layers_of(model).items():
        path = name.removeprefix("base_model.model.").replace("base_layer.", "").replace("matrices.", "")
        stored = f"{path}.weight" if path.endswith("out_proj") else path.removesuffix(".0")
        weight = base.get_parameter(stored)
        parts = 3 if stored.endswith("in_proj_weight") else 1
        leaves[name] = [oracle_adapter(layer, adapter) for adapter in names]
        for adapter, ours in zip(leaves[name], names, strict=True):
            size = weight.numel() // parts
            masks = [
                oracle.mask(part, layer.get_counts(ours)[0]) for part in oracle.scores(weight, adapter).chunk(parts)
            ]
            assert torch.equal(layer.get_mask(ours), torch.cat(masks))
            assert layer.get_counts(ours) == (num_pruned(size, 0.6 if ours == "default" else 0.4),) * parts
        masks = [layer.get_mask(adapter) for adapter in names]
        weights[stored] = oracle.effective_weight(weight, leaves[name], masks)
    expected = torch.func.functional_call(base.train(), weights, tuple(inputs))
    expected.square().sum().backward()
    assert relative_error(y, expected) <= 1e-12
    for name, layer in layers_of(model).items():
        for adapter, ours in zip(leaves[name], names, strict=True):
            for letter, tensor in adapter.tensors.items():
                assert relative_error(getattr(layer, f"pst_{letter}")[ours].grad, tensor.grad) <= 1e-10, (name, letter)


@every_attention
def test_attention_merged_unmerged_disabled_and_unloaded(options: dict[str, object], tmp_path: Path) -> None:
    base, inputs = attention(options), batch(options)
    model = adapted(copy.deepcopy(base))
    dense, before = output(base, *inputs), output(model, *inputs)
    assert not torch.allclose(before, dense)
    torch.testing.assert_close(model(*inputs).detach(), before)  # the slow path, since its weights want gradients
    with model.disable_adapter():
        assert torch.equal(output(model, *inputs), dense)
    rows = report_model(model).layers
    assert all(row.zeros == row.promised for row in rows)
    assert {row.name.rpartition(".")[2] for row in rows} >= {"out_proj"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(output(loaded, *inputs), before)
    assert_same_tensors(snapshot(loaded), snapshot(model))
    model.merge_adapter(safe_merge=True)
    assert torch.equal(output(model, *inputs), before)
    assert report_model(model).layers == rows
    model.unmerge_adapter()
    assert torch.equal(output(model, *inputs), before)
    merged = model.merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention
    assert type(merged.attn.out_proj) is type(base.attn.out_proj)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert torch.equal(output(merged, *inputs), before)
    assert torch.equal(output(loaded.unload(), *inputs), dense)


def test_query_key_and_value_are_ranked_apart_also_by_a_pattern_of_their_own() -> None:
    base = attention({})
    base.attn.in_proj_weight.data[:8] *= 100  # the queries, by far the largest
    model = adapted(base, sparsity_pattern={"attn": 0.5, "out_proj": 0.25}, r=0, score_rank=0)
    layers = {layer.module_name: layer for layer in layers_of(model).values()}
    assert layers["attn.in_proj_weight"].get_counts("default") == (32, 32, 32)
    assert layers["attn.out_proj"].get_num_pruned("default") == 16
    assert [int((part == 0).sum()) for part in layers["attn.in_proj_weight"].get_masked_weight().chunk(3)] == [32] * 3


@pytest.mark.parametrize(
    ("targets", "adapted_layers"),
    [
        (["0"], {"tail.0"}),  # as the matrices of a parameter are numbered too
        ("attn.*", {"attn.in_proj_weight", "attn.out_proj"}),
        (["out_proj"], {"attn.out_proj"}),
        (["attn", "0"], {"attn.in_proj_weight", "attn.out_proj", "tail.0"}),
    ],
    ids=str,
)
def test_a_second_adapter_reaches_what_it_names(targets: list[str] | str, adapted_layers: set[str]) -> None:
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "tail": nn.Sequential(nn.Linear(8, 8))})
    model = get_peft_model(base, PSTConfig(target_modules=["attn"]))
    names = [name for name, _ in model.named_modules()]
    model.add_adapter("second", PSTConfig(target_modules=targets, r=1))
    layers = {layer.module_name: layer for layer in layers_of(model).values() if "second" in layer.pst_plans}
    assert set(layers) == adapted_layers
    added = {name for name, _ in model.named_modules()} - set(names)
    assert all(name.startswith("base_model.model.tail.0.") for name in added)


def test_the_output_projection_can_be_adapted_alone() -> None:
    base, inputs = attention({}), batch({})
    model = adapted(copy.deepcopy(base), target_modules=["out_proj"])
    (layer,) = layers_of(model).values()
    expected = copy.deepcopy(base)
    expected.attn.out_proj.weight.data = layer.get_masked_weight()
    assert torch.equal(output(model, *inputs), output(expected, *inputs))
    model(*inputs).sum().backward()
    assert layer.pst_U["default"].grad is not None
    assert torch.equal(output(model.merge_and_unload(), *inputs), output(expected, *inputs))


@pytest.mark.parametrize("targets", [["self_attn", "linear1", "linear2"], ["out_proj"], ["linear2"]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_reads_the_weights_in_force(targets: list[str], padded: bool) -> None:
    """Its fast paths in evaluation take weights without calling any layer, also with nested tensors."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    base = nn.TransformerEncoder(block, 2).eval().requires_grad_(False)
    x = torch.randn(3, 4, 8)
    padding = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool() if padded else None
    run = torch.no_grad()(lambda model: model(x, src_key_padding_mask=padding))
    dense = run(base)
    model = adapted(copy.deepcopy(base), target_modules=targets)
    before = run(model)
    assert not torch.allclose(before, dense)
    with model.disable_adapter():
        assert torch.equal(run(model), dense)
    if not padded:
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-5, atol=1e-5)  # with gradients: layer by layer
    model.train()(x, src_key_padding_mask=padding).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().merge_adapter()
    assert torch.equal(run(model), before)
    assert torch.equal(run(model.merge_and_unload()), before)


# Experts


def mixtral(implementation: str = "eager") -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, experts_implementation=implementation))
    return model.eval().requires_grad_(False)


TOKENS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def sparse_mixtral(implementation: str = "eager", **options: object) -> PeftModel:
    return adapted(mixtral(implementation), target_modules=[], target_parameters=EXPERTS, **options)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_each_expert_is_a_matrix_of_its_own(implementation: str) -> None:
    model = sparse_mixtral(implementation, residual=5)
    layers = {layer.module_name: layer for layer in layers_of(model).values()}
    names = [f"model.layers.{i}.mlp.{name}.{expert}" for i in (0, 1) for name in EXPERTS for expert in (0, 1, 2)]
    assert sorted(layers) == sorted(names)
    dense, weights = mixtral(implementation), {}
    for name, layer in layers.items():
        stack, _, expert = name.rpartition(".")
        weight = dense.get_parameter(stack)[int(expert)].double()
        adapter = oracle_adapter(layer, "default")
        assert adapter.count == num_pruned(weight.numel(), 0.6)
        assert torch.equal(layer.get_mask("default"), oracle.mask(oracle.scores(weight, adapter), adapter.count))
        exact = oracle.effective_weight(weight, [adapter], [layer.get_mask("default")])
        weights[name] = exact.detach().float()
    for stack in {name.rpartition(".")[0] for name in weights}:
        dense.get_parameter(stack).data = torch.stack([weights[f"{stack}.{expert}"] for expert in (0, 1, 2)])
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


def test_gradients_of_experts_against_the_formulas() -> None:
    """One step of the experts module by itself, in float64, every token to two experts."""
    model = sparse_mixtral().double().train()
    host = model.base_model.model.model.layers[0].mlp.experts
    x = torch.randn(9, 16, dtype=torch.float64)
    index, share = torch.tensor([[0, 1], [1, 2], [2, 0]]).repeat(3, 1), torch.rand(9, 2, dtype=torch.float64)
    y = host(x, index, share)
    y.square().sum().backward()
    expected = torch.zeros_like(x)
    adapters = {}
    for expert in range(3):
        weight = {}
        for name in ("gate_up_proj", "down_proj"):
            layer = host.matrices[name][expert]
            adapter = adapters[name, expert] = oracle_adapter(layer, "default")
            dense = getattr(host.base_layer, name)[expert]
            weight[name] = oracle.effective_weight(dense, [adapter], [layer.get_mask("default")])
        gate, up = F.linear(x, weight["gate_up_proj"]).chunk(2, dim=-1)
        routed = (share * (index == expert)).sum(1, keepdim=True)
        expected = expected + routed * F.linear(F.silu(gate) * up, weight["down_proj"])
    expected.square().sum().backward()
    assert relative_error(y, expected) <= 1e-12
    for (name, expert), adapter in adapters.items():
        for letter, tensor in adapter.tensors.items():
            gradient = getattr(host.matrices[name][expert], f"pst_{letter}")["default"].grad
            assert relative_error(gradient, tensor.grad) <= 1e-10, (name, expert, letter)


def test_experts_merged_unmerged_disabled_saved_and_unloaded(tmp_path: Path) -> None:
    base, model = mixtral(), sparse_mixtral()
    dense, before = logits(base), logits(model)
    torch.testing.assert_close(model(TOKENS).logits.detach(), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), dense)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(mixtral(), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded), before)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), before)
    assert all(row.zeros == row.promised == num_pruned(row.weights, 0.6) for row in report_model(model).layers)
    model.unmerge_adapter()
    assert_same_tensors(snapshot(model.unload()), snapshot(base))
    merged = loaded.merge_and_unload()
    assert torch.equal(logits(merged), before)
    # transformers stores experts one by one and under other names; the zeros survive the way there and back.
    merged.save_pretrained(tmp_path / "merged")
    reloaded = MixtralForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager").eval()
    assert torch.equal(logits(reloaded), before)


def test_a_second_adapter_on_experts_and_its_deletion() -> None:
    model = sparse_mixtral()
    first = logits(model)
    second = PSTConfig(target_modules=[], target_parameters=EXPERTS[:1], initial_sparsity=0.7, target_sparsity=0.7, r=1)
    model.add_adapter("second", second)
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, first)
    layer = next(iter(layers_of(model).values()))
    kept = layer.get_mask("default") & layer.get_mask("second")
    assert torch.equal(layer.get_masked_weight() != 0, kept)
    model.merge_adapter()
    assert torch.equal(logits(model), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_experts_beside_the_linears_of_the_blocks_by_default() -> None:
    model = get_peft_model(mixtral(), PSTConfig(target_parameters=EXPERTS, sparsity_pattern={EXPERTS[0]: 0.5}, r=1))
    kinds = {row.name.split(".", 3)[3]: row.target_sparsity for row in report_model(model).layers}
    assert kinds["self_attn.q_proj"] == kinds["mlp.experts.down_proj.2"] == 0.9
    assert kinds["mlp.experts.gate_up_proj.0"] == 0.5


def test_patterns_keyed_by_a_parameter_do_not_warn() -> None:
    options = {"rank_pattern": {"experts.down_proj": 1}, "score_rank_pattern": {"gate_up_proj.2": 5}}
    config = PSTConfig(target_modules=[], target_parameters=EXPERTS, r=2, score_rank=3, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = get_peft_model(mixtral(), config)
        attending = get_peft_model(
            attention({}), PSTConfig(target_modules=["attn"], rank_pattern={"in_proj_weight": 1})
        )
    expected, ranks = {}, {}
    for layer in layers_of(model).values():
        name = layer.module_name
        expected[name] = (1 if "down_proj" in name else 2, 5 if name.endswith("gate_up_proj.2") else 3)
        ranks[name] = (len(layer.pst_V["default"]), len(layer.pst_B["default"]))
    assert ranks == expected
    assert {len(layer.pst_V["default"]) for layer in layers_of(attending).values()} == {1, 8}


def test_zeros_are_kept_and_counted_where_a_module_holds_several_weights() -> None:
    pruned = sparse_mixtral().merge_and_unload()
    zeros = {name: int((p == 0).sum()) for name, p in pruned.named_parameters() if "experts" in name}
    merged, kept = merge_keeping_zeros(sparse_mixtral())
    assert torch.equal(logits(merged), logits(pruned))
    assert kept == {name: KeptZeros(count, 0) for name, count in zeros.items()}
    lora = LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
    with pytest.warns(UserWarning, match="weights that PST has pruned"):
        model = get_peft_model(pruned, lora)
    merged, kept = merge_keeping_zeros(model)
    assert kept == {name: KeptZeros(count, count) for name, count in zeros.items()}
    attending, inputs = adapted(attention({})), batch({})
    before = output(attending, *inputs)
    merged, kept = merge_keeping_zeros(attending)
    assert torch.equal(output(merged, *inputs), before)
    assert set(kept) == {"attn.in_proj_weight", "attn.out_proj.weight"}


def test_held_masks_of_experts() -> None:
    model = sparse_mixtral(mask_interval=None, target_sparsity=0.0)
    assert prune_once(model, 0.5) == 0.5
    masks = {name: layer.get_mask("default") for name, layer in layers_of(model).items()}
    shake(model, seed=7)
    assert all(torch.equal(layer.get_masked_weight() == 0, ~masks[name]) for name, layer in layers_of(model).items())


def test_transposed_stacks_are_ranked_as_out_by_in() -> None:
    class Transposed(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 6, 4))  # (experts, in, out)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x.expand(2, -1, -1), self.weight)

    torch.manual_seed(0)
    x, base = torch.randn(3, 6), nn.ModuleDict({"experts": Transposed()})
    base.forward = lambda x: base["experts"](x)
    model = get_peft_model(
        base, PSTConfig(target_modules=[], target_parameters=["experts.weight"], initial_sparsity=0.5, residual=3)
    ).eval()
    shake(model, seed=2)
    layers = list(layers_of(model).values())
    assert [(layer.out_features, layer.in_features) for layer in layers] == [(4, 6)] * 2
    expected = torch.stack([x @ layer.get_masked_weight().T for layer in layers])
    before = output(model, x)
    torch.testing.assert_close(before, expected)
    model.merge_adapter()
    assert torch.equal(output(model, x), before)


@pytest.mark.parametrize(
    ("parameter", "match"),
    [("proj.weight", "Linear is adapted as a whole.*target_modules"), ("norm.scale", r"it has the shape \(3,\)")],
)
def test_parameters_that_are_no_matrices_are_refused(parameter: str, match: str) -> None:
    norm = nn.Module()
    norm.scale = nn.Parameter(torch.ones(3))
    model = nn.ModuleDict({"proj": nn.Linear(3, 3), "norm": norm})
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, PSTConfig(target_modules=[], target_parameters=[parameter]))


# Compiled


def train(model: nn.Module, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs of three training steps in which the sparsity rises, and of an evaluation after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    outputs = []
    for step in (1, 2, 3):
        outputs.append(forward(*inputs))
        outputs[-1].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_sparsity(model, step, 3)
    model.eval()
    return [*outputs, output(forward, *inputs)]


def graphs_of_compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """The number of graphs, once the numbers of the compiled model have been compared with the eager one's."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    eager, compiled = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    expected = train(eager, eager, inputs)
    actual = train(compiled, torch.compile(compiled, backend=graphs, fullgraph=True), inputs)
    assert not torch.allclose(expected[0], expected[-1])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    return graphs.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fused", "separate"])
def test_attention_compiles_into_one_graph_for_training_and_one_for_evaluation(name: str) -> None:
    config = PSTConfig(target_modules=["attn"], target_sparsity=0.6, r=2, score_rank=3)
    model = get_peft_model(attention(ATTENTIONS[name]), config)
    assert graphs_of_compiled(model, batch(ATTENTIONS[name])) == 2


class Routed(nn.Module):
    """The experts of a layer with a fixed router."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = mixtral("batched_mm").model.layers[0].mlp.experts

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([[0, 1], [1, 2], [2, 0]]).repeat(3, 1)
        return self.experts(x, index, torch.full((9, 2), 0.5))


@pytest.mark.slow
def test_experts_compile_into_one_graph_for_training_and_one_for_evaluation() -> None:
    config = PSTConfig(target_modules=[], target_parameters=EXPERTS, target_sparsity=0.6, r=2, score_rank=3)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    assert graphs_of_compiled(get_peft_model(Routed(), config), (x,)) == 2


class Projecting(nn.Module):
    """A matrix of its own beside a layer, as in CLIP's vision model; `inner` for one within another."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.proj = nn.Parameter(torch.randn(8, 8) / 3)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc(x)) @ self.proj
        return x if self.inner is None else self.inner(x)


def projecting() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"vis": Projecting(Projecting()), "head": nn.Linear(8, 3)})


def projected(model: nn.Module) -> Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base["head"](base["vis"](x))


EVERYTHING: dict[str, object] = {"target_modules": ["fc", "head"], "target_parameters": ["vis.proj", "inner.proj"]}
ALL_NAMES = {"head", "vis.fc", "vis.inner.fc", "vis.proj", "vis.inner.proj"}


def names_with(model: nn.Module, adapter_name: str) -> set[str]:
    return {layer.module_name for layer in layers_of(model).values() if adapter_name in layer.pst_plans}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (EVERYTHING, ALL_NAMES),
        ({"target_modules": ["fc"]}, {"vis.fc", "vis.inner.fc"}),
        ({"target_modules": [], "target_parameters": ["inner.proj"]}, {"vis.inner.proj"}),
        ({"target_modules": "all-linear"}, {"head", "vis.fc", "vis.inner.fc"}),
    ],
    ids=["all", "layers inside", "one parameter inside", "all-linear"],
)
def test_a_second_adapter_reaches_what_is_inside_a_host(
    options: dict[str, object], expected: set[str], tmp_path: Path
) -> None:
    model = adapted(projecting(), **EVERYTHING)
    assert names_with(model, "default") == ALL_NAMES
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter("second", PSTConfig(target_sparsity=0.5, initial_sparsity=0.5, r=1, **options))  # type: ignore[arg-type]
    assert names_with(model, "second") == expected
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model.set_adapter("second")
    shake(model, seed=4)
    outputs = projected(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(projecting(), str(tmp_path / "second"))
    assert torch.equal(projected(loaded), outputs)
    loaded = PeftModel.from_pretrained(projecting(), str(tmp_path), adapter_name="first")
    loaded.load_adapter(str(tmp_path / "second"), "second")
    loaded.set_adapter("second")
    assert torch.equal(projected(loaded), outputs)


@pytest.mark.parametrize("merge", [True, False])
def test_nothing_is_left_inside_a_host_that_is_unloaded(merge: bool) -> None:
    base = projecting()
    model = adapted(copy.deepcopy(base), **EVERYTHING)
    outputs = projected(model) if merge else projected(base)
    plain = model.merge_and_unload() if merge else model.unload()
    assert {name: type(module) for name, module in plain.named_modules()} == {
        name: type(module) for name, module in base.named_modules()
    }
    assert list(plain.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(projected(plain), outputs)


def test_an_adapter_of_one_projection_loads_with_and_without_the_others(tmp_path: Path) -> None:
    inputs = batch({})
    model = adapted(attention({}), target_modules=["attn"])
    model.add_adapter("out", PSTConfig(target_sparsity=0.5, initial_sparsity=0.5, target_modules=["out_proj"], r=1))
    model.set_adapter("out")
    shake(model, seed=4)
    outputs = output(model, *inputs)
    model.save_pretrained(tmp_path)
    folder = str(tmp_path / "out")
    alone = PeftModel.from_pretrained(attention({}), folder).eval()
    torch.testing.assert_close(output(alone, *inputs), outputs)
    alone.load_adapter(str(tmp_path), "first")
    torch.testing.assert_close(output(alone, *inputs), outputs)
    alone.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    beside = PeftModel.from_pretrained(attention({}), str(tmp_path), adapter_name="first").eval()
    for number, saved in enumerate((folder, str(tmp_path / "again"))):
        beside.load_adapter(saved, f"out{number}")
        beside.set_adapter(f"out{number}")
        torch.testing.assert_close(output(beside, *inputs), outputs)


def test_the_status_is_regular_where_adapters_are_on_different_matrices() -> None:
    model = adapted(projecting(), target_modules=[], target_parameters=["vis.proj"])
    model.add_adapter("second", PSTConfig(target_modules=[], target_parameters=["inner.proj"]))
    model.base_model.set_adapter(["default", "second"])
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        status = model.get_model_status()
        assert "irregular" not in (status.enabled, status.active_adapters, *status.requires_grad.values())


def test_what_is_adapted_inside_is_not_saved_in_full_as_well() -> None:
    model = adapted(projecting(), target_modules=["head"], target_parameters=["vis.proj"])
    with pytest.raises(ValueError, match="Module vis is named in modules_to_save"):
        model.add_adapter("second", PSTConfig(target_modules=["head"], modules_to_save=["vis"]))
    assert names_with(model, "default") == {"head", "vis.proj"}
    assert not names_with(model, "second")
