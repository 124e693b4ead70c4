"""Base and adapter together: the right class and head, and one line for whatever does not fit."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft_pst import PSTConfig
from peft_pst.cli.errors import UserError
from peft_pst.cli.loading import is_adapter, load_adapted_model, read_adapter_config

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 50,
    "n_positions": 20,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
BERT = (BertForSequenceClassification, BertConfig(vocab_size=50, **SIZES))

CLASSIFIERS = {
    "bert": BERT,
    "roberta": (RobertaForSequenceClassification, RobertaConfig(vocab_size=50, **SIZES)),
    "gpt2": (GPT2ForSequenceClassification, GPT2Config(pad_token_id=0, **GPT2)),
}
OTHERS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2), "CAUSAL_LM"),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0),
        "SEQ_2_SEQ_LM",
    ),
    "vit": (ViTForImageClassification, ViTConfig(image_size=16, patch_size=8, num_labels=4, **SIZES), None),
}


def save_pair(folder, model_class, config, task_type, num_labels=None, **adapter):
    """A base and an adapter trained on it, in `base` and `adapter`; returns the adapted model."""
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder / "base")
    changes = {} if num_labels is None else {"num_labels": num_labels}
    base = model_class.from_pretrained(folder / "base", ignore_mismatched_sizes=True, **changes)
    sizes = {"target_sparsity": 0.5, "initial_sparsity": 0.5, "r": 2, "score_rank": 2, "init_weights": False}
    model = get_peft_model(base, PSTConfig(task_type=task_type, **sizes, **adapter)).eval()
    model.save_pretrained(folder / "adapter")
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_pair(folder, *BERT, "SEQ_CLS")
    return folder


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("num_labels", [1, 5])
def test_the_head_has_as_many_labels_as_were_trained(tmp_path, name, num_labels, caplog):
    model = save_pair(tmp_path, *CLASSIFIERS[name], "SEQ_CLS", num_labels)
    caplog.clear()
    loaded = load_adapted_model(tmp_path / "adapter")
    ids = torch.arange(2, 10)[None]
    assert loaded.config.num_labels == num_labels
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert "MISMATCH" not in caplog.text


@pytest.mark.parametrize("name", OTHERS)
def test_the_class_follows_from_the_adapter(tmp_path, name):
    model = save_pair(tmp_path, *OTHERS[name])
    loaded = load_adapted_model(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is OTHERS[name][0]
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_another_base_of_the_same_shapes_can_be_given(bert, tmp_path):
    shutil.copytree(bert / "base", tmp_path / "moved")
    loaded = load_adapted_model(bert / "adapter", str(tmp_path / "moved"), dtype=torch.bfloat16)
    assert loaded.get_base_model().dtype == torch.bfloat16


def test_labels_of_the_base_keep_their_names_when_their_number_fits(tmp_path):
    names = {0: "no", 1: "yes"}
    config = BertConfig(vocab_size=50, id2label=names, label2id={"no": 0, "yes": 1}, **SIZES)
    save_pair(tmp_path, BertForSequenceClassification, config, "SEQ_CLS")
    assert load_adapted_model(tmp_path / "adapter").config.id2label == names


def test_a_module_that_neither_file_holds_is_named(tmp_path):
    save_pair(tmp_path, *BERT, "SEQ_CLS")
    BertForMaskedLM(BERT[1]).save_pretrained(tmp_path / "base")  # has no pooler
    with pytest.warns(UserWarning, match=r"bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight: random values"):
        load_adapted_model(tmp_path / "adapter")


def error_of(*arguments):
    with pytest.raises(UserError) as caught:
        load_adapted_model(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_that_is_no_adapter(bert, tmp_path):
    assert "is not a folder" in error_of(tmp_path / "nowhere")
    assert "has no adapter_config.json; adapters inside it: adapter" in error_of(bert)
    assert not is_adapter(bert)


def test_an_adapter_of_another_type(tmp_path):
    get_peft_model(BERT[0](BERT[1]), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert "holds an adapter of type LORA; this command reads PST adapters only" in error_of(tmp_path)


@pytest.fixture
def adapter(bert, tmp_path):
    """A copy to damage."""
    return shutil.copytree(bert / "adapter", tmp_path / "adapter")


def change_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_base_that_is_not_named_or_not_there(adapter, tmp_path):
    assert "./nowhere' is not a folder; pass --base_model" in error_of(adapter, "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty' could not be loaded" in error_of(adapter, str(tmp_path / "empty"))
    change_config(adapter, base_model_name_or_path=None)
    assert "does not name its base model; pass --base_model" in error_of(adapter)


def test_a_damaged_configuration(adapter):
    change_config(adapter, target_sparsity=2)
    assert "target_sparsity=2 is outside [0, 1)" in error_of(adapter)
    for content, problem in (("{", "adapter_config.json' could not be read: Expecting"), ("[]", "of type None")):
        (adapter / "adapter_config.json").write_text(content)
        assert problem in error_of(adapter)


def test_damaged_or_missing_weights(bert, adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert "adapter_model.safetensors' is damaged" in error_of(adapter)
    file.rename(adapter / "adapter_model.bin")
    assert "must be in safetensors, never in pickle" in error_of(adapter)
    base = shutil.copytree(bert / "base", tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"x" * 50)
    assert "base' could not be loaded" in error_of(bert / "adapter", str(base))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 24}, r".pst_embedding_V is (8, 16) in the adapter and would be (8, 24) on the base"),
        ({"num_hidden_layers": 3}, "is not in the adapter (42 tensors differ)"),
        ({"num_hidden_layers": 1}, "has no place on the base (42 tensors differ)"),
    ],
)
def test_a_base_of_other_shapes_is_refused_before_its_weights_are_read(bert, tmp_path, changes, problem):
    BertConfig(**{"vocab_size": 50, **SIZES, **changes}).save_pretrained(tmp_path)  # and no weights at all
    assert problem in error_of(bert / "adapter", str(tmp_path))


def test_a_base_of_another_kind(bert, tmp_path):
    GPT2Config(**GPT2).save_pretrained(tmp_path)
    assert "does not fit base model" in error_of(bert / "adapter", str(tmp_path))


def test_a_base_whose_weights_contradict_its_config(bert, tmp_path):
    base = shutil.copytree(bert / "base", tmp_path / "base")
    state = load_file(base / "model.safetensors")
    state["bert.embeddings.word_embeddings.weight"] = torch.zeros(49, 16)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    assert "word_embeddings.weight does not have the shape its config.json says" in error_of(
        bert / "adapter", str(base)
    )


def test_a_configuration_cannot_choose_what_is_imported(adapter):
    change_config(adapter, task_type=None, auto_mapping={"parent_library": "antigravity", "base_model_class": "X"})
    assert "belongs to antigravity.X, which is no transformers model" in error_of(adapter)
    change_config(adapter, auto_mapping={"parent_library": "transformers", "base_model_class": "NoSuchModel"})
    assert "NoSuchModel" in error_of(adapter)


def test_reading_a_configuration_gives_it_back(bert):
    assert read_adapter_config(bert / "adapter").target_sparsity == 0.5
