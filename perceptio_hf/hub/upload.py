"""From a saved folder to a repository on the Hub: what is uploaded is planned first, and a dry run writes the same."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from transformers.dynamic_module_utils import get_relative_import_files

from perceptio_hf.conversion.tensors import read_json, read_tensors
from perceptio_hf.files import expanded
from perceptio_hf.modeling.configuration_perceptio import without_places
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.modeling.remote_code import write_code
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor

from .card import CardFacts, check_repo_name, new_card, revised_card
from .training_record import read_training

CARD = "README.md"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AUTO_MAPPED = ("config.json", "processor_config.json")
# Files of a saved folder that belong to the model, beside its weights. Nothing else leaves the user's disk.
_MODEL_FILES = (
    *_AUTO_MAPPED,
    *("generation_config.json", "preprocessor_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "additional_chat_templates/*.jinja"),
    *("LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*"),
)


@dataclass(frozen=True)
class UploadPlan:
    """What goes to `repo`: names in the repository and, for each, the file or the bytes.

    `left_out` are the names in the folder that stay behind, `keeps_card` says that its README.md goes as it is, or with
    metadata added.
    """

    repo: str
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    keeps_card: bool

    def write(self, folder: Path) -> None:
        """Write every file as it would be uploaded."""
        write_files(self.files, folder)


def plan_upload(
    folder: str | os.PathLike, repo: str, facts: CardFacts | None = None, *, card_anew: bool = False
) -> UploadPlan:
    """Check a saved Perceptio and lay out what an upload of it consists of.

    Code for `trust_remote_code` is added where the folder lacks it. A README.md in the folder is kept, with what
    `facts` knows set in its metadata.

    Args:
        repo: the Hub name it goes to, owner/name.
        facts: what the card says beyond what the folder knows.
        card_anew: write a new card although there is one.

    Raises:
        ValueError: a name the Hub does not know; a folder that is no Perceptio, lacks its processor, or whose weights
            are incomplete or damaged; a card that cannot be read.
    """
    folder, facts = expanded(folder), facts or CardFacts()
    check_repo_name(repo)
    if "/" not in repo:
        raise ValueError(f"{repo!r} names no owner; a repository is owner/name, e.g. me/{repo}.")
    files, model = model_files(folder)
    card = folder / CARD
    keeps_card = card.is_file() and not card_anew
    if keeps_card:
        files[CARD] = _kept_card(card, repo, facts)
    else:
        files[CARD] = new_card(model, repo, facts, read_training(folder)).encode()
    taken = {name.partition("/")[0] for name in files}
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in taken))
    return UploadPlan(repo, dict(sorted(files.items())), left_out, keeps_card)


def model_files(folder: Path) -> tuple[dict[str, Path | bytes], PerceptioForConditionalGeneration]:
    """What of a saved folder belongs to the Perceptio in it, as in `UploadPlan.files`, with code that it lacks; and the
    model, which need not have the values of its weights. The card is not among them, nor is anything of a training.

    Raises:
        ValueError: as `plan_upload` for the folder.
    """
    files: dict[str, Path | bytes] = {name: folder / name for name in _weight_files(folder)}
    model, processor = _loaded(folder)
    found = [path for pattern in _MODEL_FILES for path in folder.glob(pattern)] + _code(folder)
    files |= {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}
    files |= _missing_code(files, model, processor)
    files["config.json"] = _without_places(files["config.json"])
    return files, model


def _code(folder: Path) -> list[Path]:
    """The modules that `auto_map` names and what these import of the folder; of others nobody knows what they are."""
    modules = set()
    for name in _AUTO_MAPPED:
        for classes in (read_json(folder / name).get("auto_map") or {}).values():
            for place in classes if isinstance(classes, list) else [classes]:
                if isinstance(place, str) and "--" not in place:  # else it lies in another repository
                    modules.add(folder / f"{place.partition('.')[0]}.py")
    known = sorted(path for path in modules if path.is_file())
    try:
        return known + [Path(path) for module in known for path in get_relative_import_files(module)]
    except OSError:  # one of them is not there; `_missing_code` brings all
        return known


def _without_places(config: Path | bytes) -> Path | bytes:
    """config.json without the places on the user's disk that parts were read from, as earlier versions wrote them."""
    values = json.loads(config if isinstance(config, bytes) else config.read_bytes())
    kept = without_places(values)
    return config if kept == values else (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()


def write_files(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Write files or bytes under their names into `folder`."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


def _weight_files(folder: Path) -> list[str]:
    """The names of a folder's weights, after a look at all of their headers and sizes."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, not a model: merge it into its base first (docs/lora.md).")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "perceptio":
        raise ValueError(f"{folder} holds a {kind!r} model, no Perceptio.")
    single, index = (folder / name for name in (_WEIGHTS, _INDEX))
    if single.is_file() == index.is_file():
        wrong = f"both {_WEIGHTS} and {_INDEX}" if single.is_file() else f"neither {_WEIGHTS} nor {_INDEX}"
        raise ValueError(f"{folder} has {wrong}; expected one of them, as save_pretrained writes.")
    read_tensors(folder)
    return [_WEIGHTS] if single.is_file() else [_INDEX, *sorted(set(read_json(index)["weight_map"].values()))]


def _loaded(folder: Path) -> tuple[PerceptioForConditionalGeneration, PerceptioProcessor]:
    """The model, without the values of its weights unless they are quantised, and the processor; they fit."""
    if not (folder / "processor_config.json").is_file():
        raise ValueError(f"{folder} has no processor; save it there too: processor.save_pretrained({str(folder)!r}).")
    quantised = read_json(folder / "config.json").get("quantization_config") is not None
    place = "cpu" if quantised else "meta"  # bitsandbytes reads 4 bits by their values
    try:
        model = PerceptioForConditionalGeneration.from_pretrained(folder, device_map=place, local_files_only=True)
        processor = PerceptioProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers raises over files that contradict one another
        raise ValueError(f"{folder} cannot be loaded as a Perceptio checkpoint: {error}") from error
    ids = processor.spatial_token_ids()
    of_model = {name: getattr(model.config, name) for name in ids}
    if model.config.has_spatial_tokens and ids != of_model:
        raise ValueError(
            f"The tokenizer in {folder} is not its model's: [SEG] has the id {ids['seg_token_id']} there, and "
            f"{of_model['seg_token_id']} in config.json; save the processor that belongs to the model."
        )
    return model, processor


def _missing_code(
    files: Mapping[str, Path | bytes], model: PerceptioForConditionalGeneration, processor: PerceptioProcessor
) -> dict[str, bytes]:
    """All of the code that `trust_remote_code` needs and the settings that name it, where any of it is missing.

    Code that is complete stays as it is: it may be of another version, but it belongs together.
    """
    with tempfile.TemporaryDirectory() as made:
        for saved in (model.config, processor):
            write_code(saved, made)
        code = {path.name: path.read_bytes() for path in Path(made).iterdir()}
    settings = {name: read_json(Path(files[name])) for name in _AUTO_MAPPED}
    if set(code) <= set(files) and all("auto_map" in values for values in settings.values()):
        return {}
    settings["config.json"]["auto_map"] = model.config.auto_map
    settings["processor_config.json"]["auto_map"] = processor.auto_map
    texts = {name: json.dumps(values, indent=2, sort_keys=True) + "\n" for name, values in settings.items()}
    return code | {name: text.encode() for name, text in texts.items()}


def _kept_card(card: Path, repo: str, facts: CardFacts) -> Path | bytes:
    content = card.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # behind a byte order mark the Hub finds no metadata
    except UnicodeDecodeError:
        raise ValueError(f"{card} is not UTF-8 text.") from None
    revised = revised_card(text, repo, facts)
    return card if revised.encode() == content else revised.encode()


def upload(
    plan: UploadPlan,
    *,
    token: str | None = None,
    private: bool = False,
    branch: str | None = None,
    message: str = "Upload a Perceptio",
) -> str:
    """Make the repository where there is none, and commit what is planned.

    Args:
        token: default: HF_TOKEN, or the one `hf auth login` has stored.
        private: make it private; refused where the repository is there and public.
        branch: made where there is none; default: main.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: no token, one the Hub does not take, a repository that is public against the wish, a card the Hub
            refuses, no connection. Nothing is committed then; a repository that was made for it stays, empty.
    """
    token = (token or get_token() or "").strip()
    if not token:
        raise ValueError("There is no token: log in with `hf auth login`, set HF_TOKEN, or pass --token.")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("The token has characters that no token has; copy it again, without line breaks.")
    try:
        return _commit(plan, HfApi(token=token), private, branch, message)
    except Exception as error:  # of the Hub's client, of the network below it, or our own
        raise ValueError(_what_failed(error, plan.repo).replace(token, "***")) from None


def _commit(plan: UploadPlan, api: HfApi, private: bool, branch: str | None, message: str) -> str:
    repo = api.create_repo(plan.repo, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo).private:
        raise ValueError(
            f"{repo} is there already, and public: make it private in its settings, or leave out --private."
        )
    if branch is not None:
        api.create_branch(repo, branch=branch, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in plan.files.items()]
    return api.create_commit(repo, operations, commit_message=message, revision=branch).commit_url


def _what_failed(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "The Hub does not know this token: log in again with `hf auth login`, or pass another --token."
    if status == 403:
        return f"The Hub does not let this token write to {repo}: it needs the right to write there."
    reason = (isinstance(error, RuntimeError) and error.__cause__) or error  # the client says only which file failed
    said = " ".join(str(reason).split()) or type(reason).__name__
    kinds = {kind.__name__ for kind in type(reason).__mro__}  # by name: the client's network library has changed twice
    if "OfflineModeIsEnabled" in kinds:
        said = "offline mode is on; unset HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) to upload."
    elif kinds & {"TransportError", "ConnectionError", "Timeout"}:
        said = (
            f"there is no connection to {constants.ENDPOINT} ({re.sub(r'^.Errno -?[0-9]+. *', '', said)}). Look at the "
            "network, a proxy, and HF_ENDPOINT if it is set; run the command again, it begins anew."
        )
    return f"The upload to {repo} failed: {said}"
