from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.support import Engine
from tests.oracle.loop import Oracle
from tokenprune.demo.checkpoint import build_checkpoint

# the engine core stays in this process, where tests can look at the scheduler
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama"))


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    engine = Engine(checkpoint)
    yield engine
    engine.close()
