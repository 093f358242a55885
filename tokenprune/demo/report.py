"""What the demo says: medians, the table, the metrics that changed, the verdict. No server here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.table import Table

# (name, sorted labels) -> value
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
# name, labels, old value (None where there was none), new value
Change = tuple[str, dict[str, str], float | None, float]

WIDTH = 80
_PREFIX = "tokenprune_"


@dataclass
class Row:
    """One method's figures.

    Attributes:
        method: Name in the table; the first row of a report is the unpruned one.
        kv_blocks: Blocks of vLLM's pool held while the answer was generated.
        usage: `usage` of the answer, as the server sent it.
        ttft_seconds: Time to first token of each timed request.
    """

    method: str
    kv_blocks: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    ttft_seconds: list[float] = field(default_factory=list)

    @property
    def ttft_median(self) -> float:
        """Median time to first token in seconds."""
        return statistics.median(self.ttft_seconds)

    @property
    def kept(self) -> list[int] | None:
        """Visual tokens kept per stage, or None for an unpruned answer."""
        kept = (self.usage.get("pruning") or {}).get("visual_tokens_kept")
        return None if kept is None else list(kept.values())


@dataclass
class SpeedRow(Row):
    """One method's figures with the speed of decoding.

    Attributes:
        tokens_per_second: Rate after the first token, of each timed request.
    """

    tokens_per_second: list[float] = field(default_factory=list)

    @property
    def rate_median(self) -> float:
        """Median rate of decoding in tokens per second."""
        return statistics.median(self.tokens_per_second)


def parse_samples(text: str) -> Samples:
    """Parse Prometheus's text format."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def kv_pool(samples: Samples) -> tuple[int, int]:
    """Return vLLM's own account of its pool: blocks in use, and blocks there are.

    vLLM publishes the share in use; the null block, which no request can have, counts neither way.
    """
    usage, total = None, None
    for (name, labels), value in samples.items():
        if name == "vllm:kv_cache_usage_perc":
            usage = value
        elif name == "vllm:cache_config_info":
            total = int(dict(labels)["num_gpu_blocks"]) - 1
    if usage is None or total is None:
        raise ValueError("vLLM's metrics page must name its KV cache usage and blocks, it does not")
    return round(usage * total), total


def changed(before: Samples, after: Samples) -> list[Change]:
    """Return our samples that differ, by name and labels.

    Histogram buckets are left out, since sum and count tell enough, and so are the labels that
    say `none`.
    """
    return [
        (name, {k: v for k, v in labels if v != "none"}, before.get((name, labels)), value)
        for (name, labels), value in sorted(after.items())
        if name.startswith(_PREFIX)
        and not name.endswith(("_bucket", "_created"))
        and before.get((name, labels)) != value
    ]


def results_table(rows: Sequence[SpeedRow]) -> Table:
    """Return the table of methods, at most 80 columns wide."""
    full = rows[0]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    table.add_column("prompt\ntokens", justify="right")
    table.add_column("visual tokens\nkept per stage")
    table.add_column("KV blocks\nheld", justify="right")
    table.add_column("TTFT\nms", justify="right")
    table.add_column("TTFT\nvs off", justify="right")
    table.add_column("tokens/s\ndecode", justify="right")
    for row in rows:
        table.add_row(
            row.method,
            str(row.usage["prompt_tokens"]),
            kept_text(row.kept or all_kept(rows)),
            str(row.kv_blocks),
            f"{row.ttft_median * 1000:.0f}",
            f"{row.ttft_median / full.ttft_median:.2f}x",
            f"{row.rate_median:.1f}",
        )
    return table


def medians(row: SpeedRow) -> dict[str, float]:
    """Return what the table shows of a row's raw times."""
    return {
        "ttft_median_seconds": row.ttft_median,
        "tokens_per_second_median": row.rate_median,
    }


def kept_text(kept: Iterable[int]) -> str:
    """Return counts per stage as `2304>1440>288`."""
    return ">".join(map(str, kept))


def all_kept(rows: Sequence[Row]) -> list[int]:
    """Return what an unpruned prompt keeps; only pruned answers count visual tokens."""
    counts = {row.usage["pruning"]["visual_tokens"] for row in rows if row.kept is not None}
    return sorted(counts)


def metrics_table(changes: Iterable[Change]) -> Table:
    """Return the changed lines of the metrics page, at most 80 columns wide."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, labels, old, new in changes:
        text = " ".join(f"{key}={value}" for key, value in labels.items())
        table.add_row(name, text, compact(old or 0.0), f"→ {compact(new)}")
    return table


def compact(value: float) -> str:
    """Return a number in at most six characters, e.g. `1.52T`."""
    if value and abs(value) < 1:
        return f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.0e}"
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def flops_share(changes: Iterable[Change]) -> float | None:
    """Return prefill FLOPs spent over those of a full prefill, by the server's formula."""
    flops = {
        labels["state"]: new - (old or 0.0)
        for name, labels, old, new in changes
        if name == f"{_PREFIX}prefill_flops_total"
    }
    return flops["spent"] / flops["full"] if flops.keys() >= {"spent", "full"} else None


def verdict(rows: Sequence[Row], flops: float | None) -> tuple[str, bool]:
    """Return a sentence computed from the figures, and whether every method held fewer blocks.

    Args:
        rows: The table's rows; the first is unpruned, and the last is spoken of.
        flops: See `flops_share`.
    """
    if complaint := blocks_not_saved(rows):
        return complaint, False
    full, last = rows[0], rows[-1]
    ttft = f"TTFT {last.ttft_median / full.ttft_median:.2f}x"
    if flops is not None:
        ttft += f" (prefill FLOPs by formula: {flops:.2f}x)"
    return f"{last.method}: {full.kv_blocks / last.kv_blocks:.1f}x fewer KV blocks, {ttft}", True


def blocks_not_saved(rows: Sequence[Row]) -> str | None:
    """Return a complaint where a pruned row held no fewer blocks than the first, or none at all."""
    full, *pruned = rows
    if all(0 < row.kv_blocks < full.kv_blocks for row in pruned):
        return None
    text = ", ".join(f"{row.method} {row.kv_blocks}" for row in rows)
    return f"pruned requests must hold fewer KV blocks than unpruned ones, got {text}"
