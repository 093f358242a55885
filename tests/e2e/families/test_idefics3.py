"""Idefics3 prunes like a transformers loop that drops the same rows."""

from pathlib import Path

import pytest

from tests.e2e.families.plain import assert_like_a_transformers_loop

pytestmark = pytest.mark.vllm


def test_a_batch_of_all_cases_equals_a_transformers_loop(checkpoint: Path, tmp_path: Path) -> None:
    assert_like_a_transformers_loop("idefics3", "<image>", checkpoint, tmp_path / "idefics3")
