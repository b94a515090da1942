"""Messages of every common form are taken; anything else is named in one clear error, not somewhere inside."""

import base64
import io

import pytest
import torch
from helpers import chat, encode, picture

from perceptio_hf import PerceptioProcessor
from perceptio_hf.processing.messages import prepare_chat

WORDS = {"type": "text", "text": "What is this?"}


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "a list of messages, not empty"),
        ([], "a list of messages, not empty"),
        ("What?", "a list of messages, not a str"),
        ([["What?"]], "Conversation 0: Message 0 is a str"),
        ([[]], "Conversation 0: .* not empty"),
        (["What?"], "Message 0 is a str; expected a mapping with role and content"),
        ([{"content": "What?"}], "Message 0 is a dict; expected a mapping with role"),
        ([{"role": None, "content": "What?"}], "expected a mapping with role"),
        ([{"role": "user"}], r"Message 0 \(user\): its content is empty; expected text"),
        (user(None), "its content is empty; expected text"),
        (user(7), "its content is a int; expected text"),
        (user({"type": "text", "text": "What?"}), "its content is a dict; expected text"),
        (user([None]), r"Message 0 \(user\), part 0 is empty"),
        (user(["What?"]), "part 0 is a str; expected"),
        (user([{"text": "What?"}]), "part 0 is of the type None"),
        (user([{"type": "picture", "image": "a.png"}, WORDS]), "part 0 is of the type 'picture'"),
        (user([{"type": "text"}]), "part 0: its text is empty; expected words"),
        (user([{"type": "text", "text": None}]), "part 0: its text is empty"),
        (user([WORDS, {"type": "text", "text": 3}]), "part 1: its text is a int"),
        (user("a \ud800 b"), "holds '.ud800' at 2, half a character"),
        ([{"role": "user", "name": "\udcff", "content": "What?"}], "half a character"),
        (user([{"type": "image", "image": 5}, WORDS]), "not int"),
        (user([{"type": "image", "image": "a.png", "url": "b.png"}, WORDS]), "image and url; one part is one picture"),
        (user([{"type": "video", "video": "a.mp4"}, WORDS]), "takes pictures, not video"),
        (user([{"type": "audio", "audio": "a.wav"}, WORDS]), "takes pictures, not audio"),
        ([{"role": "assistant", "content": None}, *user("What?")], r"Message 0 \(assistant\): its content is empty"),
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_what_is_no_message_is_named(processor, messages, says, tokenize):
    with pytest.raises(ValueError, match=says) as caught:
        processor.apply_chat_template(messages, tokenize=tokenize)
    assert "\n" not in str(caught.value)


def test_messages_stay_as_they_were():
    messages = user([{"type": "image", "image": picture()}, {"type": "text", "text": "[SEG]"}])
    prepared = prepare_chat(messages, lambda texts, own: [text.lower() for text in texts])
    assert prepared[0]["content"][1]["text"] == "[seg]"
    assert messages[0]["content"][1]["text"] == "[SEG]"


def test_a_call_of_a_tool_needs_no_content(processor):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    template = "{% for m in messages %}{{ m['role'] }}{{ m['content'] is defined }} {% endfor %}"
    turns = [*user("What?"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert processor.apply_chat_template(turns, chat_template=template) == "userTrue assistantFalse "


def test_every_way_to_name_a_picture(processor: PerceptioProcessor, tmp_path):
    """As transformers' own loader takes them, and OpenAI's form."""
    image, file = picture(), io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "a b.png").write_bytes(file.getvalue())
    text = base64.b64encode(file.getvalue()).decode()
    data, local = f"data:image/png;base64,{text}", (tmp_path / "a b.png").as_uri()
    tensor = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1)
    expected = encode(processor, chat(image))
    for part in (
        {"image": tensor},
        {"image": tensor.numpy()},
        {"image": data, "url": None},
        {"url": data},
        {"url": local},
        {"path": str(tmp_path / "a b.png")},
        {"base64": text},
        {"base64": data},
        {"image": text},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image_url", "image_url": local},
    ):
        got = encode(processor, user([{"type": "image", **part}, chat(image)[0]["content"][1]]))
        assert all(torch.equal(got[key], expected[key]) for key in expected), part.keys()
    batch = torch.stack([tensor, tensor])
    assert len(processor(images=batch, text="<IMG_CONTEXT>" * 2)["mask_pixel_values"]) == 2
