"""Benchmarks beside peft, bitsandbytes and the limit: one file each, `python -m benchmarks --list` names them."""


def environment(threads: int) -> dict[str, str]:
    """Variables for a process with so many threads; ones that wait do not spin, for the sake of who else is there."""
    return {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
