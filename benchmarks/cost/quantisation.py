"""Linear layers as torchao, bitsandbytes and HQQ store them: what the tests and the benchmarks quantise with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def torchao_int8(linear: nn.Linear) -> nn.Module:
    """8 bits a weight and a scale a row, in place; it computes in the precision that the layer had."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def bitsandbytes_int8(linear: nn.Linear) -> nn.Module:
    """8 bits a weight and a scale a row."""
    import bitsandbytes

    sizes = linear.in_features, linear.out_features
    quantised = bitsandbytes.nn.Linear8bitLt(*sizes, bias=linear.bias is not None, has_fp16_weights=False)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to(linear.weight.device)


def bitsandbytes_nf4(linear: nn.Linear) -> nn.Module:
    """4 bits a weight, a scale in 8 bits for every 64, as in QLoRA; it computes in the precision that the layer had."""
    import bitsandbytes

    sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    quantised = bitsandbytes.nn.Linear4bit(
        *sizes, bias=linear.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight, options = linear.weight.detach(), {"quant_type": "nf4", "module": quantised}
    quantised.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options)
    quantised.bias = linear.bias
    return quantised.to(linear.weight.device)


def hqq_int4(linear: nn.Linear) -> nn.Module:
    """4 bits a weight, a scale and a zero point for every 64; it computes in the precision that the layer had."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    weight, config = linear.weight, BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear, config, compute_dtype=weight.dtype, device=weight.device.type)


QUANTISATIONS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao-int8": torchao_int8,
    "bitsandbytes-int8": bitsandbytes_int8,
    "bitsandbytes-nf4": bitsandbytes_nf4,
    "hqq-int4": hqq_int4,
}


def quantise_linears(model: nn.Module, how: str) -> None:
    """Put a quantised layer in the place of each `nn.Linear` of a model, one after another; dense ones are let go.

    Args:
        model: changed in place.
        how: a key of `QUANTISATIONS`.
    """
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        model.set_submodule(name, QUANTISATIONS[how](dense.requires_grad_(False)))
        torch.cuda.empty_cache()
