"""How the benchmarks run vLLM on a CPU; to be set before vLLM is imported."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # all cores
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
