"""`tokenprune serve` as a user runs it, asked through the real `openai` client."""

import base64
import io
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from PIL import Image

from bench.load.bodies import draw_bodies
from bench.load.fuzz import send_all
from tests.server.doors import DOORS, Door
from tokenprune.demo.checkpoint import build_checkpoint

pytestmark = pytest.mark.vllm

VISUAL_TOKENS = 144
MAX_BATCHED_TOKENS = 512
MAX_WAITING_TOKENS = 500
START_SECONDS = 300
STOP_SECONDS = 60
# longer than any question to a worker may take that has a time limit, such as vLLM's own 10 s
STOPPED_SECONDS = 12

TRANSPRUNE = {"visual": {"method": "transprune", "keep_ratio": 0.25}}
# cuts on boundaries of the engine, so that the counts can be written down: 144, 72, 36, 36
UNIFORM = {"visual": {"method": "uniform", "prune_layers": [2, 3], "keep_ratios": [0.5, 0.25]}}


def image_url(seed: int) -> str:
    blocks = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((96, 96), Image.Resampling.NEAREST).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def message(text: str = "What is in the picture?", images: int = 1) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": image_url(seed)}} for seed in range(images)
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@dataclass
class Answer:
    text: str
    usage: dict[str, Any]
    header: str | None
    words: dict[str, Any] | None = None

    @property
    def pruning(self) -> dict[str, Any]:
        return self.usage["pruning"]

    @property
    def applied(self) -> dict[str, Any]:
        assert self.words is not None
        return self.words["applied"]

    @property
    def skipped(self) -> dict[str, Any]:
        assert self.words is not None
        return self.words["skipped"]


class Server:
    def __init__(self, base_url: str, pid: int) -> None:
        self.base_url = base_url
        self.pid = pid
        self.client = openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def chat(self, *, stream: bool = False, **fields: Any) -> Answer:
        arguments: dict[str, Any] = {"messages": message(), "max_tokens": 6, "temperature": 0}
        arguments |= fields
        extra = {k: arguments.pop(k) for k in ("pruning", "vllm_xargs") if k in arguments}
        arguments["extra_body"] = {**extra, **arguments.pop("extra_body", {})}
        if stream:
            arguments |= {"stream": True, "stream_options": {"include_usage": True}}
        raw = self.client.chat.completions.with_raw_response.create(model="tiny", **arguments)
        header, parsed = raw.headers.get("x-tokenprune-applied"), raw.parse()
        if not stream:
            text = "|".join(choice.message.content or "" for choice in parsed.choices)
            usage = parsed.usage.model_dump(exclude_none=True)
            return Answer(text, usage, header, parsed.model_extra.get("pruning"))
        chunks = list(parsed)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
        usage = chunks[-1].usage.model_dump(exclude_none=True)
        return Answer(text, usage, header, chunks[-1].model_extra.get("pruning"))

    def metrics_page(self) -> str:
        # far above what a page takes, far below how long the worker is stopped here
        answer = httpx.get(f"{self.base_url}/metrics", timeout=5)
        assert answer.status_code == 200
        return answer.text

    def workers(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.pid).children(recursive=True) if _is_worker(p)]

    def metrics(self) -> dict[str, float]:
        # figures of an answer's last step come with the step after it
        time.sleep(0.3)
        lines = self.metrics_page().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line.startswith("tokenprune_"))
        return {name: float(value) for name, value in samples}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    checkpoint = build_checkpoint(folder / "checkpoint")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tokenprune.cli", "serve", str(checkpoint)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prune-layers", "2,3,5", "--dtype", "float32", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", "256M", "--block-size", "32", "--allow-channel-pruning"]
    command += ["--max-model-len", "1024", "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
    command += ["--max-num-waiting-tokens", str(MAX_WAITING_TOKENS)]
    command += ["--max-num-seqs", "8", "--limit-mm-per-prompt", '{"image": 2}']
    command += ["--trust-request-chat-template"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # other modules keep the engine in their own process, which a server does not
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        started = Server(f"http://127.0.0.1:{port}", process.pid)
        _wait_until_healthy(started, process, log)
        yield started
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _is_worker(process: psutil.Process) -> bool:
    return any(part.startswith("VLLM::Worker") for part in process.cmdline())


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{server.base_url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    tail = "\n".join(log.read_text().splitlines()[-40:])
    pytest.fail(f"the server did not start (exit status {process.poll()}):\n{tail}")


@pytest.fixture(scope="module")
def unpruned(server: Server) -> Answer:
    return server.chat()


def test_a_plain_request_shows_no_trace_of_us(unpruned: Answer) -> None:
    assert unpruned.header is None
    assert "pruning" not in unpruned.usage


@pytest.mark.parametrize(
    ("pruning", "method"),
    [
        pytest.param(UNIFORM, "uniform", id="uniform"),
        pytest.param({"visual": {**UNIFORM["visual"], "method": "random"}}, "random", id="random"),
        pytest.param(
            {"visual": {**UNIFORM["visual"], "method": "transprune"}}, "transprune", id="transprune"
        ),
    ],
)
def test_a_pruned_request_says_what_was_applied(
    server: Server, unpruned: Answer, pruning: dict[str, Any], method: str
) -> None:
    answer = server.chat(pruning=pruning)
    computed = unpruned.usage["prompt_tokens"] + answer.usage["completion_tokens"] - 1
    assert answer.usage["prompt_tokens"] == unpruned.usage["prompt_tokens"]
    assert answer.header == f"visual={method};keep_ratio=0.25;layers=2,3"
    # layers 0-1 hold all, layer 2 lacks 72 and layers 3-7 lack 108 tokens
    missing = 1 * 72 + 5 * 108
    assert answer.words == {
        "applied": {"visual": method, "kv": None, "channels": None},
        "skipped": {},
        "visual_layers": [2, 3],
        "notes": [],
    }
    assert answer.pruning == {
        "visual_tokens": VISUAL_TOKENS,
        "visual_tokens_kept": {"0": 144, "2": 72, "3": 36, "5": 36},
        "kv_tokens_logical": computed,
        "kv_tokens_physical": round(computed - missing / 8),
        # float32 keys and values of two KV heads of size 32
        "kv_bytes_saved": missing * 2 * 2 * 32 * 4,
    }


def test_a_stream_says_the_same_as_a_whole_answer(server: Server) -> None:
    whole, stream = server.chat(pruning=TRANSPRUNE), server.chat(pruning=TRANSPRUNE, stream=True)
    assert stream == whole


def test_a_stream_without_usage_still_has_the_header(server: Server) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": message(), "max_tokens": 3}
    raw = server.client.chat.completions.with_raw_response.create(
        **fields, stream=True, extra_body={"pruning": UNIFORM}
    )
    assert (raw.headers["x-tokenprune-applied"] or "").startswith("visual=uniform")
    assert all(chunk.usage is None for chunk in raw.parse())


@pytest.mark.proves("n", "visual/uniform")
def test_every_choice_counts_its_own_tokens(server: Server) -> None:
    one = server.chat(pruning=UNIFORM, temperature=1, seed=1, extra_body={"ignore_eos": True})
    two = server.chat(pruning=UNIFORM, temperature=1, seed=1, n=2, extra_body={"ignore_eos": True})
    assert two.text.count("|") == 1
    assert two.pruning["visual_tokens"] == one.pruning["visual_tokens"]
    assert two.pruning["kv_tokens_logical"] == 2 * one.pruning["kv_tokens_logical"]
    assert two.pruning["kv_bytes_saved"] == 2 * one.pruning["kv_bytes_saved"]


def test_two_images_are_one_set(server: Server) -> None:
    answer = server.chat(pruning=UNIFORM, messages=message(images=2))
    assert answer.pruning["visual_tokens_kept"] == {"0": 288, "2": 144, "3": 72, "5": 72}


def test_flat_keys_and_the_field_are_one(server: Server) -> None:
    flat = {f"pruning_visual_{key}": value for key, value in UNIFORM["visual"].items()}
    assert server.chat(vllm_xargs=flat) == server.chat(pruning=UNIFORM)


def test_a_preset_is_its_values(server: Server) -> None:
    listing = httpx.get(f"{server.base_url}/v1/pruning/policies").json()
    answers = [
        server.chat(pruning="balanced"),
        server.chat(pruning=listing["presets"]["balanced"]),
        server.chat(vllm_xargs={"pruning": "balanced"}),
    ]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].applied["visual"] == "transprune"


def test_off_is_a_plain_request(server: Server, unpruned: Answer) -> None:
    assert server.chat(pruning="off") == unpruned


def test_the_policies_page_matches_the_engine(server: Server) -> None:
    listing = httpx.get(f"{server.base_url}/v1/pruning/policies").json()
    assert listing["engine"] == {
        "num_layers": 8,
        "prune_layers": [2, 3, 5],
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "max_num_waiting_tokens": MAX_WAITING_TOKENS,
        "max_model_len": 1024,
        "visual_unsupported": None,
        "importance_unsupported": None,
        "kv_unsupported": None,
        "allow_channel_pruning": True,
        "channels_unsupported": None,
        "head_size": 32,
        "block_size": 32,
    }
    assert set(listing["policies"]["channels"]) == {"think"}
    assert set(listing["policies"]["kv"]) == {"lagkv", "streaming", "random"}
    assert set(listing["policies"]["visual"]) >= {"transprune", "random", "uniform"}


def test_text_prompts_are_served_and_the_reason_is_counted(server: Server) -> None:
    name = 'tokenprune_fallback_total{axis="visual",reason="no_visual_tokens"}'
    before = server.metrics().get(name, 0)
    chat = server.chat(pruning=TRANSPRUNE, messages=message(images=0))
    assert chat.header == "none"
    assert chat.skipped == {"visual": "no_visual_tokens"}
    plain = server.client.completions.create(model="tiny", prompt=["a b", "c"], max_tokens=3)
    same = server.client.completions.create(
        model="tiny", prompt=["a b", "c"], max_tokens=3, extra_body={"pruning": TRANSPRUNE}
    )
    assert plain.usage is not None
    assert same.usage is not None
    assert "pruning" not in plain.usage.model_dump()
    block = same.usage.model_dump()["pruning"]
    assert block["kv_tokens_logical"] == same.usage.total_tokens - 2
    assert block["kv_bytes_saved"] == 0
    assert server.metrics()[name] == before + 2


def test_an_image_at_the_very_end_is_served_unpruned(server: Server) -> None:
    template = "{% for m in messages %}<image>{% endfor %}"
    answer = server.chat(pruning=TRANSPRUNE, extra_body={"chat_template": template})
    assert answer.skipped == {"visual": "no_text_after_image"}


LONG = message("word " * 400)
BAD = [
    pytest.param({"pruning": "fast"}, "pruning", "balanced", id="preset"),
    pytest.param({"pruning": 3}, "pruning", "balanced", id="number"),
    pytest.param(
        {"pruning": {"visual": {"method": "magic"}}},
        "pruning.visual.method",
        "transprune",
        id="method",
    ),
    pytest.param(
        {"pruning": {"visual": {"method": "uniform", "ratio": 1}}},
        "pruning.visual.ratio",
        "keep_ratio",
        id="key",
    ),
    pytest.param({"pruning": {"text": {}}}, "pruning.text", "visual", id="axis"),
    *(
        pytest.param(
            {"pruning": {"visual": {"method": "uniform", "keep_ratio": value}}},
            "pruning.visual.keep_ratio",
            "(0, 1]",
            id=f"ratio-{value}",
        )
        for value in (0, -1, 1.5, "0.5", None, [1])
    ),
    pytest.param(
        {"pruning": {"visual": {"method": "uniform", "prune_layers": [4]}}},
        "pruning.visual.prune_layers",
        "[0, 2, 3, 5]",
        id="layer-off-the-boundaries",
    ),
    pytest.param(
        {"pruning": {"visual": {"method": "uniform", "prune_layers": 2}}},
        "pruning.visual.prune_layers",
        "list",
        id="layers-not-a-list",
    ),
    pytest.param(
        {"vllm_xargs": {"pruning_visual_method": "uniform", "pruning_visual_keep_ratio": 7}},
        "pruning_visual_keep_ratio",
        "(0, 1]",
        id="flat-ratio",
    ),
    pytest.param(
        {"pruning": "balanced", "vllm_xargs": {"pruning": "safe"}},
        "pruning",
        "vllm_xargs.pruning",
        id="both-forms",
    ),
    pytest.param(
        {"pruning": TRANSPRUNE, "messages": LONG},
        "pruning.visual.method",
        f"at most {MAX_WAITING_TOKENS} tokens from the first image on",
        id="prompt-longer-than-can-wait",
    ),
    pytest.param(
        {"pruning": UNIFORM, "extra_body": {"use_beam_search": True}},
        "use_beam_search",
        "false",
        id="beam-search",
    ),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fields", "param", "legal"), BAD)
def test_bad_input_is_a_400_that_names_the_key(
    server: Server, fields: dict[str, Any], param: str, legal: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.chat(**fields, stream=stream)
    assert refused.value.param == param
    assert refused.value.type == "BadRequestError"
    assert legal in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_does_not_have_are_refused_too(server: Server, value: float) -> None:
    body = {
        "model": "tiny",
        "messages": message(),
        "pruning": {"visual": {"method": "uniform", "keep_ratio": value}},
    }
    response = httpx.post(
        f"{server.base_url}/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "pruning.visual.keep_ratio"


def test_flat_keys_are_checked_on_every_route(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.responses.create(
            model="tiny",
            input="hello",
            max_output_tokens=3,
            extra_body={"vllm_xargs": {"pruning_visual_method": "magic"}},
        )
    assert refused.value.param == "pruning_visual_method"


def ask(server: Server, door: Door, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "temperature": 0, **door.body([image_url(0)], "What is it?", 6)}
    return httpx.post(f"{server.base_url}{door.path}", json=body | fields, timeout=120)


def whole_answer(response: httpx.Response) -> dict[str, Any]:
    """Return a JSON answer, or the part of a stream that closes its usage."""
    if "event-stream" not in response.headers["content-type"]:
        return response.json()
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if "data: {" in line]
    (last,) = [event for event in map(json.loads, data) if "pruning" in json.dumps(event)]
    return last.get("response", last)


EVERY_DOOR = pytest.mark.parametrize("door", DOORS, ids=[door.path for door in DOORS])
STREAMS = [False, True]


@EVERY_DOOR
@pytest.mark.parametrize("stream", STREAMS, ids=["whole", "stream"])
def test_every_door_prunes_says_so_and_counts(server: Server, door: Door, stream: bool) -> None:
    if stream and not door.streams:
        return
    name = 'tokenprune_requests_total{channels="none",kv="none",outcome="applied",visual="uniform"}'
    seen = 'tokenprune_visual_tokens_total{method="uniform",state="seen"}'
    before = server.metrics()
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = ask(server, door, pruning=UNIFORM, **options)
    assert response.status_code == 200, response.text
    assert response.headers["x-tokenprune-applied"] == "visual=uniform;keep_ratio=0.25;layers=2,3"
    answer = whole_answer(response)
    kept = {"0": 144, "2": 72, "3": 36, "5": 36}
    block = answer["usage"]["pruning"]
    assert answer["pruning"]["applied"] == {"visual": "uniform", "kv": None, "channels": None}
    assert block["visual_tokens"] == door.num_prompts * VISUAL_TOKENS
    assert block["visual_tokens_kept"] == {k: door.num_prompts * n for k, n in kept.items()}
    after = server.metrics()
    assert after[name] == before.get(name, 0) + 1
    assert after[seen] == before.get(seen, 0) + door.num_prompts * VISUAL_TOKENS


@EVERY_DOOR
@pytest.mark.parametrize("stream", STREAMS, ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        pytest.param("fast", "balanced", id="read"),
        pytest.param(
            {"visual": {"method": "uniform", "prune_layers": [4]}}, "[0, 2, 3, 5]", id="planned"
        ),
    ],
)
def test_every_door_refuses(
    server: Server, door: Door, stream: bool, pruning: Any, message: str
) -> None:
    if stream and not door.streams:
        return
    name = 'outcome="refused"'
    before = sum(value for key, value in server.metrics().items() if name in key)
    response = ask(server, door, pruning=pruning, **({"stream": True} if stream else {}))
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert sum(value for key, value in server.metrics().items() if name in key) == before + 1


@EVERY_DOOR
def test_every_door_shows_no_trace_of_us_where_nothing_is_asked(server: Server, door: Door) -> None:
    plain, off = ask(server, door), ask(server, door, pruning="off")
    for response in (plain, off):
        assert response.status_code == 200
        assert "x-tokenprune-applied" not in response.headers
        assert "pruning" not in response.text
    # which of the two finds the prompt in the prefix cache differs
    counts = [{k: v for k, v in r.json()["usage"].items() if type(v) is int} for r in (plain, off)]
    assert counts[0] == counts[1]


def test_flat_keys_can_set_a_bool(server: Server) -> None:
    flat = {
        "pruning_channels_method": "think",
        "pruning_channels_keep_ratio": 0.5,
        "pruning_channels_window": 8,
        "pruning_channels_recent": 8,
        "pruning_channels_pack_generated": False,
    }
    nested = {key.removeprefix("pruning_channels_"): value for key, value in flat.items()}
    answers = [
        server.chat(vllm_xargs=flat, messages=LONG, max_tokens=20),
        server.chat(pruning={"channels": nested}, messages=LONG, max_tokens=20),
    ]
    assert answers[0] == answers[1]
    assert answers[0].applied["channels"] == "think"


def test_a_picture_without_a_question_is_said(server: Server) -> None:
    answer = server.chat(pruning=TRANSPRUNE, messages=message(text=" "))
    assert answer.words is not None
    assert answer.words["notes"] == ["no_question_after_image"]
    assert answer.applied["visual"] == "transprune"


def test_a_prompt_with_log_probs_is_served_whole(server: Server) -> None:
    answer = server.chat(pruning=UNIFORM, extra_body={"prompt_logprobs": 1})
    assert answer.skipped == {"visual": "prompt_logprobs"}


def test_a_chunked_prompt_is_fine_for_methods_that_need_no_scores(server: Server) -> None:
    answer = server.chat(pruning=UNIFORM, messages=LONG)
    assert answer.usage["prompt_tokens"] > MAX_BATCHED_TOKENS
    assert answer.pruning["visual_tokens_kept"] == {"0": 144, "2": 72, "3": 36, "5": 36}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_evicted_tokens_are_reported_and_counted(server: Server, stream: bool) -> None:
    kv = {"method": "lagkv", "sink": 4, "lag": 16, "keep_ratio": 0.25}
    names = {
        state: f'tokenprune_kv_tokens_total{{method="lagkv",state="{state}"}}'
        for state in ("written", "evicted")
    }
    freed = 'tokenprune_kv_blocks_freed_total{method="lagkv"}'
    before = server.metrics()
    answer = server.chat(pruning={"kv": kv}, messages=LONG, max_tokens=40, stream=stream)
    after = server.metrics()
    computed = answer.usage["prompt_tokens"] + answer.usage["completion_tokens"] - 1
    evicted = ((computed - 4) // 16 - 1) * 12
    assert answer.header == "kv=lagkv;keep_ratio=0.25;lag=16"
    assert answer.applied == {"visual": None, "kv": "lagkv", "channels": None}
    assert answer.pruning["kv_tokens_logical"] == computed
    assert answer.pruning["kv_tokens_physical"] == computed - evicted
    # what the prefix cache brought was not written by this request
    written = after[names["written"]] - before.get(names["written"], 0)
    assert written >= answer.usage["completion_tokens"]
    assert after[names["evicted"]] - before.get(names["evicted"], 0) >= evicted
    assert after[freed] > before.get(freed, 0)


def test_packed_channels_are_reported_and_counted_alone_and_with_evicted_tokens(
    server: Server,
) -> None:
    think = {"method": "think", "keep_ratio": 0.5, "window": 8, "recent": 8}
    kv = {"method": "lagkv", "sink": 4, "lag": 16, "keep_ratio": 0.5}
    freed = 'tokenprune_kv_blocks_freed_total{{method="{}"}}'
    before = server.metrics()
    whole = server.chat(messages=LONG, max_tokens=40)
    alone = server.chat(pruning={"channels": think}, messages=LONG, max_tokens=40)
    both = server.chat(pruning={"channels": think, "kv": kv}, messages=LONG, max_tokens=40)
    after = server.metrics()
    computed = alone.usage["prompt_tokens"] + alone.usage["completion_tokens"] - 1
    # of 64 elements 48 are kept, so 42 tokens share a block of 32 slots
    saved = 10 * ((computed - 8) // 42)
    assert alone.header == "channels=think;keys=16;values=32"
    assert alone.applied == {"visual": None, "kv": None, "channels": "think"}
    assert alone.pruning["kv_tokens_physical"] == computed - saved
    # 8 layers, 2 KV heads, keys and values of 32 float32
    assert alone.pruning["kv_bytes_saved"] == saved * 8 * 2 * 64 * 4
    assert both.header == "kv=lagkv;keep_ratio=0.5;lag=16, channels=think;keys=16;values=32"
    assert both.pruning["kv_tokens_physical"] < alone.pruning["kv_tokens_physical"]
    for method in ("think", "lagkv+think"):
        assert after[freed.format(method)] > before.get(freed.format(method), 0)
    # the prompt sees all channels, so the first word is that of the unpruned answer
    assert alone.text[:1] == whole.text[:1]


def test_channels_that_rounding_leaves_alone_are_kept_and_counted(server: Server) -> None:
    name = 'tokenprune_fallback_total{axis="channels",reason="no_gain"}'
    before = server.metrics().get(name, 0)
    think = {"method": "think", "keep_ratio": 0.9}
    answer = server.chat(pruning={"channels": think}, messages=LONG)
    assert answer.skipped == {"channels": "no_gain"}
    assert server.metrics()[name] == before + 1


def test_a_context_too_short_to_evict_from_is_served_whole(server: Server) -> None:
    name = 'tokenprune_fallback_total{axis="kv",reason="context_too_short"}'
    before = server.metrics().get(name, 0)
    answer = server.chat(pruning={"kv": {"method": "lagkv"}})
    assert answer.skipped == {"kv": "context_too_short"}
    assert answer.header == "none"
    assert server.metrics()[name] == before + 1


def test_neighbours_do_not_notice_each_other(server: Server, unpruned: Answer) -> None:
    alone = {name: server.chat(pruning=value) for name, value in KINDS.items()}
    names = [*KINDS] * 3
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: server.chat(pruning=KINDS[name]), names))
    assert together == [alone[name] for name in names]
    # also after all the requests this module has refused so far
    assert server.chat() == alone["off"] == unpruned


KINDS: dict[str, Any] = {"off": "off", "uniform": UNIFORM, "transprune": TRANSPRUNE}


def test_metrics_count_what_happened(server: Server) -> None:
    requests = 'tokenprune_requests_total{{channels="none",kv="none",outcome="{}",visual="{}"}}'
    visual = 'tokenprune_visual_tokens_total{{method="uniform",state="{}"}}'
    flops = 'tokenprune_prefill_flops_total{{state="{}"}}'
    before = server.metrics()
    server.chat()
    server.chat(pruning=UNIFORM)
    server.chat(pruning=TRANSPRUNE)
    with pytest.raises(openai.BadRequestError):
        server.chat(pruning={"visual": {"method": "uniform", "keep_ratio": 2}})
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown(requests.format("off", "none")) == 1
    assert grown(requests.format("applied", "uniform")) == 1
    assert grown(requests.format("applied", "transprune")) == 1
    assert grown(requests.format("refused", "uniform")) == 1
    assert grown(visual.format("seen")) == 144
    assert grown(visual.format("kept")) == 36
    assert 0 < grown(flops.format("spent")) < grown(flops.format("full"))
    assert after['tokenprune_speedup_ratio{basis="estimated"}'] > 1
    timed = [name for name in after if name.startswith("tokenprune_op_seconds_count")]
    assert timed
    assert any(grown(name) > 0 for name in timed)


def test_figures_of_a_last_answer_reach_the_page_although_no_request_follows(
    server: Server,
) -> None:
    kv = {"method": "lagkv", "sink": 4, "lag": 16, "keep_ratio": 0.25}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.chat, pruning={"kv": kv}, messages=LONG, max_tokens=500)
        saved = 0.0
        while not running.done():
            saved = max(saved, server.metrics()["tokenprune_kv_bytes_saved"])
        running.result()
    assert saved > 0, "shown while it runs"
    assert server.metrics()["tokenprune_kv_bytes_saved"] == 0


def test_drawn_bodies_are_answered_or_refused(server: Server) -> None:
    # `python -m bench.load.fuzz` sends ten thousand of them
    outcomes = send_all(server.base_url, draw_bodies(20, 150))
    assert outcomes.wrong == []
    assert sum(outcomes.counts.values()) == 150
    statuses = {name.rpartition(" ")[2] for name in outcomes.counts}
    assert statuses == {"200", "400"}
    assert server.metrics()["tokenprune_kv_bytes_saved"] == 0
    assert all(p.is_running() for p in server.workers())


# the last one of this module: where it fails, the server is gone
def test_a_scrape_neither_waits_for_a_stopped_worker_nor_breaks_the_steps_after_it(
    server: Server, unpruned: Answer
) -> None:
    (worker,) = server.workers()
    with ThreadPoolExecutor(1) as pool:
        worker.suspend()
        try:
            # once while idle, then with a step in flight
            server.metrics_page()
            answer = pool.submit(server.chat)
            deadline = time.monotonic() + STOPPED_SECONDS
            while time.monotonic() < deadline:
                server.metrics_page()
                time.sleep(0.5)
            assert not answer.done()
        finally:
            worker.resume()
        assert answer.result() == unpruned
    assert httpx.get(f"{server.base_url}/health").status_code == 200
    assert server.chat(pruning=UNIFORM).applied["visual"] == "uniform"
    assert server.chat() == unpruned
