"""TRL's SFTTrainer for Perceptio: the composite loss inside the model's forward, its parts in the logs."""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, broadcast_object_list, convert_outputs_to_fp32, is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed
from transformers.initialization import no_init_weights
from transformers.trainer_utils import EvalPrediction, TrainOutput
from trl import SFTTrainer

from perceptio_hf.data.form import REASONS, SAMPLE_KEYS
from perceptio_hf.data.rows import as_rows
from perceptio_hf.files import in_use
from perceptio_hf.modeling.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio_hf.processing.processing_perceptio import PerceptioProcessor
from perceptio_hf.training.attention.targets import LOOKS, look_layer, looking_parts, places_to_look
from perceptio_hf.training.losses.labels import LabelLayout, LossCounts, loss_counts, read_labels
from perceptio_hf.training.losses.meter import PartMeter
from perceptio_hf.training.masks.training import LivingMasks

from . import fsdp, zero3
from .checkpoints import WholeCheckpoints, last_checkpoint
from .collator import PerceptioDataCollator
from .config import PerceptioSFTConfig, warn_of_slow_bfloat16
from .fsdp import check_adapters
from .lengths import BY_LENGTH, LengthSampler, check_has_lengths, sample_lengths
from .logging import draw_losses
from .lora import check_freezes, check_has_no_adapter, exact_copies, put_back
from .losses import PARTS, composite_loss
from .silence import TellsNobody
from .streams import SharedStream

_logger = logging.getLogger(__name__)
_TARGETS = ("labels", "layout", "mask_targets", "depth_targets", "depth_valid", "depth_given_as_codes")
_OF_THE_PLACE = ("revision", "token", "cache_dir")  # what to load says where from; the processor comes from there too


class DivergedError(ValueError):
    """The loss is not finite; nothing was updated with it."""


class PerceptioSFTTrainer(TellsNobody, LivingMasks, WholeCheckpoints, SFTTrainer):
    """Trains a Perceptio model on samples with pictures, conversations, masks and depth.

    Language model, both projectors and SAM2's mask decoder learn, unless `args` freezes them; SAM2's image encoder and
    the depth codec never do. Which parameters require gradients is set on the model that is given.

    One step gives the same weights however its batch is divided into micro batches and processes: every part of the
    loss is a sum over its items, divided by their number in the whole step.

    Args:
        model: a model, a PEFT model around one, or the folder or repository to load one from.
        args: settings; by default those of `PerceptioSFTConfig`.
        data_collator: by default `PerceptioDataCollator`.
        train_dataset, eval_dataset: samples with the columns `images` and `messages`, and where they have some `masks`,
            `depth` or `depth_codes`; several evaluation sets may be given as a dict.
        processing_class: by default the processor in the model's folder.
        peft_config: trains an adapter; see PEFT.

    Raises:
        ValueError: for a model without spatial tokens, a dataset without the columns it needs, or when nothing would
            be trained. `train` raises `DivergedError` when the loss is not finite, and OSError when a checkpoint cannot
            be saved.
    """

    loss_is_scaled_for_ga = True
    _told_of_shards = False
    _by_length: LengthSampler | None = None  # the order of training, where batches are of one length

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: PerceptioSFTConfig | None = None,
        data_collator: Callable[[list[dict]], dict[str, Tensor]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        *,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: Any = None,
    ):
        check_has_no_adapter(model)
        args = _checked_args(model, args)
        train_dataset, eval_dataset = _with_columns(train_dataset, "training"), _evaluation_sets(eval_dataset)
        check_has_lengths(args, train_dataset)
        source, model = _loaded(model, args)
        init_kwargs, args.model_init_kwargs = args.model_init_kwargs, None  # used up; SFTTrainer would say ignored
        place = {name: init_kwargs[name] for name in _OF_THE_PLACE if name in (init_kwargs or {})}
        processing_class = processing_class or PerceptioProcessor.from_pretrained(source, **place)
        if model.config.picture_mark_token_ids is None and isinstance(processing_class, PerceptioProcessor):
            model.config.picture_mark_token_ids = processing_class.picture_mark_token_ids()  # older checkpoints
        self._look_layer = look_layer(model.config.text_config, args.look_layer) if args.look_weight else None
        adapts = peft_config is not None or is_peft_model(model)
        if not adapts:  # else PEFT decides; quantised layers cannot be asked to
            choose_trainable(model, args)
        if data_collator is None:
            data_collator = PerceptioDataCollator(
                processing_class,
                depth_image_size=model.config.depth_config.image_size,
                on_error=args.on_error,
                max_length=args.max_length,
            )
        if peft_config is not None:
            set_seed(args.seed)  # PEFT draws the adapters' first weights before transformers sets the seed
        exact = exact_copies(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        put_back(self.model, exact)
        args.model_init_kwargs = init_kwargs
        check_trains(self.model)
        if adapts:
            check_freezes(self._perceptio, args)
        self._weights = args.loss_weights()
        self._vocabulary = self._perceptio.spatial_vocabulary()
        self._codec = self._perceptio.depth_model
        check_adapters(self)
        warn_of_slow_bfloat16(self.accelerator)
        if compute_metrics is not None and (self.is_fsdp_enabled or zero3.is_on(self.args)):
            raise ValueError(
                "compute_metrics takes a second pass through the model, where processes that share it (FSDP, ZeRO-3) "
                "would wait for one another wherever one has a picture or mask less: leave it out, and measure "
                "checkpoints by `perceptio eval`."
            )
        if self.is_fsdp_enabled:
            self._prepare_fsdp()
        elif self.is_deepspeed_enabled:  # ZeRO-3 too leaves nothing but shards outside the model's forward
            self._codec = zero3.whole_codec(self._codec, self.accelerator.device)
        self._meters = {"train": _part_meter(), "eval": _part_meter()}
        self.skipped_samples: dict[str, int] = {}  # by reason, known when `train` ends
        self.figures: Callable[[PerceptioSFTTrainer, PreTrainedModel], dict[str, float]] | None = None
        self._has_learnt: bool | None = None  # from any sample, on any process; None before the first step

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Autocast would keep a copy of every trained weight in half precision for the whole forward, 15 GB for 8
        # billion even under FSDP, and use it once.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.is_fsdp_enabled |= fsdp.enable_on_cpu(self.accelerator)
        if self.is_fsdp_enabled and fsdp.shares_gradients(self.args):
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """accelerate puts autocast into the forward of models; those that FSDP2 shards it leaves out."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    @property
    def _perceptio(self) -> PerceptioForConditionalGeneration:
        """The model inside whatever wraps it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @contextmanager
    def _whole_model(self) -> Iterator[PerceptioForConditionalGeneration | None]:
        """A model with all its weights, on the first process at least. Where processes share the weights out it is a
        copy, on the first one's device: a forward of shards is one of all processes."""
        model, by_zero3 = self._perceptio, zero3.is_on(self.args)
        shared, first = by_zero3 or isinstance(model, FSDPModule), self.is_world_process_zero()
        if shared:
            weights = zero3.gathered_weights(model, first) if by_zero3 else self.accelerator.get_state_dict(model)
        with zero3.unnoticed() if by_zero3 else nullcontext():
            if shared:
                model = _copy_of(model, weights).to(self.accelerator.device) if first else None
            if shared and first:  # computes as models do that accelerate leaves whole
                model.forward = convert_outputs_to_fp32(self.accelerator.autocast()(model.forward))
            yield model

    def _prepare_fsdp(self) -> None:
        fsdp.prepare(self.accelerator.state.fsdp_plugin)
        # The frozen codec is also needed outside the model's forward, where FSDP holds nothing but shards.
        self._codec = copy.deepcopy(self._codec).to(self.accelerator.device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """As ever, but batches by length are ours: transformers' would look for a column of lengths, and could not be
        resumed in the middle of an epoch."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != BY_LENGTH:
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = sample_lengths(dataset, self.data_collator.processor, self.data_collator.image_options)
        processes = self.accelerator.num_processes
        self._by_length = LengthSampler(lengths, self._train_batch_size, processes=processes, seed=seed)
        return self._by_length

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """As ever, but an evaluation of batches by length goes through its samples in their order (None): transformers
        would look for a column of lengths."""
        return None if self.args.train_sampling_strategy == BY_LENGTH else super()._get_eval_sampler(eval_dataset)

    def _get_dataloader(self, dataset: Dataset | IterableDataset, description: str, *args, **kwargs) -> DataLoader:
        """As ever, but all processes take as many batches of a stream. In training each reads shards of its own where
        there are equally many for all."""
        processes = self.accelerator.num_processes
        several = processes > 1 and isinstance(dataset, IterableDataset)
        if several and (description == "Evaluation" or dataset.num_shards % processes):
            dataset = SharedStream(dataset)
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _run_epoch(self, model: nn.Module, epoch: int, *args, **kwargs) -> None:
        """As ever. Where several processes go on in the middle of an epoch, accelerate has wrapped the sampler so often
        that it does not hear which epoch that is."""
        if self._by_length is not None:
            self._by_length.set_epoch(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list, LossCounts]:
        """The micro batches of the next step, and what they and those of all other processes hold together.

        Where a stream ends before a step is complete, for some process earlier than for others, all leave that step out
        and begin the next epoch: half a step would stay in the gradients, and a process without its share would not
        come to where the others wait. A process that had more is told.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = sum(map(self._counts, batches), LossCounts())
        *counts, found = self._reduced([*vars(counts).values(), len(batches)])
        if found < num_batches * self.accelerator.num_processes:
            if found < len(batches) * self.accelerator.num_processes and not self._told_of_shards:
                self._told_of_shards = True
                _logger.warning(
                    "The epoch ends at step %d, for the shards of another process hold less than those of process %d, "
                    "whose other samples are left out. Write the stream's shards alike, or in a number that the %d "
                    "processes do not divide: all of them then read all shards.",
                    self.state.global_step,
                    self.accelerator.process_index,
                    self.accelerator.num_processes,
                )
            self.control.should_epoch_stop = True
            return [], LossCounts()
        counts = LossCounts(*counts)
        self._has_learnt = bool(self._has_learnt) or counts.responses > 0
        return batches, counts

    def _get_num_items_in_batch(self, batch_samples: list, device) -> None:
        """`get_batch_samples` counts; labels alone do not tell how many spans and masks there are."""

    def _counts(self, batch: dict[str, Tensor]) -> LossCounts:
        return loss_counts(
            batch["labels"],
            self._vocabulary,
            batch["depth_valid"],
            depth_given_as_codes=batch["depth_given_as_codes"],
            layout=self._layout(batch),
        )

    def _layout(self, batch: dict[str, Tensor]) -> LabelLayout:
        """What the collator has read off the labels; other collators may leave it to the trainer."""
        if "layout" not in batch:
            batch["layout"] = read_labels(batch["labels"], self._vocabulary)
        return batch["layout"]

    def _reduced(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.args.device)).tolist()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: LossCounts | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The composite loss of a micro batch.

        Args:
            inputs: as the collator makes them.
            num_items_in_batch: the items of all micro batches of the step on all processes; None: those of this batch.

        Raises:
            DivergedError: if the loss or one of its parts is not finite; the step and the parts are named.
        """
        inputs = self.fill_spans(inputs)
        if self.args.span_noise and model.training:
            inputs["input_ids"] = self.disturb_spans(inputs["input_ids"], inputs["labels"])
        targets = {name: inputs.pop(name) for name in _TARGETS}
        counts = num_items_in_batch
        if counts is None:
            layout = targets["layout"]
            counts = loss_counts(targets["labels"], self._vocabulary, targets["depth_valid"], layout=layout)
        extras = {"output_attentions": True} if self.args.look_weight else {}
        criterion = self._criterion(inputs["input_ids"], targets, counts, has_pictures="pixel_values" in inputs)
        outputs = model(**inputs, use_cache=False, criterion=criterion, **extras)
        loss = outputs.loss
        self._record(loss, outputs.loss_parts, counts, is_share=num_items_in_batch is not None)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which averages gradients; ours are to be summed
        if return_outputs:  # for compute_metrics, which wants logits
            with torch.no_grad():
                outputs = model(**inputs, use_cache=False)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys=None):
        """As ever; labels hold the codes of the spans, for `compute_metrics` and `predict`."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if labels is not None:
            labels = self.fill_spans(self._prepare_inputs(inputs))["labels"]
        return loss, logits, labels

    def _set_signature_columns_if_needed(self) -> None:
        """What `remove_unused_columns` leaves: the columns of a sample; TRL knows words and pictures only."""
        self._signature_columns = list(SAMPLE_KEYS)

    @torch.no_grad()
    def fill_spans(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write the codec's codes into spans that came with a depth map, and its depth behind those that came as codes.

        Args:
            inputs: a batch of the collator.

        Returns:
            A copy whose `input_ids`, `labels` and `layout` hold all codes, and `depth_targets` and `depth_valid` all
            depth.
        """
        layout = self._layout(inputs)
        given = inputs["depth_given_as_codes"].bool()
        if not len(given):
            return {**inputs, "layout": layout}
        rows, columns = layout.rows[layout.is_code], layout.columns[layout.is_code] + 1
        codes = layout.codes[layout.is_code].view(len(given), -1)  # (s, N)
        depth, valid = inputs["depth_targets"].clone(), inputs["depth_valid"].clone()
        if bool((~given).any()):
            codes[~given] = self._codec.encode(depth[~given], valid[~given])
        if bool(given.any()):
            size = tuple(depth.shape[1:])
            depth[given], valid[given] = self._codec.decode(codes[given], size=size).to(depth.dtype), True
        tokens = torch.tensor(self._vocabulary.codes, device=codes.device)[codes].flatten()
        filled = {"depth_targets": depth, "depth_valid": valid, "layout": layout.with_codes(codes.flatten(), tokens)}
        for name in ("input_ids", "labels"):
            filled[name] = inputs[name].clone()
            filled[name][rows, columns] = tokens
        return {**inputs, **filled}

    def disturb_spans(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Replace some codes of every learnt span by codes of other places of that span, as wrong guesses would be.

        Args:
            input_ids, labels: (b, L), with all codes filled in.

        Returns:
            (b, L) ids in which each span has lost a share of its codes, drawn from 0 to twice `span_noise`.
        """
        is_code = torch.isin(labels, torch.tensor(self._vocabulary.codes, device=labels.device))
        codes = input_ids[is_code].view(-1, self._vocabulary.num_depth_tokens)  # (spans, N) token ids
        # transformers seeds all processes alike, which would disturb the spans of all in the same places.
        own = torch.Generator(codes.device).manual_seed(int(torch.randint(2**62, ())) + self.accelerator.process_index)
        draw = {"device": codes.device, "generator": own}
        share = 2 * self.args.span_noise * torch.rand(len(codes), 1, **draw)
        others = codes.gather(1, torch.randint(codes.shape[1], codes.shape, **draw))
        disturbed = torch.where(torch.rand(codes.shape, **draw) < share, others, codes)
        return input_ids.masked_scatter(is_code, disturbed)

    def _criterion(
        self, input_ids: Tensor, targets: dict[str, Tensor], counts: LossCounts, *, has_pictures: bool
    ) -> Callable:
        """What the model calls inside its forward, where every use of a parameter is seen by DDP and FSDP."""
        core = self._perceptio
        modules = [core.seg_projector, core.mask_model.mask_decoder]
        in_shards = self.is_fsdp_enabled or hasattr(next(core.parameters()), "ds_id")
        if not has_pictures and not in_shards:  # else the model sees to it
            modules += [core.model.vision_tower, core.model.multi_modal_projector]

        def criterion(hidden_states: Tensor, lm_head: Callable, outputs) -> tuple[Tensor, dict[str, Tensor]]:
            loss, parts = composite_loss(
                hidden_states,
                lm_head,
                targets["labels"],
                self._vocabulary,
                codec=self._codec,
                depth=targets["depth_targets"],
                depth_valid=targets["depth_valid"],
                mask_logits=outputs.mask_logits,
                mask_targets=targets["mask_targets"],
                mask_scores=outputs.mask_scores,
                weights=self._weights,
                counts=counts,
                layout=targets["layout"],
            )
            if self.args.look_weight:
                looking = self._looking(input_ids, targets, counts, outputs.attentions)
                loss, parts = loss + self.args.look_weight * sum(looking.values()), parts | looking
            return loss + zero_of(modules, loss.device), {name: part.detach() for name, part in parts.items()}

        return criterion

    def _looking(
        self, input_ids: Tensor, targets: dict[str, Tensor], counts: LossCounts, attentions: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        looks = places_to_look(
            input_ids,
            targets["labels"],
            self._vocabulary,
            targets["mask_targets"],
            image_seq_length=self._perceptio.config.image_seq_length,
        )
        return looking_parts(attentions[self._look_layer][:, : self.args.look_heads], looks, counts)

    def _record(self, loss: Tensor, parts: dict[str, Tensor], counts: LossCounts, *, is_share: bool) -> None:
        total, *values = torch.stack([loss.detach(), *(part.to(loss.device) for part in parts.values())]).tolist()
        values = dict(zip(parts, values, strict=True))
        if not all(map(math.isfinite, (total, *values.values()))):
            raise DivergedError(self._diverged(total, values))
        # Each of the micro batches of a step is recorded with its share of the step's items.
        shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes if is_share else 1
        self._meters[self._mode].add(values, counts, 1 / shares)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _diverged(self, total: float, parts: dict[str, float]) -> str:
        when = f"Step {self.state.global_step + 1}"
        if self._mode == "eval":
            when = f"Evaluation after step {self.state.global_step}"
        wrong = [f"{name} is {value}" for name, value in parts.items() if not math.isfinite(value)]
        good = [f"{name} {value:.4g}" for name, value in parts.items() if math.isfinite(value)]
        return (
            f"{when}: the loss is {total}: {', '.join(wrong) or 'no part of it'}"
            f"{' (finite: ' + ', '.join(good) + ')' if good else ''}. Nothing was updated with it. Look at the samples "
            f"and weights of that part, or try a lower learning_rate{self._last_good()}"
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """As ever, right before every step; stops before a gradient that is not finite ruins the weights. fp16's scaler
        skips such steps, and DeepSpeed may know no norm."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise DivergedError(
                f"Step {self.state.global_step + 1}: the loss is finite, but the norm of its gradient is "
                f"{float(norm)}. Nothing was updated with it. Try a lower learning_rate{self._last_good()}"
            )
        return norm

    def _last_good(self) -> str:
        last = last_checkpoint(self.args.output_dir, quiet=True)
        return f"; {last} is the last checkpoint before it." if last else "."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` and the means of the parts since the last call."""
        for name, value in self._meters[self._mode].means(self._reduced).items():
            self._metrics[self._mode][name] = [value]
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As ever, with the parts as metrics. The loss is the weighted sum of the parts, each averaged over its items;
        transformers would average over batches.

        Where processes times batch does not divide the samples, accelerate fills the last batches up with samples from
        the start, which then count twice.
        """
        self._meters["eval"] = _part_meter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._meters["eval"].means(self._reduced)
        if not means:
            raise ValueError("Every sample of the evaluation set was left out, so there is no loss. Mend the data set.")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        weights = vars(self._weights) | dict.fromkeys(LOOKS, self.args.look_weight)
        output.metrics[f"{metric_key_prefix}_loss"] = sum(weights[name] * means[name] for name in means)
        return output

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        """As ever, and with what `figures` measures, if that is set: held-out sets answered by generation. Sets of a
        dict are evaluated one by one, under prefixes of their own; figures belong to the whole.

        The first process measures for all; where they hold shards of the model, with the whole of it.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.figures is None or metric_key_prefix != "eval":
            return metrics
        with self._whole_model() as model:
            found = [self.figures(self, model) if self.is_world_process_zero() else {}]
        figures = {f"eval_{name}": value for name, value in broadcast_object_list(found)[0].items()}
        was_training = self.model.training
        self.model.eval()  # as in any evaluation: what is logged in training takes the parts of the loss along
        self.log(dict(figures))
        self.model.train(was_training)
        # For callbacks that wait for a figure. Without a set beside them nobody was told yet of an evaluation, and
        # transformers would evaluate again at the end of the epoch.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return metrics | figures

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Train; see `Trainer.train`. `True` resumes from the last complete checkpoint of `output_dir`.

        Raises:
            ValueError: if there is nothing to resume from, the checkpoint is damaged, another process trains into
                `output_dir`, every sample was left out, or the loss is not finite.
            OSError: if a checkpoint cannot be saved.
        """
        with in_use(self.args.output_dir, "training") if self.is_world_process_zero() else nullcontext():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self._report_skipped()
            if not self.state.global_step:
                raise ValueError("The data set holds fewer samples than one step takes, so nothing was trained.")
            if self.skipped_samples and self._has_learnt is False:
                parts = ", ".join(f"{count} because of their {name}" for name, count in self.skipped_samples.items())
                raise ValueError(f"Every sample was left out ({parts}), so nothing was learnt. Mend the data set.")
            self.draw_losses()
        return output

    def draw_losses(self) -> None:
        """Draw what was logged so far as `losses.png` into `output_dir`, unless the settings say no."""
        if self.args.plot_losses and self.is_world_process_zero():
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            draw_losses(self.state.log_history, Path(self.args.output_dir) / "losses.png")

    def _report_skipped(self) -> None:
        """Say how many samples the collator has left out, on all processes together."""
        skipped = getattr(self.data_collator, "skipped", {})
        reasons = sorted(set(REASONS) | set(skipped))
        counts = self._reduced([skipped.get(reason, 0) for reason in reasons])
        self.skipped_samples = {reason: int(count) for reason, count in zip(reasons, counts, strict=True) if count}
        if self.skipped_samples:
            parts = ", ".join(f"{count} for {reason}" for reason, count in self.skipped_samples.items())
            _logger.warning("%d samples could not be used and were left out: %s.", sum(map(int, counts)), parts)


def _part_meter() -> PartMeter:
    return PartMeter((*PARTS.values(), *LOOKS.values()))


def _checked_args(model, args: PerceptioSFTConfig | None) -> PerceptioSFTConfig:
    if args is None:
        name = model if isinstance(model, str) else model.config.name_or_path or "perceptio"
        return PerceptioSFTConfig(output_dir=f"{Path(name).name}-SFT")
    if not isinstance(args, PerceptioSFTConfig):
        raise ValueError(f"`args` is a {type(args).__name__}; expected PerceptioSFTConfig, which has the loss weights.")
    return args


def _with_columns(dataset, name: str):
    """The data set with the columns of a sample, its pictures undecoded: one that cannot be read is an error of its own
    sample then, which `on_error` decides about."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"The {name} set is a {type(dataset).__name__}; expected a Dataset or IterableDataset of `datasets`."
        )
    return as_rows(dataset, f"The {name} set")


def _evaluation_sets(dataset):
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _with_columns(part, f"evaluation ({name})") for name, part in dataset.items()}
    return _with_columns(dataset, "evaluation")


def _loaded(model, args: PerceptioSFTConfig) -> tuple[str, nn.Module]:
    """The model, and where its processor is."""
    if isinstance(model, str):
        return model, PerceptioForConditionalGeneration.from_pretrained(model, **(args.model_init_kwargs or {}))
    if args.model_init_kwargs:
        raise ValueError("model_init_kwargs are for a model given by its path; this one has been made already.")
    return model.config.name_or_path, model


def _copy_of(model: PerceptioForConditionalGeneration, weights: dict[str, Tensor]) -> PerceptioForConditionalGeneration:
    """A model for answers like this one, of whose weights others hold shards; `weights` are used as they are."""
    with no_init_weights():
        whole = PerceptioForConditionalGeneration(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole.requires_grad_(False).eval()


def choose_trainable(model: PerceptioForConditionalGeneration, args: PerceptioSFTConfig) -> None:
    """Set which parameters of `model` require gradients: what `args` does not freeze."""
    model.requires_grad_(False)
    model.seg_projector.requires_grad_(True)
    for frozen, modules in (
        (args.freeze_language_model, (model.model.language_model, model.lm_head)),
        (args.freeze_projector, (model.model.multi_modal_projector,)),
        (args.freeze_vision_tower, (model.model.vision_tower,)),
        (args.freeze_mask_decoder, (model.mask_model.mask_decoder,)),
    ):
        for module in modules:
            module.requires_grad_(not frozen)
    model.mask_model.mask_decoder.pred_obj_score_head.requires_grad_(False)  # speaks of objects in videos; unused


def check_trains(model: nn.Module) -> None:
    """ValueError if no parameter requires a gradient."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "This trains nothing: no parameter of the model requires a gradient. Freeze less, or give a peft_config."
        )


def zero_of(modules: list[nn.Module], device: torch.device) -> Tensor:
    """A zero on `device` that depends on all their trainable parameters, so that each gets a gradient in every micro
    batch, with and without masks. FSDP exchanges the gradients there are, and waits for ever where processes differ in
    them; an optimizer steps where there is one, and must do so however a batch is divided."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad and not hasattr(p, "ds_id")]
    return sum(((parameter.sum() * 0).to(device) for parameter in parameters), 0.0)
