"""`usage.pruning`, the header and the stream's last chunk, against sums done by hand."""

import json
from typing import Any

import pytest

from tokenprune.lengths import PromptLayout
from tokenprune.plan import make_plan
from tokenprune.request import parse_pruning
from tokenprune.server.usage import (
    PromptRecord,
    RequestRecord,
    add_to_events,
    add_to_whole,
    figures_block,
    header_value,
    words_block,
)
from tokenprune.shape import EngineShape, ModelShape

# 8 layers in stages of 2, 1, 5
ENGINE = EngineShape(num_layers=8, boundaries=(0, 2, 3), max_num_batched_tokens=2048)
# 100 bytes of one token in one layer
MODEL = ModelShape(0, 0, 1, num_kv_heads=1, head_size=50, kv_element_bytes=1)
PHOTO = PromptLayout(num_tokens=50, visual_spans=((4, 44),))
TEXT = PromptLayout(num_tokens=20)


def record_of(value: object, *prompts: tuple[PromptLayout, list[int]]) -> RequestRecord:
    pruning = parse_pruning(value)
    return RequestRecord(
        pruning,
        prompts=[PromptRecord(make_plan(pruning, p, ENGINE), p, list(c)) for p, c in prompts],
    )


HALVES = {"visual": {"method": "uniform", "prune_layers": [2, 3], "keep_ratios": [0.5, 0.25]}}


def test_a_pruned_request_reports_what_each_stage_holds() -> None:
    record = record_of(HALVES, (PHOTO, [6]))
    assert words_block(record) == {
        "applied": {"visual": "uniform", "kv": None, "channels": None},
        "skipped": {},
        "visual_layers": [2, 3],
        "notes": [],
    }
    # 55 tokens computed; stages of 2, 1, 5 layers hold 55, 35, 25
    assert figures_block(record, ENGINE, MODEL) == {
        "visual_tokens": 40,
        "visual_tokens_kept": {"0": 40, "2": 20, "3": 10},
        "kv_tokens_logical": 55,
        "kv_tokens_physical": round((2 * 55 + 35 + 5 * 25) / 8),
        "kv_bytes_saved": (8 * 55 - 270) * 100,
    }


def test_choices_and_prompts_add_up() -> None:
    record = record_of(HALVES, (PHOTO, [6, 1]), (TEXT, [3]))
    block = figures_block(record, ENGINE, MODEL)
    assert block is not None
    assert block["visual_tokens"] == 40
    assert block["visual_tokens_kept"] == {"0": 40, "2": 20, "3": 10}
    assert block["kv_tokens_logical"] == 55 + 50 + 22
    assert block["kv_bytes_saved"] == 2 * (20 + 5 * 30) * 100
    assert words_block(record)["applied"]["visual"] == "uniform"
    assert words_block(record)["skipped"] == {"visual": "no_visual_tokens"}


def test_keeping_everything_saves_nothing() -> None:
    block = figures_block(
        record_of({"visual": {"method": "uniform", "keep_ratio": 1}}, (PHOTO, [6])), ENGINE, MODEL
    )
    assert block is not None
    assert block["visual_tokens_kept"] == {"0": 40, "2": 40, "3": 40}
    assert block["kv_tokens_physical"] == block["kv_tokens_logical"] == 55
    assert block["kv_bytes_saved"] == 0


def test_evicted_tokens_are_held_no_more_but_were_computed() -> None:
    kv = {"method": "lagkv", "sink": 2, "lag": 16, "keep_ratio": 0.25}
    record = record_of({"kv": kv}, (PHOTO, [6]))
    block = figures_block(record, ENGINE, MODEL)
    assert block is not None
    # 55 tokens computed; (55 - 2) // 16 - 1 partitions give up 12 tokens each
    assert record.applied() == {"visual": None, "kv": "lagkv", "channels": None}
    assert block["visual_tokens_kept"] == {"0": 40, "2": 40, "3": 40}
    assert block["kv_tokens_logical"] == 55
    assert block["kv_tokens_physical"] == 55 - 2 * 12
    assert block["kv_bytes_saved"] == 8 * 2 * 12 * 100
    assert header_value(record) == "kv=lagkv;keep_ratio=0.25;lag=16"


def test_the_header_names_a_budget_where_one_was_given() -> None:
    kv = {"method": "streaming", "lag": 16, "budget_tokens": 40}
    assert (
        header_value(record_of({"kv": kv}, (PHOTO, [6]))) == "kv=streaming;budget_tokens=40;lag=16"
    )


def test_a_bypassed_request_only_gives_the_reason() -> None:
    record = RequestRecord(parse_pruning("balanced"), bypass="beam_search")
    assert figures_block(record, ENGINE, MODEL) is None
    assert words_block(record)["applied"] == {"visual": None, "kv": None, "channels": None}
    assert words_block(record)["skipped"] == {"visual": "beam_search"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        pytest.param(
            record_of(HALVES, (PHOTO, [0])), "visual=uniform;keep_ratio=0.25;layers=2,3", id="cut"
        ),
        pytest.param(
            record_of({"visual": {"method": "vflowopt", "stages": [0.5, 0.7, 0.5]}}, (PHOTO, [0])),
            "visual=vflowopt;keep_ratios=0.5,0.175;layers=0,3",
            id="cut-per-image",
        ),
        pytest.param(record_of(HALVES, (TEXT, [0])), "none", id="skipped"),
    ],
)
def test_the_header_names_what_was_applied(record: RequestRecord, expected: str) -> None:
    assert header_value(record) == expected


def sums(blocks: list[Any]) -> Any:
    """Add usages up as LangChain does, which raises where kinds differ."""
    first = blocks[0]
    if isinstance(first, dict):
        assert all(block.keys() == first.keys() for block in blocks)
        return {key: sums([block[key] for block in blocks]) for key in first}
    assert all(type(block) is int for block in blocks)
    return sum(blocks)


def test_the_figures_of_several_answers_add_up() -> None:
    lagkv = {"kv": {"method": "lagkv", "sink": 2, "lag": 16, "keep_ratio": 0.25}}
    records = [
        record_of(HALVES, (PHOTO, [6])),
        record_of(HALVES, (TEXT, [3])),
        record_of(lagkv, (PHOTO, [9])),
    ]
    blocks = [figures_block(record, ENGINE, MODEL) for record in records]
    together = sums(blocks)
    assert together["visual_tokens_kept"] == {"0": 80, "2": 60, "3": 50}
    assert together["kv_tokens_logical"] == 55 + 22 + 58


RECORD = record_of(HALVES, (PHOTO, [6]))
FIGURES, WORDS = figures_block(RECORD, ENGINE, MODEL), words_block(RECORD)


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(": keep-alive\n\n", id="comment"),
        pytest.param("data: [DONE]\n\n", id="done"),
        pytest.param('data: {"choices":[{"delta":{"content":"a"}}]}\n\n', id="token"),
        pytest.param(
            'data: {"choices":[{"delta":{"content":"\\"usage\\":{"}}]}\n\n', id="text-says-usage"
        ),
        pytest.param('data: {"choices":[{"index":0}],"usage":{"total":1}}\n\n', id="running-usage"),
        pytest.param(
            'event: message_start\ndata: {"message":{"usage":{"input_tokens":1}}}\n\n',
            id="usage-at-the-start",
        ),
    ],
)
def test_other_events_pass_unchanged(chunk: str) -> None:
    body = chunk.encode()
    assert add_to_events(body, RECORD, ENGINE, MODEL) == body


def test_the_closing_chunk_carries_the_blocks() -> None:
    chunk = b'data: {"id":"x","choices":[],"usage":{"total_tokens":3}}\n\n'
    body = add_to_events(chunk, RECORD, ENGINE, MODEL)
    assert body.startswith(b"data: ")
    assert body.endswith(b"\n\n")
    assert json.loads(body.removeprefix(b"data: ")) == {
        "id": "x",
        "choices": [],
        "usage": {"total_tokens": 3, "pruning": FIGURES},
        "pruning": WORDS,
    }


def test_an_answer_that_is_no_object_passes_unchanged() -> None:
    assert add_to_whole(b"null", RECORD, ENGINE, MODEL) == b"null"


def test_a_closing_event_that_holds_the_whole_answer_carries_them_inside() -> None:
    event = {"type": "response.completed", "response": {"id": "x", "usage": {"total_tokens": 3}}}
    text = json.dumps(event, separators=(",", ":"))
    body = add_to_events(f"event: e\ndata: {text}\n\n".encode(), RECORD, ENGINE, MODEL)
    head, data, *_ = body.split(b"\n")
    assert head == b"event: e"
    assert json.loads(data.removeprefix(b"data: "))["response"] == {
        "id": "x",
        "usage": {"total_tokens": 3, "pruning": FIGURES},
        "pruning": WORDS,
    }
