"""Benchmarks beside peft, bitsandbytes and the limit: one file each, `python -m benchmarks --list` names them."""


def environment(threads: int) -> dict[str, str]:
    """Variables for a process with so many threads. How threads wait for each other is left to OpenMP's default, as users have it."""
    return {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
