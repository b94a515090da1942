"""The loop that trains a depth codec: on a CPU, a GPU, or in several processes that accelerate started."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceptio_hf.files import replacing
from perceptio_hf.modeling.configuration_depth_vqvae import DepthVQVAEConfig
from perceptio_hf.modeling.modeling_depth_vqvae import DepthVQVAE, DepthVQVAEOutput
from perceptio_hf.modeling.placement import multiplies_bfloat16

from .book import code_depths, reorder_codes_, restart_unused_, start_codebook_, update_codebook_
from .maps import DepthSource, Order, Pair, batches
from .options import Clock, CodebookOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

_DEFAULTS = CodebookOptions()
_LOOK_EVERY = 10  # steps between two looks at the loss, each of which a GPU has to be waited for


@dataclass(frozen=True)
class Saving:
    """Where a training is kept, so that it goes on after it was stopped.

    Args:
        path: of the file.
        claim: what it depends on besides options, configuration and seed; those of another claim are refused.
        minutes: between two times.
    """

    path: Path
    claim: dict[str, Any]
    minutes: float = 5.0


class _Losses(nn.Module):
    """The codec's losses as a forward, which is where DDP sees the use of its parameters."""

    def __init__(self, codec: DepthVQVAE):
        super().__init__()
        self.codec = codec

    def forward(self, filled: Tensor, weight: Tensor, quantise: bool) -> DepthVQVAEOutput:
        return self.codec.losses(filled, weight, quantise=quantise)


def train_codebook(
    config: DepthVQVAEConfig,
    source: DepthSource,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    options: CodebookOptions = _DEFAULTS,
    workers: int = 0,
    accelerator: "Accelerator | None" = None,
    saving: Saving | None = None,
    progress: Callable[[float, float], None] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> DepthVQVAE:
    """Train a depth codec from scratch.

    Args:
        config: The codec to make.
        source: Where its maps come from.
        steps, minutes: When to stop: give exactly one. Only `steps` makes two runs alike.
        seed: Of weights, batches and restarts. The caller's random state is left as it was.
        options: The rest.
        workers: Processes that read maps ahead.
        accelerator: Device and processes; by default the CPU and this process alone.
        saving: Go on from what an earlier run saved there, and save there now and then.
        progress: Called now and then with the share of the training done and the reconstruction loss.
        now: Seconds, for `minutes`.

    Returns:
        The codec in evaluation mode, on its device, codes numbered by mean depth: 0 farthest, K - 1 nearest. In all
        processes the same.

    Raises:
        ValueError: Not exactly one of `steps` and `minutes`; a batch that cannot be shared out; a saved training of
            something else.
        RuntimeError: The loss is no longer finite.
    """
    return _Training(config, source, Clock(steps, minutes, now), seed, options, workers, accelerator, saving).run(
        progress
    )


class _Training:
    def __init__(
        self,
        config: DepthVQVAEConfig,
        source: DepthSource,
        clock: Clock,
        seed: int,
        options: CodebookOptions,
        workers: int,
        accelerator: "Accelerator | None",
        saving: Saving | None,
    ):
        self.source, self.clock, self.options, self.workers = source, clock, options, workers
        self.accelerator, self.saving, self.seed = accelerator, saving, seed
        self.processes = 1 if accelerator is None else accelerator.num_processes
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.device = torch.device("cpu") if accelerator is None else accelerator.device
        if options.batch_size % self.processes:
            raise ValueError(
                f"batch_size is {options.batch_size}, which {self.processes} processes cannot share out evenly."
            )
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            codec = DepthVQVAE(config).train()
        self.codec = codec.to(self.device).to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.optimizer = torch.optim.AdamW(self.codec.parameters(), lr=options.learning_rate, weight_decay=1e-4)
        self.losses = _Losses(self.codec)
        if accelerator is not None and self.processes > 1:
            self.losses = accelerator.prepare(self.losses)
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=_is_half(options, self.device))
        self.quantise = False
        self.saved_at = clock.now()
        kind = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
        self.claim = {"options": asdict(options), "config": kind, "seed": seed, "processes": self.processes}

    def run(self, progress: Callable[[float, float], None] | None) -> DepthVQVAE:
        self._load()
        share = self._share()
        pairs = self._pairs() if share < 1.0 else iter(())
        while share < 1.0:
            self._step(share, next(pairs), progress)
            share = self._share()
            if self.saving is not None and self.clock.now() - self.saved_at > 60 * self.saving.minutes:
                self._save()
        if not self.quantise:
            if self.saving is not None:
                self._save()
            raise ValueError(
                f"The codec has been trained for {self.clock.step} steps, its codes were not begun with, and the steps "
                "or minutes that are given are over: give more, or --overwrite to start anew."
            )
        codec = self.codec.eval().to(memory_format=torch.contiguous_format)
        reorder_codes_(codec, code_depths(codec, self.source, workers=self.workers).argsort())
        return codec

    def _pairs(self) -> Iterator[Pair]:
        each = self.options.batch_size // self.processes
        order = Order(len(self.source), each, self.seed, self.rank, self.processes, self.clock.step)
        return batches(self.source, order, workers=self.workers)

    def _share(self) -> float:
        """Of the first process, since all must stop together."""
        share = self.clock.share()
        if self.processes == 1 or self.clock.minutes is None:
            return share
        return float(self._total(torch.tensor([share if self.rank == 0 else 0.0], device=self.device)))

    def _total(self, tensor: Tensor) -> Tensor:
        return tensor if self.processes == 1 else self.accelerator.reduce(tensor, reduction="sum")

    def _step(self, share: float, pair: Pair, progress: Callable[[float, float], None] | None) -> None:
        if not self.quantise and share >= self.options.continuous_share:
            if self.options.kmeans_start:
                start_codebook_(self.codec, self.source, generator=self.generator, workers=self.workers)
                self._share_codebook()
            self.quantise = True
        self.optimizer.param_groups[0]["lr"] = self.options.learning_rate * _one_cycle(share)
        filled, weight = (x[:, None].to(self.device).to(memory_format=torch.channels_last) for x in pair)
        with self.autocast:
            output = self.losses(filled, weight, self.quantise)
        look = self.device.type == "cpu" or self.clock.step % _LOOK_EVERY == _LOOK_EVERY - 1
        if look and not bool(output.loss.isfinite()):
            raise RuntimeError(f"The loss is {output.loss.item()}; lower the learning rate.")
        self.optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        self.optimizer.step()
        if self.quantise:
            self._move_codes(output, share)
        self.clock.step += 1
        if progress is not None and self.clock.step % _LOOK_EVERY == 0:
            progress(share, output.reconstruction_loss.item())

    def _move_codes(self, output: DepthVQVAEOutput, share: float) -> None:
        book, latents = self.codec.depth_codebook, output.latents.detach()
        update_codebook_(book, latents, output.codes, decay=self.options.decay, total=self._total)
        settled = share > 1.0 - self.options.settled_share
        if self.options.restart_every and self.clock.step % self.options.restart_every == 0 and not settled:
            restart_unused_(book, latents, output.codes, generator=self.generator)
            self._share_codebook()

    def _share_codebook(self) -> None:
        """What the first process chose becomes that of all."""
        if self.processes > 1:
            for buffer in self.codec.depth_codebook.buffers():
                buffer.copy_(self._total(buffer if self.rank == 0 else torch.zeros_like(buffer)))

    def _save(self) -> None:
        self.saved_at = self.clock.now()
        if self.rank != 0:
            return
        self.saving.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "claim": {**self.claim, **self.saving.claim},
            "codec": self.codec.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.clock.step,
            "seconds": self.clock.seconds,
            "quantise": self.quantise,
        }
        try:
            with replacing(self.saving.path) as temporary:
                torch.save(state, temporary)
        except RuntimeError as error:  # torch's way to say that a disk is full
            if type(error) is not RuntimeError:  # of a kind of its own, such as CUDA out of memory
                raise
            raise OSError(
                f"{self.saving.path} could not be written ({' '.join(str(error).split())[:100]}); make room there and "
                "give the same command again: it goes on from what was saved before."
            ) from error

    def _load(self) -> None:
        if self.saving is None or not self.saving.path.exists():
            return
        try:
            state = torch.load(self.saving.path, map_location=self.device, weights_only=True)
            claim = state["claim"]
        except Exception as error:  # torch's and pickle's many kinds
            raise ValueError(f"{self.saving.path} is damaged ({error}); remove it to start anew.") from None
        expected = {**self.claim, **self.saving.claim}
        changed = [key for key in {**expected, **claim} if expected.get(key) != claim.get(key)]
        if changed:
            raise ValueError(
                f"{self.saving.path} is a training with another {changed[0].replace('_', ' ')} that was not finished; "
                "run the same command again to go on with it, or give --overwrite to start anew."
            )
        self.codec.load_state_dict(state["codec"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.quantise = state["quantise"]
        self.clock.go_on(state["step"], state["seconds"])


def _is_half(options: CodebookOptions, device: torch.device) -> bool:
    """Whether convolutions compute in bfloat16, with the same result; on a CPU that has it 1.5 times as fast."""
    return options.precision == "bfloat16" or (options.precision == "auto" and multiplies_bfloat16(device))


def _one_cycle(share: float, warmup: float = 0.05) -> float:
    """Learning rate factor: linear rise over `warmup`, cosine fall to 1 % at the end."""
    if share < warmup:
        return share / warmup
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * (share - warmup) / (1.0 - warmup)))
