"""AMX is announced by some virtual machines that then forbid it: oneDNN's 16-bit products would end the process."""

import os

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
