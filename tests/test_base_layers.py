"""Every kind of base layer beside the linear one, through every operation, against the formulas."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from tiny_kinds import TARGETS, kinds, token_batch
from tiny_models import assert_same_tensors, shake, snapshot
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import prune
from transformers.integrations.bitnet import AutoBitLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.pytorch_utils import Conv1D

from peft_pst import PSTConfig, PSTLayer, num_pruned, prune_once, report_model, update_sparsity
from peft_pst.kinds import kind_of
from peft_pst.linear import PSTCalledLinear, PSTLinear, only_multiplies
from peft_pst.quantised import PSTQuantisedLinear

LETTERS = "UVABRCS"


@dataclass
class Case:
    """A layer, a batch for it, and what it computes with a given weight, (rows, columns) of its matrix."""

    make: Callable[[], nn.Module]
    batch: Tensor
    compute: Callable[[nn.Module, Tensor, Tensor], Tensor]
    shape: tuple[int, int]


def convolution(number: int, size: int = 7, **options: object) -> Case:
    kind, function = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}[number]
    options = {"kernel_size": 3, "bias": True, **options}
    groups = options.get("groups", 1)

    def compute(base: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
        padding, mode = base._reversed_padding_repeated_twice, base.padding_mode
        x = F.pad(x, padding, mode="constant" if mode == "zeros" else mode)
        kernel = weight.reshape(base.weight.shape)
        bias = None if base.bias is None else base.bias.detach().to(x.dtype)
        return function(x, kernel, bias, base.stride, 0, base.dilation, base.groups)

    batch = torch.randn(2, 4, *[size] * number, generator=torch.Generator().manual_seed(1))
    return Case(lambda: kind(4, 6, **options), batch, compute, (6, 4 // groups * options["kernel_size"] ** number))


def embedding(**options: object) -> Case:
    def compute(base: nn.Module, weight: Tensor, ids: Tensor) -> Tensor:
        return F.embedding(ids, weight, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    return Case(lambda: nn.Embedding(11, 6, **options), torch.tensor([[1, 3, 3, 0], [9, 2, 0, 3]]), compute, (11, 6))


def channels_last() -> Case:
    case = convolution(2)
    make = case.make
    case.make = lambda: make().to(memory_format=torch.channels_last)
    return case


class Clamped(nn.Linear):
    """A linear layer that does more than multiply, and takes more than an input."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x).clamp(-0.5, 0.5)


class Tanh1D(Conv1D):
    """The same, with its matrix stored transposed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def clamped() -> Case:
    def compute(base: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight, base.bias.detach().to(x.dtype)).clamp(-0.5, 0.5)

    batch = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    return Case(lambda: Clamped(8, 6), batch, compute, (6, 8))


def reordered(number: int, order: tuple[int, ...]) -> Case:
    """A convolution whose weight has its dimensions in another order in memory."""
    case = convolution(number)
    make = case.make

    def made() -> nn.Module:
        layer = make()
        inverse = [order.index(i) for i in range(len(order))]
        layer.weight = nn.Parameter(layer.weight.detach().permute(order).contiguous().permute(inverse))
        return layer

    case.make = made
    return case


CASES = {
    "linear with a forward of its own": clamped(),
    "conv1d": convolution(1),
    "conv1d same": convolution(1, padding="same", dilation=2),
    "conv2d": convolution(2),
    "conv2d strided, reflecting": convolution(2, stride=2, padding=1, padding_mode="reflect", bias=False),
    "conv2d grouped, circular": convolution(2, groups=2, padding=(1, 2), padding_mode="circular"),
    "conv2d channels last": channels_last(),
    "conv1d reordered in memory": reordered(1, (2, 1, 0)),
    "conv2d reordered in memory": reordered(2, (3, 1, 2, 0)),
    "conv3d dilated, replicating": convolution(3, size=5, dilation=2, padding=1, padding_mode="replicate"),
    "embedding": embedding(),
    "embedding with padding": embedding(padding_idx=0),
    "embedding by frequency": embedding(scale_grad_by_freq=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Model(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.layer = base

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def plain(case: Case, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model(case.make()).to(dtype).eval()


def batch(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    return case.batch.to(dtype) if case.batch.is_floating_point() else case.batch


def adapted(case: Case, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    options = {"target_modules": ["layer"], "target_sparsity": 0.6, "r": 2, "score_rank": 3, "residual": 5, **options}
    model = get_peft_model(plain(case, dtype), PSTConfig(**options))
    shake(model, seed=3)
    update_sparsity(model, 10, 10)
    return model.eval()


def layer_of(model: nn.Module) -> PSTLayer:
    return next(module for module in model.modules() if isinstance(module, PSTLayer))


@torch.no_grad()
def output(model: nn.Module, case: Case) -> Tensor:
    return model(batch(case, next(model.parameters()).dtype))


def matrix(layer: PSTLayer) -> Tensor:
    return layer.get_base_layer().weight.detach().flatten(1)


def oracle_adapter(layer: PSTLayer, name: str) -> oracle.Adapter:
    factors, config = layer.get_factors(name), layer.pst_plans[name].config
    leaves = {
        letter: tensor.detach().double().requires_grad_()
        for letter, tensor in zip(LETTERS, factors.tensors, strict=True)
        if tensor is not None
    }
    scales = {"beta": config.beta, "alpha1": config.alpha1, "alpha2": config.alpha2}
    return oracle.Adapter(**leaves, positions=factors.positions, **scales, count=layer.get_num_pruned(name))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return 0.0 if difference == 0 else (difference / size).item()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("names", [["default"], ["default", "second"]], ids=["one adapter", "two adapters"])
def test_output_and_gradients_against_the_formulas(case: Case, dtype: torch.dtype, names: list[str]) -> None:
    model = adapted(case, dtype)
    if len(names) > 1:
        second = PSTConfig(target_modules=["layer"], target_sparsity=0.4, initial_sparsity=0.4, beta=0.5, r=1)
        model.add_adapter("second", second)
        model.base_model.set_adapter(names)
        shake(model, seed=4)
    layer, x = layer_of(model), batch(case, dtype)
    assert (layer.out_features, layer.in_features) == case.shape
    y = model.train()(x)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(gradient)

    adapters = [oracle_adapter(layer, name) for name in names]
    masks = [layer.get_mask(name) for name in names]
    for name, adapter, mask in zip(names, adapters, masks, strict=True):
        assert int((~mask).sum()) == layer.get_num_pruned(name) == adapter.count > 0
        if dtype == torch.float64:
            assert torch.equal(mask, oracle.mask(oracle.scores(matrix(layer), adapter), adapter.count))
    exact = x.double() if x.is_floating_point() else x
    weight = oracle.effective_weight(matrix(layer).double(), adapters, masks)
    expected = case.compute(layer.get_base_layer(), weight, exact)
    expected.backward(gradient.double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(y, expected) <= tolerance
    for name, adapter in zip(names, adapters, strict=True):
        for letter, tensor in adapter.tensors.items():
            assert relative_error(getattr(layer, f"pst_{letter}")[name].grad, tensor.grad) <= tolerance, letter


@every_case
def test_the_input_gradient_passes_when_everything_is_frozen(case: Case) -> None:
    if not case.batch.is_floating_point():
        pytest.skip("indices have no gradient")
    model = adapted(case)
    x = batch(case).requires_grad_()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    model.requires_grad_(False)
    model(x).sum().backward()
    assert relative_error(x.grad, expected) <= 1e-6


@every_case
def test_merged_unmerged_disabled_and_unloaded(case: Case) -> None:
    base, model = plain(case), adapted(case)
    before, dense = output(model, case), output(base, case)
    assert not torch.allclose(before, dense)
    with model.disable_adapter():
        assert torch.equal(output(model, case), dense)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(output(model, case), before)
    layer = layer_of(model)
    zeros = int((layer.get_base_layer().weight == 0).sum())
    assert zeros == layer.get_num_pruned("default") == num_pruned(layer.num_weights, 0.6)
    assert layer.get_base_layer().weight.stride() == base.layer.weight.stride()
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, base.layer.weight)
    assert torch.equal(output(model, case), before)
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(base.layer)
    assert torch.equal(output(merged, case), before)
    assert list(merged.state_dict()) == list(base.state_dict())


@every_case
def test_report_and_save_and_load(case: Case, tmp_path: Path) -> None:
    model = adapted(case)
    (row,) = report_model(model).layers
    assert row.shape == case.shape
    assert row.zeros == row.promised == num_pruned(row.weights, 0.6)
    model.merge_adapter()
    assert report_model(model).layers == (row,)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain(case), str(tmp_path)).eval()
    assert torch.equal(output(loaded, case), output(model, case))
    assert_same_tensors(snapshot(loaded), snapshot(model))


@every_case
def test_held_masks_stay_while_weights_move(case: Case) -> None:
    model = adapted(case, mask_interval=None, target_sparsity=0.0, residual=0)
    assert prune_once(model, 0.5) == num_pruned(layer_of(model).num_weights, 0.5) / layer_of(model).num_weights
    mask = layer_of(model).get_mask("default")
    shake(model, seed=9)
    assert torch.equal(layer_of(model).get_mask("default"), mask)
    assert torch.equal(layer_of(model).get_masked_weight() == 0, ~mask)


@every_case
def test_copies_and_pickles_are_layers_of_their_own(case: Case) -> None:
    model = adapted(case)
    expected = output(model, case)
    twin = copy.deepcopy(model)
    shake(model, seed=5)
    assert torch.equal(output(twin, case), expected)
    stored = io.BytesIO()
    torch.save(twin, stored)
    stored.seek(0)
    assert torch.equal(output(torch.load(stored, weights_only=False), case), expected)


@every_case
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case: Case, context: Callable) -> None:
    model, x = adapted(case), batch(case)
    expected = model(x).detach()
    for training in (True, False):
        with context():
            y = model.train(training)(x)
        assert not y.requires_grad
        assert torch.equal(y, expected)
    model(x).sum().backward()
    assert layer_of(model).pst_V["default"].grad is not None


@every_case
def test_bfloat16_and_autocast(case: Case) -> None:
    model = adapted(case, torch.bfloat16)
    assert relative_error(output(model, case), output(adapted(case), case)) <= 2**-5
    wide = adapted(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wide(batch(case))
        y.float().sum().backward()
    assert relative_error(y, output(wide, case)) <= 2**-6
    assert layer_of(wide).pst_V["default"].grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "conv2d",
        "conv2d grouped, circular",
        "embedding",
        "linear with a forward of its own",
        "conv1d reordered in memory",
    ],
)
def test_a_training_step_compiles_into_one_graph(name: str) -> None:
    case = CASES[name]
    model = adapted(case, residual=0)
    x = batch(case)
    model.train()(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for name, gradient in expected.items():
        assert relative_error(model.get_parameter(name).grad, gradient) <= 1e-5, name


def test_hooks_on_the_base_layer_run() -> None:
    model, case, seen = adapted(CASES["conv2d"]), CASES["conv2d"], []
    layer_of(model).get_base_layer().register_forward_hook(lambda *arguments: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(model, case)
    assert seen


def test_a_forward_of_the_bases_own_is_kept() -> None:
    """Scaled embeddings, as some language models have them, stay scaled."""

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 3.0

    case = embedding()
    case.make = lambda: Scaled(11, 6)
    model = adapted(case)
    assert torch.equal(output(model, case), 3.0 * F.embedding(case.batch, layer_of(model).get_masked_weight()))


def test_a_linear_with_a_forward_of_its_own_gets_what_it_takes() -> None:
    """By place and by name; with the adapter in force, merged and disabled."""
    model, case = adapted(CASES["linear with a forward of its own"]), CASES["linear with a forward of its own"]
    layer, x = layer_of(model), case.batch
    product = F.linear(x, layer.get_masked_weight(), layer.get_base_layer().bias)
    expected = 3.0 * product.clamp(-0.5, 0.5)
    assert not torch.equal(expected, 3.0 * layer.get_base_layer()(x))
    assert torch.equal(layer(x, 3.0), expected)
    assert torch.equal(layer(x, scale=3.0), expected)
    model.merge_adapter()
    assert torch.equal(layer(x, scale=3.0), expected)
    with model.disable_adapter():
        assert torch.equal(layer(x, scale=3.0), 3.0 * layer.get_base_layer()(x))


def test_a_forward_put_on_the_layer_itself_runs() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 6)
    base.forward = lambda x: 2.0 * nn.Linear.forward(base, x)
    model = get_peft_model(Model(base), PSTConfig(target_modules=["layer"], initial_sparsity=0.5)).eval()
    layer, x = layer_of(model), torch.randn(3, 8)
    assert torch.equal(model(x), 2.0 * F.linear(x, layer.get_masked_weight(), base.bias))


def test_a_transposed_matrix_with_a_forward_of_its_own() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Model(Tanh1D(6, 8)), PSTConfig(target_modules=["layer"], initial_sparsity=0.5)).eval()
    layer, x = layer_of(model), torch.randn(3, 8)
    before = model(x)
    torch.testing.assert_close(before, F.linear(x, layer.get_masked_weight(), layer.get_base_layer().bias).tanh())
    assert torch.equal(model.merge_and_unload()(x), before)


@pytest.mark.parametrize("base", [nn.Linear(8, 6), Conv1D(6, 8)], ids=["Linear", "Conv1D"])
def test_a_plain_linear_refuses_what_it_does_not_take(base: nn.Module) -> None:
    model = get_peft_model(Model(base), PSTConfig(target_modules=["layer"], initial_sparsity=0.5))
    layer, x = layer_of(model), torch.randn(3, 8)
    own_name = "x" if isinstance(base, Conv1D) else "input"
    assert torch.equal(layer(**{own_name: x}), layer(x))
    for args, kwargs in (((x,), {"scale": 2.0}), ((x, 2.0), {}), ((), {})):
        for model.base_model.model.layer._disable_adapters in (False, True):
            with pytest.raises(TypeError):
                layer(*args, **kwargs)
    layer._disable_adapters = False
    with pytest.raises(TypeError, match=r"Layer layer takes its input and nothing else, as .*\['scale'\] by name"):
        layer(x, scale=2.0)


def bitnet(online: bool) -> nn.Module:
    layer = AutoBitLinear(8, 6, online_quant=online, use_rms_norm=True)
    if not online:
        layer.weight_scale.fill_(0.25)
    return layer


def grouped() -> nn.Module:
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")  # not in the oldest supported
    return module.DeepseekV4GroupedLinear(8, 6, 2)


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: bitnet(online=False), torch.randn(4, 8)),
        (lambda: bitnet(online=True), torch.randn(4, 8)),
        (lambda: IdeficsDecoupledLinear(8, 6, 2, bias=False), torch.randn(4, 8)),
        (grouped, torch.randn(4, 2, 8)),
        (lambda: FalconLinear(8, 6), torch.randn(4, 8)),
    ],
    ids=["bitnet", "bitnet online", "idefics", "deepseek v4", "falcon"],
)
def test_linears_of_transformers_start_as_they_are_and_merge_as_they_ran(
    make: Callable[[], nn.Module], batch: Tensor
) -> None:
    torch.manual_seed(0)
    base = make().eval()
    with torch.no_grad():
        expected = base(batch)
        model = get_peft_model(Model(base), PSTConfig(target_modules=["layer"], target_sparsity=0.5, r=2)).eval()
        assert torch.equal(model(batch), expected)
        shake(model, seed=3)
        update_sparsity(model, 1, 1)
        pruned = model(batch)
        assert not torch.allclose(pruned, expected)
        assert torch.equal(model.merge_and_unload()(batch), pruned)


def test_what_only_multiplies_is_multiplied_without_a_copy_of_the_weight() -> None:
    class Named(nn.Linear):
        pass

    for base, kind in (
        (Named(8, 6), PSTLinear),
        (FalconLinear(8, 6, bias=False), PSTLinear),
        (FalconLinear(8, 6), PSTCalledLinear),  # adds its bias in a step of its own
        (Clamped(8, 6), PSTCalledLinear),
    ):
        model = get_peft_model(Model(base), PSTConfig(target_modules=["layer"]))
        assert type(layer_of(model)) is kind


def test_the_padding_row_is_never_updated() -> None:
    case = embedding(padding_idx=0)
    torch.manual_seed(0)
    base = case.make()
    model = get_peft_model(Model(base), PSTConfig(target_modules=["layer"], r=2, residual=66, target_sparsity=0.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(case.batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = layer_of(model).get_masked_weight()
    assert torch.equal(weight[0], base.weight[0])
    assert not torch.allclose(weight[3], base.weight[3])


def test_an_error_leaves_the_base_its_own_weight() -> None:
    model = adapted(CASES["embedding"])
    own = layer_of(model).get_base_layer().weight
    with pytest.raises(IndexError):
        model(torch.tensor([99]))
    assert layer_of(model).get_base_layer().weight is own


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.ConvTranspose2d(4, 6, 3), r"layer \(ConvTranspose2d\).*by input channel.*target_modules"),
        (nn.Embedding(5, 4, max_norm=1.0), r"max_norm=1\.0 rescales"),
        (nn.Embedding(5, 4, sparse=True), "sparse=True.*set sparse to False"),
        (nn.EmbeddingBag(5, 4), r"EmbeddingBag\) is not supported: PST adapts torch\.nn\.Linear"),
        (nn.LazyConv2d(4, 3), "has no shape yet"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), "parametrization.*remove_parametrizations"),
        (
            nn.utils.spectral_norm(nn.Linear(4, 4)),
            r"nn\.utils\.spectral_norm, so.*call torch\.nn\.utils\.remove_spectral_n",
        ),
        (
            old_weight_norm(nn.Linear(4, 4)),
            r"by torch\.nn\.utils\.weight_norm, so.*call torch\.nn\.utils\.remove_weight_n",
        ),
        (
            prune.identity(nn.Linear(4, 4), "weight"),
            r"by torch\.nn\.utils\.prune, so.*utils\.prune\.remove first",
        ),
        (nn.Linear(4, 4).to(torch.float8_e4m3fn), r"stored as torch\.float8_e4m3fn; dequantise"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(layer: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        get_peft_model(Model(layer), PSTConfig(target_modules=["layer"]))


def test_a_forward_of_its_own_that_dequantising_would_pass_over_is_refused() -> None:
    """torchao keeps the class of a layer; bitsandbytes and HQQ put their own, which multiply, in its place."""
    torchao, bitsandbytes = (
        SimpleNamespace(backend_name=name, supports_merge=True) for name in ("torchao", "bnb 4bit")
    )
    assert kind_of(nn.Linear(8, 6), nn.Sequential(), "up", torchao) is PSTQuantisedLinear
    assert kind_of(Clamped(8, 6), nn.Sequential(), "up", bitsandbytes) is PSTQuantisedLinear
    with pytest.raises(ValueError, match=r"up \(Clamped\).*its forward is its own.*without quantising it"):
        kind_of(Clamped(8, 6), nn.Sequential(), "up", torchao)


@pytest.mark.parametrize("trained", [False, True])
def test_an_offloaded_linear_with_a_forward_of_its_own(trained: bool) -> None:
    case = CASES["linear with a forward of its own"]
    model = adapted(case)
    expected = output(model, case)
    layer = layer_of(model)
    cpu_offload(layer.get_base_layer(), execution_device=torch.device("cpu"))
    assert layer.get_base_layer().weight.is_meta
    with torch.set_grad_enabled(trained):
        y = model(case.batch)
    assert torch.equal(y.detach(), expected)
    assert layer.get_base_layer().weight.is_meta
    if trained:
        y.sum().backward()
        assert layer.pst_V["default"].grad.abs().sum() > 0


def test_a_plain_linear_stays_plain_behind_a_hook_of_accelerates() -> None:
    base = nn.Linear(8, 6)
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert only_multiplies(base)
    clamped = Clamped(8, 6)
    cpu_offload(clamped, execution_device=torch.device("cpu"))
    assert not only_multiplies(clamped)


def test_a_forward_of_its_own_that_torch_would_pass_over_is_refused() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    block.linear1 = Clamped(8, 8)
    with pytest.raises(
        ValueError, match=r"linear1 \(Clamped\).*TransformerEncoderLayer reads its weight.*target_modules"
    ):
        get_peft_model(Model(block), PSTConfig(target_modules=["linear1"]))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp1_around_one_process_computes_with_the_masked_weights(one_process: None) -> None:
    # It makes plain attributes of the parameters, and a module finds these before what is put in its parameters' place.
    model = get_peft_model(kinds(), PSTConfig(initial_sparsity=0.5, target_sparsity=0.5, r=2, **TARGETS)).eval()
    ids = token_batch(1)
    with torch.no_grad():
        expected = model(ids)
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        torch.testing.assert_close(sharded(ids), expected)
        with model.disable_adapter():
            assert not torch.allclose(sharded(ids), expected)
