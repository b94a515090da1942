"""Perceptio as a model of lmms-eval: `lmms-eval eval --model perceptio --model_args pretrained=FOLDER --tasks ...`.

lmms-eval (0.6 and later) finds it by the entry point group `lmms_eval.models`; nothing of it is changed.

A task gets words: spatial tokens are taken out of the answers, and its limit of new tokens counts words only. A spatial
task gets the spans as text too. Spatial is a task whose `generation_kwargs` have `spatial` (depth, seg, seg+depth or
auto), or that is named in the model argument `spatial_tasks`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from perceptio_hf.evaluation.run.answering import encode_chats, token_budget
from perceptio_hf.modeling.span_grammar import SPATIAL_MODES, required_new_tokens

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

_SAMPLING = ("temperature", "top_p", "top_k", "num_beams")
_SEPARATOR = ";"  # lmms-eval splits model arguments at commas


def manifest() -> "ModelManifest":
    """What the entry point gives lmms-eval: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="perceptio", chat_class_path=f"{__name__}.Perceptio")


class Perceptio(lmms):
    """A Perceptio checkpoint that answers lmms-eval's requests.

    Args:
        pretrained: folder or Hub name; default: the embedded tiny checkpoint.
        device: default: the GPU of this process where there is one.
        batch_size: requests that go through the model together.
        spatial: what the model may write in tasks that do not say (see `model.generate`). With "auto" it may write
            spans first and answer behind them.
        spatial_tasks: tasks whose answers keep their spans, with semicolons between, or "all".
        max_new_tokens: words of an answer, in tokens, where the task sets no limit.

    Raises:
        ValueError: for an unknown `spatial`, an unknown argument, or a checkpoint that is none.
    """

    is_simple = False  # requests come as chats

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        spatial: str = "auto",
        spatial_tasks: str = "",
        max_new_tokens: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval passes it to every model
        if unknown:
            raise ValueError(f"perceptio knows no model arguments {', '.join(unknown)}.")
        _check_spatial(spatial)
        from perceptio_hf.commands import checkpoints

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = torch.device(device or self.accelerator.device)
        self.model, self.processor = checkpoints.load(checkpoints.resolve(pretrained), str(self._device))
        self.batch_size, self.spatial, self.max_new_tokens = int(batch_size), spatial, max_new_tokens
        self.spatial_tasks = {name.strip() for name in spatial_tasks.split(_SEPARATOR) if name.strip()}

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return self._device

    def generate_until(self, requests: "Sequence[Instance]") -> list[str]:
        """Answers in the order of the requests; each has (context, doc_to_messages, options, doc id, task, split)."""
        answers: list[str | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Perceptio answers") as bar:
            for indices in self._batches(requests):
                chosen = [requests[index].args for index in indices]
                for index, arguments, text in zip(indices, chosen, self._answer(chosen), strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", (arguments[0], arguments[2]), text)
                bar.update(len(indices))
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError("perceptio writes answers; use tasks of the output type generate_until.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("perceptio answers one round; use tasks of the output type generate_until.")

    def _batches(self, requests: "Sequence[Instance]") -> Iterator[list[int]]:
        """Indices of requests that share task and options, at most `batch_size` at a time."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            _, _, options, _, task, _ = request.args
            groups.setdefault(f"{task} {sorted(options.items(), key=str)}", []).append(index)
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _answer(self, chosen: Sequence[tuple]) -> list[str]:
        """Answers to requests that share task and options."""
        _, _, options, _, task, _ = chosen[0]
        chats = [
            _hf_messages(doc_to_messages(self.task_dict[task][split][doc_id]))
            for _, doc_to_messages, _, doc_id, task, split in chosen
        ]
        pictures = [_count_pictures(chat) for chat in chats]
        spatial = options.get("spatial", self.spatial)
        _check_spatial(spatial)
        if min(pictures) == 0 and spatial != "auto":
            spatial = "none"  # spans cannot be forced where there is nothing to see
        words = options.get("max_new_tokens") or self.max_new_tokens or token_budget(self.model)
        inputs = encode_chats(self.processor, chats).to(self.device)
        inputs.pop("mask_pixel_values", None)  # answers are text: no masks are made
        inputs.pop("original_sizes", None)
        ids = self.model.generate(
            **inputs,
            spatial=spatial,
            max_new_tokens=words + self._room_for_spans(spatial, max(pictures)),
            **_decoding(options),
        )
        responses = ids[:, inputs["input_ids"].shape[1] :].tolist()
        keep = "spatial" in options or bool({task, "all"} & self.spatial_tasks)
        return [self._text(response, words, keep, options.get("until") or []) for response in responses]

    def _room_for_spans(self, spatial: str, pictures: int) -> int:
        if spatial == "none" or not pictures or not self.model.config.has_spatial_tokens:
            return 0
        spans = "seg+depth" if spatial == "auto" else spatial
        return required_new_tokens(spans, pictures, self.model.spatial_vocabulary().span_length)

    def _text(self, response: list[int], limit: int, keep_spans: bool, until: str | Sequence[str]) -> str:
        """At most `limit` tokens of words, with or without spans, up to the first stop string."""
        spatial = self._spatial_ids()
        kept, words = [], 0
        for token in response:
            words += token not in spatial
            if words > limit:
                break
            kept.append(token)
        if keep_spans:
            text = self.processor.without_end(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()
        else:
            text = self.processor.words(kept).strip()
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text.strip()

    def _spatial_ids(self) -> set[int]:
        if not self.model.config.has_spatial_tokens:
            return set()
        words = self.model.spatial_vocabulary()
        return {words.seg, words.depth_start, words.depth_end, *words.codes}


def _check_spatial(spatial: str) -> None:
    if spatial not in SPATIAL_MODES:
        raise ValueError(f"spatial={spatial!r} is unknown; use one of {', '.join(SPATIAL_MODES)}.")


def _hf_messages(messages: Sequence[dict]) -> list[dict]:
    chat = ChatMessages(messages=messages)
    _, videos, sounds = chat.extract_media()
    if videos or sounds:
        raise ValueError("Perceptio takes pictures, not videos or sound; choose another task.")
    return chat.to_hf_messages()


def _count_pictures(chat: Sequence[dict]) -> int:
    return sum(part["type"] == "image" for message in chat for part in message["content"])


def _decoding(options: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's options as those of `generate`: greedy unless a temperature above 0 is asked for."""
    given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    samples = bool(options.get("do_sample")) or given.get("temperature", 0) > 0
    if not samples or given.get("temperature") == 0:
        return {"do_sample": False, "num_beams": given.get("num_beams", 1)}
    return {"do_sample": True, **given}
