"""Rows wait in a bounded pool, and come back whole."""

import pytest
import torch

from tokenprune.engine.visual.waiting_rows import RowPool, WaitingPrompts


def test_rows_come_back_as_they_were_wherever_they_lie():
    pool = RowPool(7, 3, torch.float32, "cpu")
    a, b = torch.randn(2, 3), torch.randn(4, 3)
    at_a, at_b = pool.store(a), pool.store(b)
    assert pool.num_free == 1
    assert pool.num_bytes == 7 * 3 * 4
    pool.release(at_a)
    c = torch.randn(3, 3)
    at_c = pool.store(c)
    assert torch.equal(pool.read(at_b), b)
    assert torch.equal(pool.read(at_c), c)
    assert len({*at_b, *at_c}) == 7
    assert pool.read([]).shape == (0, 3)


def test_a_pool_that_is_full_says_so_and_keeps_what_it_has():
    pool = RowPool(2, 3, torch.float32, "cpu")
    rows = torch.randn(2, 3)
    places = pool.store(rows)
    with pytest.raises(RuntimeError, match="1 rows of a prompt must wait, got room for 0"):
        pool.store(rows[:1])
    assert torch.equal(pool.read(places), rows)


def test_a_request_that_is_forgotten_gives_back_rows_and_features():
    pool = RowPool(9, 1, torch.float32, "cpu")
    prompts = WaitingPrompts(pool)
    first, second = prompts.of(3), prompts.of(5)
    first.rows += pool.store(torch.ones(4, 1))
    first.late[0] += pool.store(torch.ones(2, 1))
    second.rows += pool.store(torch.ones(1, 1))
    assert prompts.of(3) is first
    prompts.forget(3)
    prompts.forget(3)
    prompts.forget(4)
    assert pool.num_free == 8
    assert prompts.of(3).rows == []
    assert prompts.of(5) is second
