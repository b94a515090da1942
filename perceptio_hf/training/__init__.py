"""Training for users: losses, trainer, collator, recipes, depth codec.

Imports `data`, the model and what is below; never `evaluation`.
"""

import logging

# TRL imports PEFT, and PEFT bitsandbytes, which warns in every run of a kernel for 4-bit weights on the CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
