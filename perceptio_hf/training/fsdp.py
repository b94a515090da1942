"""What FSDP2 needs here: settings that fit the model, and a word to accelerate where the processes are CPUs."""

import os

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, is_peft_model
from transformers import Trainer, TrainingArguments

from . import zero3

NO_ADAPTERS = (
    "Neither FSDP nor DeepSpeed's ZeRO-3 can shard an embedding whose rows PEFT trains one by one (accelerate 1.15, "
    "PEFT 0.21). Adapters are small: give every GPU the whole model, as recipes/accelerate/ddp_8gpu.yaml does "
    "(--multi_gpu)."
)


NO_LATE_START = (
    "seg_projector_start_step comes when the model is in shards already, which cannot be given new weights: leave it "
    "out, so that the start comes before the first step, or train without FSDP."
)


def is_wanted() -> bool:
    """Whether this process was launched with `--use_fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_is_off() -> None:
    """Raises ValueError for a training by rewards where the model would be sharded by FSDP."""
    if is_wanted():
        raise ValueError(
            "A training by rewards cannot share the model by FSDP: answers are generated and rewarded by every process "
            "on its own, which needs the whole model. Give every GPU all of it (recipes/accelerate/ddp_8gpu.yaml, with "
            "adapters), or use DeepSpeed's ZeRO-3, which is gathered for that (zero3_8gpu.yaml)."
        )


def enable_on_cpu(accelerator: Accelerator) -> bool:
    """Let CPU processes that were launched with `--use_fsdp` shard the model; returns whether they do now.

    accelerate 1.15 reads the setting on accelerators only and quietly replicates the model on CPUs. Its FSDP2 code
    itself runs there, with gloo.
    """
    if not is_wanted() or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP  # every new view of the state starts from this one
    return True


def shares_gradients(settings: TrainingArguments) -> bool:
    """Whether gradients are shared out after every micro batch of a step, unless a user wants it otherwise:

    accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: false}}

    accelerate's default is to exchange them once a step, which saves time between GPUs that are far from one another.
    Until then each of them holds whole gradients: 28 GiB for 8 billion parameters, of which a share of eight is 4.
    """
    return (settings.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch", True)


def check_adapters(trainer: Trainer) -> None:
    """PEFT reads the weights of an embedding whose rows it trains one by one where only shards of them are.

    Raises:
        ValueError: for adapters where processes share the model, by FSDP or DeepSpeed's ZeRO-3.
    """
    if not is_peft_model(trainer.model):
        return
    if trainer.is_fsdp_enabled or zero3.is_on(trainer.args):
        raise ValueError(NO_ADAPTERS)


def prepare(plugin: FullyShardedDataParallelPlugin) -> None:
    """Fit the settings to the model: parameters are gathered as they are, and autocast chooses where bf16 will do.

    FSDP's own way, which is to cast all parameters, would take SAM2 and the codec from float32.

    Raises:
        ValueError: for settings that do not fit.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP is set to version {plugin.fsdp_version}, which shards frozen and trained parameters together; set "
            "fsdp_version: 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is on, but then accelerate sends nothing but parameters to the other "
            "processes, and the depth codebook is a buffer; set it to false."
        )
    plugin.mixed_precision_policy = None
