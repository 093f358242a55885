"""The tokenizer: one token per task word and per digit, single characters for everything else.

A piece of text is split before each space, so a word's tokens never depend on its neighbours.
`encode` uses that: it caches whole words, which generated data repeats all the time.
"""

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from bench.tasks.words import DIGITS, WORDS

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
PAD, BOS, EOS, IMAGE, UNKNOWN = range(5)
MAX_POSITIONS = 4096

# a line end after each image tells the model which one it is; a part of text begins with one space,
# because every word token includes the space before it
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message['role'] | upper }}:
{%- if message['content'] is string -%}
{{- ' ' + message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- ' ' + part['text'] -}}
{%- elif part['type'] in ('image', 'image_url') -%}
{{- '<image>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- else -%}{{- '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def _pieces() -> list[tuple[str, float]]:
    characters = [chr(code) for code in range(33, 127)]
    spaced_digits = [f"▁{digit}" for digit in DIGITS]
    words = [f"▁{word}" for word in WORDS]
    roles = ["USER:", "ASSISTANT:", "SYSTEM:"]
    # the segmentation with the best sum of scores wins: whole words before their characters
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [(piece, -1.0) for piece in (*roles, *words, *spaced_digits)]
    return pieces + [(piece, -10.0) for piece in ("\n", "▁", *characters)]


def backend() -> Tokenizer:
    """Return the bare tokenizer of the `tokenizers` library."""
    tokenizer = Tokenizer(models.Unigram(_pieces(), unk_id=UNKNOWN, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def build_tokenizer() -> Any:
    """Return the tokenizer as transformers, and vLLM through it, loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend(),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
    )


@functools.cache
def _shared() -> Tokenizer:
    tokenizer = backend()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def vocabulary_size() -> int:
    """Return the number of token ids."""
    return _shared().get_vocab_size()


@functools.lru_cache(maxsize=100_000)
def _word(word: str) -> tuple[int, ...]:
    return tuple(_shared().encode(word, add_special_tokens=False).ids)


def encode(text: str) -> list[int]:
    """Return the token ids of `text`, without `<s>`; the same as the tokenizer's, but faster."""
    head, *words = text.split(" ")
    ids = list(_word(head)) if head else []
    for word in words:
        ids += _word(f" {word}")
    return ids


def decode(ids: list[int]) -> str:
    """Return the text of `ids`, without special tokens."""
    return _shared().decode(ids)
