"""Adapters that PEFT or TRL put in by a configuration of the user's, and merging where weights are quantised."""

import re

import pytest
import torch
from helpers import random_model
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from sft_helpers import samples, settings
from transformers import AutoModel, BitsAndBytesConfig
from trl import SFTTrainer

from perceptio_hf import PerceptioForConditionalGeneration, PerceptioSFTTrainer, tiny_checkpoint
from perceptio_hf.modeling.modeling_perceptio import LANGUAGE_MODEL_LAYERS
from perceptio_hf.training.lora import lora_config, save_merged


def adapted(model) -> set[str]:
    return {name for name, _ in model.named_modules() if name.endswith(".lora_A.default")}


EVERYWHERE = {
    "peft": lambda model, config, trainer: get_peft_model(model, config),
    "peft, injected": lambda model, config, trainer: inject_adapter_in_model(config, model),
    "transformers": lambda model, config, trainer: model.add_adapter(config),
    "ours": lambda model, config, trainer: trainer(PerceptioSFTTrainer, model, config),
    "trl": lambda model, config, trainer: trainer(SFTTrainer, model, config),
}


@pytest.mark.parametrize("way", EVERYWHERE)
def test_adapters_in_frozen_parts_are_refused_with_what_to_use(processor, tmp_path, way):
    def trainer(kind, model, config):
        kind(
            model,
            settings(tmp_path),
            train_dataset=samples(4),
            processing_class=processor,
            peft_config=config,
            data_collator=list,
        )

    with pytest.raises(ValueError) as caught:
        EVERYWHERE[way](random_model(processor), LoraConfig(target_modules="all-linear"), trainer)
    if way == "transformers" and "version of PEFT" in str(caught.value):
        pytest.skip(f"this transformers takes no PEFT that is released: {caught.value}")
    assert re.search(r"mask_model\.vision_encoder.*lora_config\(model\).*language_model", str(caught.value))


def test_the_pattern_of_the_error_is_the_language_model(processor):
    ours = adapted(get_peft_model(random_model(processor), lora_config(random_model(processor), r=2)))
    theirs = adapted(get_peft_model(random_model(processor), LoraConfig(target_modules=LANGUAGE_MODEL_LAYERS)))
    assert theirs == ours and len(ours) == 14


def test_adapters_that_are_only_used_may_be_anywhere(processor, tmp_path):
    """Those somebody trained before, which compute nothing else in a frozen part."""
    model = random_model(processor)
    model._check_adapters = lambda: None
    get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(random_model(processor), tmp_path)
    assert any("vision_encoder" in name for name in adapted(loaded))


def test_merging_into_four_bits_is_refused_and_the_way_it_names_works(processor, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tiny_checkpoint()
    quantised = AutoModel.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model = get_peft_model(quantised, lora_config(quantised, r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"without quantization_config.*PeftModel\.from_pretrained"):
        save_merged(model, processor, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    whole = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "adapter").eval()
    ids = torch.arange(20)[None]
    before = whole(input_ids=ids).logits
    save_merged(whole, processor, tmp_path / "merged")
    after = PerceptioForConditionalGeneration.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
