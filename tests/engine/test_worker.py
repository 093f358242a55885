"""How the worker puts our runner in the place of vLLM's, and leaves vLLM as it was."""

import types

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tokenprune.engine.worker import replaced


@pytest.fixture
def module() -> types.ModuleType:
    made = types.ModuleType("made")
    made.Runner = "theirs"
    return made


def test_an_attribute_is_replaced_inside_the_block_only(module):
    with replaced(module, "Runner", "ours"):
        assert module.Runner == "ours"
    assert module.Runner == "theirs"


def test_an_attribute_is_put_back_after_an_error(module):
    with pytest.raises(RuntimeError, match="no device"), replaced(module, "Runner", "ours"):
        raise RuntimeError("no device")
    assert module.Runner == "theirs"


def test_only_what_is_there_is_replaced(module):
    # a vLLM that renamed its class must not go on with its own
    with pytest.raises(AttributeError, match="Gone"), replaced(module, "Gone", "ours"):
        pass
    assert not hasattr(module, "Gone")
