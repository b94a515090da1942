"""Checkpoints of a training that are whole or not there, and that resume with the weights they hold."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from perceptio_hf.files import swap_in

from .checkpoint_files import fault_of, write_record

_logger = logging.getLogger(__name__)
STAGING = ".saving"  # folder in output_dir where a checkpoint grows until it is complete
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_Found = TypeVar("_Found")


def last_checkpoint(folder: str | Path, *, quiet: bool = False) -> Path | None:
    """The checkpoint of the highest step whose files are all as they were written (`checkpoint_files`).

    Damaged or incomplete ones of higher steps are named in a warning, unless `quiet`.
    """
    passed_over = []
    for checkpoint in _checkpoints(folder):
        fault = fault_of(checkpoint)
        if fault is None:
            if passed_over and not quiet:
                _logger.warning("%s; taking %s, the one before.", "; ".join(passed_over), checkpoint.name)
            return checkpoint
        passed_over.append(f"{checkpoint} cannot be used: {fault}")
    if passed_over and not quiet:
        _logger.warning("%s; there is none before it.", "; ".join(passed_over))
    return None


def processes_of(checkpoint: Path | None) -> int | None:
    """How many processes wrote a checkpoint: each leaves the state of its random numbers. None: it cannot be told."""
    if checkpoint is None:
        return None
    return len(list(checkpoint.glob("rng_state_*.pth"))) or (1 if (checkpoint / "rng_state.pth").exists() else None)


def checkpoint_to_go_on_from(folder: str | Path) -> Path | None:
    """As `last_checkpoint`; None only for a folder without any checkpoint.

    Raises:
        ValueError: where there are some and none can be used: to begin anew is for the user to decide.
    """
    last, found = last_checkpoint(folder), _checkpoints(folder)
    if last is None and found:
        raise ValueError(
            f"{folder} holds checkpoints, and a training can go on from none of them: {found[0].name} cannot be used: "
            f"{fault_of(found[0])}. (save_only_model: true leaves the optimizer's state out.) Name another --out, or "
            "begin anew by --resume_from_checkpoint false, which sets them aside."
        )
    return last


def told_by_first(find: Callable[[], _Found]) -> _Found:
    """What `find` returns on the first process, which alone calls it, on all of them.

    Checking a checkpoint reads all of it: 94 GB for 8 billion parameters, which need not be read by every process.

    Raises:
        ValueError, OSError: that `find` raises there.
    """
    answer: list = [None, None]  # what was found, and what went wrong
    if PartialState().is_main_process:
        try:
            answer[0] = find()
        except (ValueError, OSError) as error:
            answer[1] = error
    found, error = broadcast_object_list(answer)
    if error is not None:
        raise error
    return found


def _checkpoints(folder: str | Path) -> list[Path]:
    """Of the highest step first."""
    found = {int(match[1]): path for path in Path(folder).glob("*") if (match := _CHECKPOINT.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def _step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def set_aside_later(folder: str | Path, step: int) -> None:
    """Rename the checkpoints of steps after `step`, at which a training into this folder begins.

    They are damaged, or of a training that was given up. Left where they are, the next one to resume would go on from
    them, and they would count among those that `save_total_limit` keeps.
    """
    later = [path for path in _checkpoints(folder) if int(path.name.partition("-")[2]) > step]
    for checkpoint in later:
        os.replace(checkpoint, _free_name(checkpoint))
    if later:
        names = ", ".join(path.name for path in reversed(later))
        _logger.warning(
            "Training begins at step %d, so %s in %s (of later steps) became set-aside-...; remove what you do not "
            "want to keep.",
            *(step, names, folder),
        )


def _free_name(checkpoint: Path) -> Path:
    name, number = checkpoint.with_name(f"set-aside-{checkpoint.name}"), 1
    while name.exists():
        number += 1
        name = checkpoint.with_name(f"set-aside-{checkpoint.name}-{number}")
    return name


class WholeCheckpoints(Trainer):
    """A `Trainer` that writes a checkpoint beside its place and renames it when it is complete.

    Whoever looks for the last checkpoint, transformers' own `get_last_checkpoint` included, never finds half of one,
    whether the process was killed or the disk was full.
    """

    _is_saving = False

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **kwargs) -> TrainOutput:
        """Train; see `Trainer.train`. `True` resumes from the last complete checkpoint of `output_dir`. Those of later
        steps than the first one are set aside.

        Raises:
            ValueError: if there is nothing to resume from, or the checkpoint is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._told(lambda: last_checkpoint(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
        start = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._prepare_to_begin(start)
        return super().train(resume_from_checkpoint=None if start is None else str(start), **kwargs)

    def _told(self, find: Callable[[], _Found]) -> _Found:
        """`told_by_first`, unless every machine has a disk of its own."""
        return find() if self.args.save_on_each_node else told_by_first(find)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._is_saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with self._staged(folder / STAGING, name):
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._is_saving = False
            self._name_best_checkpoint(folder / STAGING / name, folder / name)
            self.accelerator.wait_for_everyone()  # every process writes a part
            if self.args.should_save:
                write_record(folder / STAGING / name)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,  # as transformers has it: the one just written stays, whatever numbers are there
            )

    @contextmanager
    def _staged(self, staging: Path, name: str) -> Iterator[None]:
        """Let all processes write into `staging / name`, then move it beside `staging`."""
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        try:
            yield
            self.accelerator.wait_for_everyone()  # every process writes a part
            if self.args.should_save:
                swap_in(staging / name, staging.parent / name, staging / "replaced")
        except (OSError, SafetensorError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
                raise  # of a kind of its own: CUDA out of memory, a process that did not answer
            raise OSError(_saving_failed(staging.parent, name, error)) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ever, but what is saved on request is a whole model, even where checkpoints hold shards of it."""
        if not self.is_fsdp_enabled or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        plugin = self.accelerator.state.fsdp_plugin
        kept = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)
        plugin.set_state_dict_type(kept.name)

    def save_finished(self, folder: str | Path) -> Path:
        """Save the model and its processor as `folder`, which appears, or is replaced, when they are complete.

        Raises:
            OSError: if that fails; what stood there before stays.
        """
        folder = Path(folder)
        staging = folder.parent / STAGING
        with self._staged(staging, folder.name):
            self.save_model(str(staging / folder.name))
        return folder

    def _prepare_to_begin(self, checkpoint: Path | None) -> None:
        """Check the files of the checkpoint to go on from, None to begin anew; set those of later steps aside.

        Raises:
            ValueError: naming what is wrong with a file.
        """
        fault = None if checkpoint is None else self._told(lambda: fault_of(checkpoint))
        if fault is not None:
            raise ValueError(f"{checkpoint} cannot be used: {fault}. Resume from another checkpoint, or begin anew.")
        before, now = processes_of(checkpoint), self.accelerator.num_processes
        if before not in (None, now) and self.accelerator.is_main_process:
            _logger.warning(
                "%s was trained by %d processes, and this training has %d: it does not go on at the same sample, and "
                "draws other random numbers.",
                checkpoint,
                before,
                now,
            )
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            set_aside_later(self.args.output_dir, 0 if checkpoint is None else _step_of(checkpoint))
        self.accelerator.wait_for_everyone()

    def _name_best_checkpoint(self, written: Path, final: Path) -> None:
        """Where this checkpoint is the best so far, transformers has noted the place where it was written."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == written:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _run_epoch(self, *args, **kwargs) -> None:
        """As ever, but a training that was resumed at its last step ends; transformers would do one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load the weights of a checkpoint.

        Files of InternVL models name their tensors otherwise than the model does. transformers' Trainer loads by the
        model's names, finds none of them and only warns; `from_pretrained` knows both.
        """
        target = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if load_in_place(target, Path(resume_from_checkpoint)):
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
            return
        best = Path(self.state.best_model_checkpoint)
        fault = self._told(lambda: fault_of(best))
        if fault is not None:
            raise ValueError(f"{best}, the best checkpoint, cannot be used: {fault}.")
        self._load_from_checkpoint(str(best))


def load_in_place(model: PreTrainedModel, folder: Path) -> bool:
    """Fill a model's own tensors from the safetensors of a checkpoint, one tensor in memory at a time.

    Returns:
        Whether that was possible: where the names in the files are not all the model's, or transformers does not tell
        under which names it saves, nothing was changed.
    """
    files = sorted(folder.glob("model*.safetensors"))
    tensors = _by_saved_name(model)
    names = {file: list(_keys(file)) for file in files}
    found = {tensors[name].data_ptr() for keys in names.values() for name in keys if name in tensors}
    unknown = any(name not in tensors for keys in names.values() for name in keys)
    if unknown or found != {tensor.data_ptr() for tensor in tensors.values()}:
        return False
    with torch.no_grad():
        for file, keys in names.items():
            with safe_open(file, "pt") as stored:
                for name in keys:
                    tensors[name].copy_(stored.get_tensor(name))
    return True


def _by_saved_name(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own tensors under the names that `save_pretrained` gives them; those that share memory keep both."""
    own = model.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion

        saved = revert_weight_conversion(model, dict(own))
    except (ImportError, AttributeError, TypeError):  # not a public function of transformers
        return own
    places = {tensor.data_ptr() for tensor in own.values()}
    renamed = all(tensor.data_ptr() in places for tensor in saved.values()) and len(saved) == len(own)
    return saved if renamed else own


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def _saving_failed(folder: Path, name: str, error: Exception) -> str:
    last = last_checkpoint(folder, quiet=True)
    rest = (
        f"{last} is complete; make room and resume from it."
        if last
        else "No earlier checkpoint exists; make room and start again."
    )
    return f"{name} could not be saved in {folder}: {' '.join(str(error).split())}. {rest}"
