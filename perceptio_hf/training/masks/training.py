"""What the trainer does for masks: the start of the [SEG] projector, learning rates of their own, and the watch."""

import copy
import itertools
import logging
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from perceptio_hf.training import fsdp, zero3

from .projector import ProjectorStart, start_seg_projector
from .rates import give_own_rates
from .watch import MaskWatch, trouble_with_masks

_logger = logging.getLogger(__name__)
_ROWS_PER_MASK = 20  # rows looked at for each mask that is wanted: tasks without masks may be many


class LivingMasks(Trainer):
    """A `Trainer` whose masks live, or that says why they do not; see `PerceptioSFTConfig`."""

    projector_start: ProjectorStart | None = None  # what the [SEG] projector was started from, if it was
    _watch: MaskWatch | None = None
    _warned_at = 0
    _started_at = 0
    _is_own_optimizer = False

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        self._check_start()
        if self.args.seg_projector_start and not self.args.seg_projector_start_step and not resume_from_checkpoint:
            self._start_seg_projector()
        self._watch = MaskWatch(self._perceptio.seg_projector, self._perceptio.mask_model.mask_decoder)
        self._warned_at = self._started_at = 0
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._watch.close()
            self._watch = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Tensor:
        """As ever; before the first micro batch of step `seg_projector_start_step` the projector gets its start."""
        step = self.args.seg_projector_start_step
        if 0 < self.state.max_steps <= step:  # which epochs make known only now
            raise ValueError(f"seg_projector_start_step is {step}, but the training has {self.state.max_steps} steps.")
        if self.args.seg_projector_start and step == self.state.global_step > 0 and self._started_at != step:
            self._started_at = step
            self._start_seg_projector()
            for parameter in self._perceptio.seg_projector.parameters():
                if dist.is_initialized():  # DDP sees to equal weights at its own start alone
                    dist.broadcast(parameter.data, 0)
                self.optimizer.state.pop(parameter, None)  # what it has learnt of weights that are gone
        return super().training_step(model, inputs, *args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As ever, with the learning rates of the mask part.

        Raises:
            ValueError: if there are some and the optimizer was made elsewhere, or what they are for is not trained.
        """
        rates = self.args.mask_rates()
        if rates and self.optimizer is not None and not self._is_own_optimizer:
            raise ValueError(
                f"{' and '.join(rates)} are set, but the optimizer came with the call: give its parameter groups "
                "learning rates there, or leave `optimizers` out."
            )
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            self._is_own_optimizer = True
            modules = {
                "mask_learning_rate": self._perceptio.mask_model.mask_decoder,
                "seg_projector_learning_rate": self._perceptio.seg_projector,
            }
            give_own_rates(optimizer, [(modules[name], rate) for name, rate in rates.items()])
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the watch has seen beside `logs`; warn where masks make no progress."""
        if self._watch is None or not self.model.training or "loss" not in logs:
            super().log(logs, start_time)
            return
        for name, value in self._watch.means(self._reduced).items():
            self._metrics["train"][name] = [value]
        super().log(logs, start_time)
        patience = self.args.mask_patience
        words = trouble_with_masks(self.state.log_history, patience, since=self._warned_at) if patience else None
        if words is not None:
            self._warned_at = self.state.global_step
            if self.is_world_process_zero():
                _logger.warning("Step %d: %s", self.state.global_step, words)

    def _check_start(self) -> None:
        if not self.args.seg_projector_start:
            return
        if not self._perceptio.seg_projector.linear_in.weight.requires_grad:
            raise ValueError(
                "seg_projector_start gives the [SEG] projector new weights, but it is not trained, so they would not "
                "be saved: name it in lora_modules_to_save, or leave seg_projector_start out."
            )
        if zero3.is_on(self.args):
            raise ValueError(zero3.NO_START)
        if self.args.seg_projector_start_step and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(fsdp.NO_LATE_START)

    def _start_seg_projector(self) -> None:
        """Every process does the same, and before the model is sharded."""
        homes = {parameter.device for parameter in self.model.parameters()}
        moves = len(homes) == 1 and homes != {self.args.device}  # FSDP leaves it to `train` to move the model
        if moves:
            self.model.to(self.args.device)
        with self.accelerator.autocast():
            self.projector_start = start_seg_projector(self.model, self._batches_with_masks(), seed=self.args.seed)
        if moves:
            self.model.to(*homes)

    def _batches_with_masks(self) -> Iterator[dict[str, Tensor]]:
        """Batches of samples with masks, at least `seg_projector_start` masks in all if there are so many. The samples
        are taken at random, but neither the order of training nor its random numbers change."""
        wanted, size = self.args.seg_projector_start, self.args.per_device_train_batch_size
        collate = copy.deepcopy(self.data_collator)  # which counts the samples that it leaves out
        rows: list[dict[str, Any]] = []
        for row in itertools.islice(self._some_rows(), _ROWS_PER_MASK * wanted):
            if not row["masks"]:
                continue
            rows.append(row)
            wanted -= len(row["masks"])
            if len(rows) == size or wanted <= 0:
                yield self.fill_spans(self._prepare_inputs(collate(rows)))
                rows = []
            if wanted <= 0:
                return
        if rows:
            yield self.fill_spans(self._prepare_inputs(collate(rows)))

    def _some_rows(self) -> Iterator[dict[str, Any]]:
        dataset = self.train_dataset
        if not hasattr(dataset, "select"):
            return iter(dataset)
        order = list(range(len(dataset)))
        random.Random(self.args.seed).shuffle(order)
        return (dataset[place] for place in order)
