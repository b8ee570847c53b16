"""vLLM lives in an environment of its own (`make test-vllm`); elsewhere these tests are not even collected."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one worker runs in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

if find_spec("vllm"):
    from tests.vllm.checkpoints import Checkpoints


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoints":
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
