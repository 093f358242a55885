"""What `bench.serving` makes of its bursts: cells, the table and the verdicts. No server here."""

import math
from statistics import mean, median, stdev

from rich import box
from rich.table import Table

from bench.common import quantiles

# throughput, as the share of what is compared with; see ratios()
TARGETS = {"off": 0.99, "pruned": 0.98}


def summary(concurrency, variant, bursts, is_wrong):
    answers = [answer for burst in bursts for answer in burst.answers]
    return {
        "concurrency": concurrency,
        "variant": variant,
        "right": not is_wrong,
        "prompt_tokens": median(a.prompt_tokens for a in answers),
        "requests_per_second": median(b.requests_per_second for b in bursts),
        "tokens_per_second": median(b.tokens_per_second for b in bursts),
        "ttft_ms": quantiles(a.ttft_ms for a in answers),
        "token_ms": quantiles(mean(a.gaps_ms) for a in answers),
        "stall_ms": quantiles(max(a.gaps_ms) for a in answers),
        "rounds": [
            {
                "seconds": burst.seconds,
                "ttft_ms": [a.ttft_ms for a in burst.answers],
                "gaps_ms": [a.gaps_ms for a in burst.answers],
            }
            for burst in bursts
        ],
    }


def ratios(concurrency, variant, cells):
    """Return the throughput over that of the variant it is compared with, round by round."""
    reference = "stock" if variant == "off" else "off"
    if variant == "stock" or (concurrency, reference) not in cells:
        return {}
    pairs = zip(cells[concurrency, variant], cells[concurrency, reference], strict=True)
    rounds = [a.requests_per_second / b.requests_per_second for a, b in pairs]
    return {"reference": reference, "ratio": median(rounds), "ratio_rounds": rounds}


def cells_table(cells):
    """Return the table of all cells, at most 80 columns wide; wrong cells show no figure.

    Time per token and the longest gap within an answer are medians over the requests.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in ("\nload", "\nvariant"):
        table.add_column(name, no_wrap=True)
    heads = ("\nreq/s", "over\nbase", "\ntok/s", *("TTFT\np10", "ms\np50", "\np90"))
    for name in (*heads, "ms a\ntoken", "stall\nms", "KV\nMiB", "pre-\nempt"):
        table.add_column(name, justify="right")
    last = None
    for cell in cells:
        c = cell["concurrency"]
        if last not in (None, c):
            table.add_section()
        table.add_row(str(c) if c != last else "", cell["variant"], *_figures(cell))
        last = c
    return table


def _figures(cell):
    if not cell["right"]:
        return ["WRONG"]
    return [
        f"{cell['requests_per_second']:.2f}",
        f"{cell['ratio']:.2f}x" if "ratio" in cell else "",
        f"{cell['tokens_per_second']:.0f}",
        *(f"{x:.0f}" for x in cell["ttft_ms"]),
        f"{cell['token_ms'][1]:.1f}",
        f"{cell['stall_ms'][1]:.0f}",
        f"{cell['kv_mib_peak']:.1f}" if cell["kv_mib_peak"] else "-",
        str(cell["preemptions"]),
    ]


def mean_ratio(ratios):
    """Return the geometric mean, and two standard errors of it where there are enough values."""
    logs = [math.log(ratio) for ratio in ratios]
    text = f"{math.exp(mean(logs)):.2f}x"
    if len(logs) < 3:
        return text
    return f"{text} +-{2 * math.exp(mean(logs)) * stdev(logs) / len(logs) ** 0.5:.2f}"


def verdicts(cells):
    """Return one line per variant that has a target, computed from the figures."""
    lines = []
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        mine = [c for c in cells if c["variant"] == variant and "ratio" in c]
        if not mine:
            continue
        if not all(c["right"] for c in mine):
            lines.append(f"{variant}: WRONG answers, so no figures")
            continue
        target = TARGETS.get(variant, TARGETS["pruned"])
        worst = min(mine, key=lambda c: c["ratio"])
        low, high = (f(c["ratio"] for c in mine) for f in (min, max))
        rounds = [r for c in mine for r in c["ratio_rounds"]]
        text = (
            f"{variant} over {worst['reference']}: {mean_ratio(rounds)} over {len(rounds)} rounds, "
            f"loads {low:.2f}x to {high:.2f}x"
        )
        below = ", ".join(str(c["concurrency"]) for c in mine if c["ratio"] < target)
        lines.append(text + (f"; below {target} at {below}" if below else f"; all >= {target}"))
    return lines
