"""Fixtures that more than one module of these tests uses."""

import pytest

from tests.cast_serve.tiny_llama import Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))
