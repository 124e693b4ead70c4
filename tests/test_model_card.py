"""The README.md of an adapter folder says how the adapter is loaded, how sparse it is, what it was trained with."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny_models import net, outputs, pruned_net, tiny_bert, tiny_gpt2, train_a_little, two_adapters
from transformers import Trainer, TrainingArguments

from peft_pst import PSTCallback, PSTConfig, update_model_card
from peft_pst.model import pst_layers
from peft_pst.model_card import CARD_NAME, StoredZeros, stored_zeros


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / CARD_NAME)


def test_save_pretrained_writes_what_push_to_hub_uploads(tmp_path: Path) -> None:
    base = tiny_gpt2()
    base.name_or_path = "somebody/tiny"
    model = train_a_little(get_peft_model(base, PSTConfig(task_type="CAUSAL_LM", target_sparsity=0.7)))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    card = card_of(tmp_path)
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {"peft_pst", "pruning", "sparsity"} <= set(card.data.tags)
    assert "An adapter for `somebody/tiny`" in card.text
    zeros = sum(layer.get_num_pruned("default") for layer in pst_layers(model))
    weights = sum(layer.num_weights for layer in pst_layers(model))
    assert (
        f"{zeros:,} of {weights:,} entries ({zeros / weights:.2%}) of 8 weight matrices are exactly zero" in card.text
    )
    assert "| target_sparsity | 0.7 |" in card.text
    assert card.text.index("# Model Card") < card.text.index("## Sparse training") < card.text.index("## Model Details")
    assert "### Framework versions" in card.text  # of PEFT's own


def test_the_code_on_the_card_runs(tmp_path: Path) -> None:
    model = pruned_net()
    model.save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(import peft_pst.*?)```", card_of(tmp_path).text, re.DOTALL)
    names = {"base_model": net()}
    exec(code.replace("path/to/this/folder", str(tmp_path)), names)
    assert torch.equal(outputs(names["pruned"]), outputs(model))


def test_saving_again_and_metrics_write_one_section(tmp_path: Path) -> None:
    model = pruned_net()
    model.save_pretrained(tmp_path)
    update_model_card(tmp_path, {"eval_accuracy": 0.93456, "eval_samples": 8})
    text = card_of(tmp_path).text
    assert "| eval_accuracy | 0.9346 |\n| eval_samples | 8 |" in text
    (tmp_path / CARD_NAME).write_text((tmp_path / CARD_NAME).read_text() + "\nWritten by hand.\n")
    model.update_sparsity(4, 10)
    model.save_pretrained(tmp_path)
    again = card_of(tmp_path).text
    assert again.count("## Sparse training") == 1
    assert "eval_accuracy" not in again  # they belong to other weights
    assert "Written by hand." in again
    zeros = stored_zeros(tmp_path / "adapter_model.safetensors")
    assert zeros is not None
    assert f"With it, {zeros.zeros} of 384 entries" in again


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"r": 0, "score_rank": 0}, {"structured": False}, {"bias": "all"}], ids=str
)
def test_zeros_are_those_of_the_file(tmp_path: Path, options: dict[str, object]) -> None:
    pruned_net(**options).save_pretrained(tmp_path)
    assert stored_zeros(tmp_path / "adapter_model.safetensors") == StoredZeros(layers=4, zeros=4 * 57, weights=384)


def test_sizes_that_the_file_does_not_tell(tmp_path: Path) -> None:
    pruned_net(r=0, score_rank=0, structured=False, residual=4).save_pretrained(tmp_path)
    zeros = stored_zeros(tmp_path / "adapter_model.safetensors")
    assert zeros == StoredZeros(layers=4, zeros=4 * 57, weights=None)
    assert str(zeros) == "With it, 228 entries of 4 weight matrices are exactly zero."


def test_a_configuration_alone_writes_no_card(tmp_path: Path) -> None:
    PSTConfig().save_pretrained(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json"}
    assert isinstance(PSTConfig.from_pretrained(str(tmp_path)), PSTConfig)


def test_a_card_is_made_where_there_is_none(tmp_path: Path) -> None:
    pruned_net().save_pretrained(tmp_path)
    (tmp_path / CARD_NAME).unlink()
    update_model_card(tmp_path)
    assert "import peft_pst" in card_of(tmp_path).text
    with pytest.raises(FileNotFoundError):
        update_model_card(tmp_path / "nowhere")


def test_an_adapter_of_another_name_has_its_card_above(tmp_path: Path) -> None:
    model = get_peft_model(net(), PSTConfig(), adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "mine" / CARD_NAME).exists()
    loaded = PeftModel.from_pretrained(net(), tmp_path / "mine")
    assert loaded.get_sparsity() == 0
    assert section_of(card_of(tmp_path).text, "mine").count('"path/to/this/folder/mine"') == 1
    assert "PST" not in card_of(tmp_path).text.replace(section_of(card_of(tmp_path).text, "mine"), "")


def test_each_adapter_has_a_section_of_its_own(tmp_path: Path) -> None:
    model = two_adapters()
    model.save_pretrained(tmp_path)
    before = card_of(tmp_path).text
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    text = card_of(tmp_path).text
    assert text == before
    assert text.count("## Sparse training") == 2
    assert "import peft_pst" in section_of(text, "a")
    assert "import peft_pst" in section_of(text, "b")
    assert {"peft_pst", "pruning", "sparsity"} <= set(card_of(tmp_path).data.tags)


def test_a_card_above_that_is_not_pefts_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / CARD_NAME).write_text("# My project\n")
    PSTConfig().save_pretrained(str(tmp_path / "mine"))
    pruned_net().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / CARD_NAME).unlink()
    PSTConfig().save_pretrained(str(tmp_path / "other"))
    assert (tmp_path / CARD_NAME).read_text() == "# My project\n"


def test_a_file_without_tensors_says_nothing_of_zeros(tmp_path: Path) -> None:
    """As FSDP leaves it where the shards of a checkpoint are saved elsewhere."""
    get_peft_model(tiny_gpt2(), PSTConfig()).save_pretrained(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    update_model_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import peft_pst" in card
    assert "exactly zero" not in card


class Hub:
    """Stands in for the hub: keeps the card of what is uploaded."""

    def __init__(self) -> None:
        self.cards: list[str] = []

    def create_repo(self, name: str, **options: object) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, *, folder_path: str, **options: object) -> None:
        self.cards.append((Path(folder_path) / CARD_NAME).read_text())


def card_trainer(folder: Path) -> Trainer:
    model = train_a_little(get_peft_model(tiny_bert(), PSTConfig(task_type="SEQ_CLS", target_sparsity=0.7)))
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True)
    return Trainer(model, arguments, callbacks=[PSTCallback()])


def test_a_trainer_that_pushes_to_the_hub_says_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer = card_trainer(tmp_path)
    trainer.push_to_hub(dataset="sst2")
    trainer.model.update_sparsity(4, 10)
    trainer.push_to_hub()
    for card in hub.cards:
        assert card.count("## Sparse training") == 1
        assert card.index("# Sparse training") < card.index("## Training procedure")  # of the Trainer's own
        assert {"peft_pst", "pruning", "sparsity"} <= set(ModelCard(card).data.tags)
    zeros = [re.search(r"With it, (.*) of .* entries", card).group(1) for card in hub.cards]
    assert zeros[0] != zeros[1]


def test_the_card_of_a_trainers_model(tmp_path: Path) -> None:
    trainer = card_trainer(tmp_path)
    trainer.save_model()
    saved = (tmp_path / CARD_NAME).read_text()
    assert "## Sparse training" in saved
    trainer.create_model_card()
    made = (tmp_path / CARD_NAME).read_text()
    assert "generated automatically according to the information the Trainer had access to" in made
    assert section_of(made) == section_of(saved)


def section_of(card: str, name: str = "") -> str:
    named = f" {name}" if name else ""
    return card.partition(f"<!-- peft_pst: begin{named} -->")[2].partition(f"<!-- peft_pst: end{named} -->")[0]


def test_other_adapters_and_damaged_files_are_left_alone(tmp_path: Path) -> None:
    get_peft_model(net(), LoraConfig(target_modules=["up"])).save_pretrained(tmp_path)
    (tmp_path / CARD_NAME).unlink()
    model = pruned_net()
    model.create_or_update_model_card(tmp_path)
    assert "Sparse training" not in (tmp_path / CARD_NAME).read_text()
    model.save_pretrained(tmp_path)
    whole = card_of(tmp_path).text
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes(b"")  # of a process that was killed
        (tmp_path / CARD_NAME).unlink()
        model.save_pretrained(tmp_path)  # over it
        assert card_of(tmp_path).text == whole
