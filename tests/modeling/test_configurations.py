"""Configurations: a key that does not exist is an error, in calls and in files; other versions' keys are not."""

import json

import pytest

from perceptio_hf import DepthVQVAEConfig, PerceptioConfig, tiny_checkpoint


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (DepthVQVAEConfig, {"hidden_size": 64}, "'hidden_size'; did you mean 'code_dim'"),
        (DepthVQVAEConfig, {"num_code": 64}, "'num_code'; did you mean 'num_codes'"),
        (DepthVQVAEConfig, {"num_resnet_blocks": 2}, "did you mean 'num_residual_blocks'"),
        (DepthVQVAEConfig, {"colour": "red"}, "its own are activation, base_channels, .*value_low"),
        (PerceptioConfig, {"mask_padding_point": 1}, "did you mean 'mask_padding_points'"),
        (PerceptioConfig, {"depth_config": {"image_sise": 320}}, "DepthVQVAEConfig .* did you mean 'image_size'"),
    ],
)
def test_a_key_that_does_not_exist_is_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_settings_of_the_trainer_refuse_it_too(tmp_path):
    pytest.importorskip("trl")
    from perceptio_hf import PerceptioSFTConfig

    with pytest.raises(TypeError, match="text_weigth"):
        PerceptioSFTConfig(output_dir=str(tmp_path), text_weigth=1.0)


def tiny_values() -> dict:
    with open(f"{tiny_checkpoint()}/config.json") as file:
        return json.load(file)


def test_a_slip_of_the_pen_in_a_file_is_refused_and_another_programs_keys_are_left_out():
    values = tiny_values()
    with pytest.raises(ValueError, match="did you mean 'mask_padding_points'"):
        PerceptioConfig.from_dict({**values, "mask_padding_point": 1})
    with pytest.raises(ValueError, match="did you mean 'num_codes'"):
        PerceptioConfig.from_dict({**values, "depth_config": {**values["depth_config"], "num_code": 1}})
    values["fast_library_version"] = "1.0"
    values["depth_config"]["fast_library_version"] = "1.0"
    config = PerceptioConfig.from_dict(values)
    assert not hasattr(config, "fast_library_version") and not hasattr(config.depth_config, "fast_library_version")
    assert PerceptioConfig(**config.to_dict()).to_dict() == config.to_dict()


# What configurations of transformers 4.40, 4.57 and 5.x hold beside the fields of their model.
SAVED_BY_OTHERS = {
    "torch_dtype": "float32",
    "_name_or_path": "somewhere",
    "_commit_hash": None,
    "_attn_implementation_autoset": True,
    "architectures": ["X"],
    "auto_map": {},
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "tokenizer_class": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "use_bfloat16": False,
    "torchscript": False,
    "use_cache": True,
    "max_length": 20,
    "num_beams": 1,
    "output_attentions": False,
    "transformers_version": "4.57.1",
}


@pytest.mark.parametrize("config_class", [DepthVQVAEConfig, PerceptioConfig])
def test_standard_keys_of_other_versions_are_read(config_class, tmp_path):
    config_class().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**SAVED_BY_OTHERS, **json.loads(file.read_text())}))
    loaded = config_class.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config_class(**loaded.to_dict()).to_diff_dict()
