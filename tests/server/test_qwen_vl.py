"""`tokenprune serve` on Qwen-VL models: pruned chat answers equal a transformers loop."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.other_checkpoints import IMAGE, build
from tests.oracle.asks import Answer, Ask, image, vflowopt, visual
from tests.oracle.loop import Oracle
from tests.oracle.request import assert_like_oracle
from tokenprune.demo.checkpoint import build_checkpoint
from tokenprune.demo.local_server import LocalServer
from tokenprune.shape import EngineShape

pytestmark = pytest.mark.vllm

NAMES = ("qwen2_5_vl", "qwen3_vl")
SHAPE = EngineShape(4, (0, 1, 2), 1024)
QUESTION = "What is in the picture?"
TEMPLATE = (
    "{{ bos_token }}USER: {% for part in messages[0].content %}{% if part.type == 'image' %}"
    + IMAGE
    + "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '\\n' }}ASSISTANT:"
)
PRUNINGS: list[dict[str, Any] | None] = [
    None,
    visual("uniform", 0.3),
    visual("transprune", 0.3),
    vflowopt(0.3, threshold=1.3),
]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer_of = Path(build_checkpoint(folder / "llava"))
    return build(request.param, tokenizer_of, folder / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LocalServer]:
    template = model.parent / "chat.jinja"
    template.write_text(TEMPLATE)
    arguments = ["--served-model-name", "tiny", "--chat-template", str(template)]
    arguments += ["--chat-template-content-format", "openai"]
    arguments += ["--prune-layers", "1,2", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--kv-cache-memory-bytes", "64M", "--block-size", "32"]
    arguments += ["--max-model-len", "1024", "--max-num-batched-tokens", "1024"]
    arguments += ["--limit-mm-per-prompt", '{"image": 2, "video": 0}']
    with pytest.MonkeyPatch.context() as patch:
        # other modules keep the engine in their own process, which a server does not
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        with LocalServer(model, arguments, model.parent / "server.log") as started:
            started.wait_until_ready()
            yield started


def url_of(seed: int) -> str:
    file = io.BytesIO()
    image(seed).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def field_of(flat: dict[str, Any]) -> dict[str, Any]:
    return {"visual": {key.removeprefix("pruning_visual_"): value for key, value in flat.items()}}


def test_pruned_chat_answers_equal_a_transformers_loop(server: LocalServer, model: Path) -> None:
    loop, client = Oracle(model), server.client(120)
    for pruning in PRUNINGS:
        body = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        raw = client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url_of(3)}},
                        {"type": "text", "text": QUESTION},
                    ],
                }
            ],
            max_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=5,
            extra_body=body | ({"pruning": field_of(pruning)} if pruning else {}),
        )
        parsed = raw.parse()
        (choice,) = parsed.choices
        steps = choice.logprobs.content
        answer = Answer(
            [int(step.token.removeprefix("token_id:")) for step in steps],
            [
                {int(t.token.removeprefix("token_id:")): t.logprob for t in s.top_logprobs}
                for s in steps
            ],
        )
        ask = Ask(f"USER: {IMAGE}{QUESTION}\nASSISTANT:", (3,), pruning)
        ids = loop.inputs(ask.prompt, [image(3)])["input_ids"][0].tolist()
        assert parsed.model_dump()["prompt_token_ids"] == ids
        kept = assert_like_oracle(loop, ask, answer, shape=SHAPE).trace.kept
        assert len(answer.tokens) == 8
        said = parsed.model_dump().get("pruning")
        assert bool(kept) == (said is not None) == (pruning is not None)
        if pruning is not None:
            assert said["applied"]["visual"] == pruning["pruning_visual_method"]
            assert raw.headers["x-tokenprune-applied"].startswith("visual=")
            figures = parsed.usage.model_dump()["pruning"]["visual_tokens_kept"]
            assert list(figures.values())[-1] == len(kept[max(kept)])
