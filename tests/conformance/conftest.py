"""bf16 on the CPU without AMX: some virtual machines announce these instructions and do not run them."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
