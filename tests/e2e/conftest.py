from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import CRAMPED, Engine
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


@pytest.fixture(scope="session")
def running() -> Iterator[dict[str, Engine]]:
    """The engines of the shared checkpoint by their arguments, each started once."""
    engines: dict[str, Engine] = {}
    with pytest.MonkeyPatch.context() as patch:
        # an engine that ends would take down the process groups, which it shares with all others
        patch.setattr("vllm.v1.engine.core.cleanup_dist_env_and_memory", lambda: None)
        yield engines
        for engine in engines.values():
            engine.close()


@pytest.fixture(scope="module")
def lend(checkpoint: Path, running: dict[str, Engine]) -> Iterator[Callable[..., Engine]]:
    """Lends a module the engine with some arguments, as if just started.

    It must come back idle; one that does not is closed, so that other modules are not harmed.
    """
    lent: dict[str, Engine] = {}

    def get(**arguments: Any) -> Engine:
        name = repr(sorted(arguments.items()))
        if name not in lent:
            if name not in running:
                running[name] = Engine(checkpoint, **arguments)
            running[name].forget()
            lent[name] = running[name]
        return lent[name]

    yield get
    busy = [name for name, engine in lent.items() if not engine.is_idle]
    for name in busy:
        running.pop(name).close()
    assert not busy, "requests, blocks or plans are left in these engines"


@pytest.fixture(scope="module")
def engine(lend: Callable[..., Engine]) -> Engine:
    return lend()


@pytest.fixture(scope="module")
def packing_engine(lend: Callable[..., Engine]) -> Engine:
    return lend(allow_channel_pruning=True)


@pytest.fixture(scope="module")
def cramped(lend: Callable[..., Engine]) -> Engine:
    return lend(**CRAMPED, num_gpu_blocks_override=140)
