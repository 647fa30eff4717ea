"""The runtime: one base model, many adapters. Knows tokens and tensors; knows no wire format."""

import logging

from lora_runtime import threads

threads.choose()

# bitsandbytes says at import, on some CPUs, that a package should be installed for a kernel of its
# layers. None of its layers is used here, and whoever imports it is behind this line.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in str(record.msg)
)
