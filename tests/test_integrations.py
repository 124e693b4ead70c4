"""Real runs of a few steps in other libraries: TRL, sentence-transformers and diffusers (`make test-integrations`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny_models import assert_same_tensors, layers_of, shake, train_a_little
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_pst import PSTCallback, PSTConfig, get_sparsity, update_sparsity
from peft_pst.masking import num_pruned

COMMON: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}
CAUSAL = {"task_type": "CAUSAL_LM", "target_sparsity": 0.5, "r": 2, "score_rank": 2}
PREFERENCES = {"prompt": ["a b", "c d"] * 8, "chosen": [" e f", " a a"] * 8, "rejected": [" g", " b c d"] * 8}


def assert_pruned_as_promised(model: nn.Module, sparsity: float = 0.5) -> None:
    assert layers_of(model)
    for layer in layers_of(model).values():
        expected = num_pruned(layer.num_weights, sparsity)
        assert int((layer.get_masked_weight(["default"]) == 0).sum()) == expected


def causal(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def sparsities(trainer: Any) -> list[float]:
    return [logs["sparsity"] for logs in trainer.state.log_history if "loss" in logs]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_supervised_fine_tuning_in_trl(gpt2: str, tmp_path: Path, checkpointing: bool) -> None:
    trl = pytest.importorskip("trl")
    trainer = trl.SFTTrainer(
        model=causal(gpt2),
        args=trl.SFTConfig(tmp_path, **COMMON, bf16=False, max_length=16, gradient_checkpointing=checkpointing),
        train_dataset=Dataset.from_dict({"text": ["a b c d e f"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(gpt2),
        peft_config=PSTConfig(**CAUSAL),
        callbacks=[PSTCallback()],
    )
    trainer.train()
    assert sparsities(trainer)[-1] == pytest.approx(0.5, abs=1e-3)
    assert_pruned_as_promised(trainer.model)
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(causal(gpt2), tmp_path / "adapter")
    assert_same_tensors(get_peft_model_state_dict(loaded), get_peft_model_state_dict(trainer.model))


def preference_trainer(model: Any, folder: str, output: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output, **COMMON, bf16=False, max_length=16, precompute_ref_log_probs=False),
        train_dataset=Dataset.from_dict(PREFERENCES),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[PSTCallback()],
        **options,
    )


def test_preferences_in_trl_with_the_dense_base_as_reference(gpt2: str, tmp_path: Path) -> None:
    trainer = preference_trainer(causal(gpt2), gpt2, tmp_path, peft_config=PSTConfig(**CAUSAL))
    assert trainer.ref_model is None
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0  # the adapter has not changed the base yet
    assert_pruned_as_promised(trainer.model)


def test_preferences_in_trl_with_a_trained_adapter_as_reference(gpt2: str, tmp_path: Path) -> None:
    config = PSTConfig(**CAUSAL, initial_sparsity=0.5)
    model = train_a_little(get_peft_model(causal(gpt2), config))
    before = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    trainer = preference_trainer(model, gpt2, tmp_path)
    assert_same_tensors(get_peft_model_state_dict(model, adapter_name="ref"), before)
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["rewards/chosen"]) < 1e-5
    assert_same_tensors(get_peft_model_state_dict(model, adapter_name="ref"), before)
    after = get_peft_model_state_dict(model)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_sentence_transformers(bert: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = library.SentenceTransformer(bert, device="cpu")
    dense = model.encode(["a b"], convert_to_tensor=True)
    model.add_adapter(PSTConfig(target_sparsity=0.5, r=2, score_rank=2))
    trainer = library.SentenceTransformerTrainer(
        model=model,
        args=library.SentenceTransformerTrainingArguments(tmp_path, **COMMON),
        train_dataset=Dataset.from_dict(
            {"sentence1": ["a b c", "d"] * 8, "sentence2": ["d e", "f"] * 8, "score": [0.5, 1.0] * 8}
        ),
        loss=losses.CosineSimilarityLoss(model),
        callbacks=[PSTCallback()],
    )
    trainer.train()
    assert_pruned_as_promised(model)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert get_sparsity(loaded) == get_sparsity(model)
    assert torch.equal(loaded.encode(["a b"], convert_to_tensor=True), model.encode(["a b"], convert_to_tensor=True))
    model.disable_adapters()
    assert torch.equal(model.encode(["a b"], convert_to_tensor=True), dense)


def tiny_unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def tiny_dit() -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def noise_inputs(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {"timestep": torch.tensor([3, 7])}
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    if type(model).__name__ == "UNet2DConditionModel":
        text = torch.randn(2, 5, 8, generator=generator)
        return inputs | {"sample": latents, "encoder_hidden_states": text}
    return inputs | {"hidden_states": latents, "class_labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("make", [tiny_unet, tiny_dit])
def test_diffusion_models(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make().eval()
    base.save_pretrained(tmp_path / "base")
    inputs = noise_inputs(base)
    config = PSTConfig(target_sparsity=0.5, r=2, score_rank=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in (1, 2):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update_sparsity(model, step, total_steps=2)
    assert_pruned_as_promised(model)
    with torch.no_grad():
        expected = model.eval()(**inputs).sample
        model.save_pretrained(tmp_path / "adapter")
        stock = type(base).from_pretrained(tmp_path / "base").eval()
        loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter")
        assert torch.equal(loaded(**inputs).sample, expected)
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = type(base).from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(merged(**inputs).sample, expected)


def test_the_adapter_methods_of_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_unet().eval()
    inputs = noise_inputs(model)
    with torch.no_grad():
        dense = model(**inputs).sample
        model.add_adapter(PSTConfig(target_sparsity=0.5, target_modules=["to_q", "to_v"]), adapter_name="mine")
        shake(model, 0)
        update_sparsity(model, 1, total_steps=1)
        pruned = model(**inputs).sample
        assert not torch.allclose(pruned, dense)
        model.disable_adapters()
        assert torch.equal(model(**inputs).sample, dense)
        model.enable_adapters()
        assert torch.equal(model(**inputs).sample, pruned)
