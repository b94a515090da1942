"""The processor's own mask threshold is the default, saved with it, and gives way to the caller's."""

from helpers import chat, encode, picture

from perceptio_hf import PerceptioProcessor


def test_mask_threshold(model, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loose = PerceptioProcessor.from_pretrained(tmp_path, mask_threshold=-1e9)
    loose.save_pretrained(tmp_path)
    loose = PerceptioProcessor.from_pretrained(tmp_path)
    assert loose.mask_threshold == -1e9
    inputs = encode(processor, chat(picture()))
    out = model.generate(**inputs, spatial="seg", max_new_tokens=4, return_dict_in_generate=True)
    assert loose.post_process_spatial(out)[0].masks.all()
    assert not loose.post_process_spatial(out, threshold=1e9)[0].masks.any()
