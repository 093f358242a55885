"""What is shown of a capacity record."""

from textwrap import fill

from bench.common import table

# tokens of a block, and what the KV methods are told
BLOCK, SINK, LAG = 32, 4, 64


def markdown(record):
    """Return what `docs/capacity.md` shows of a record: what one pool carries, and how fast."""
    loads = [str(c) for c in record["loads"]]
    most, rows, machine = loads[-1], record["rows"], record["runs"][-1]["machine"]
    stock, alone = rows["stock"][most]["peak"], rows["stock"]["1"]["blocks_alone"]
    text = fill(
        f"One pool of {record['pool_blocks']} blocks of {BLOCK} tokens "
        f"({record['pool_prompts']} prompts of {record['prompt']}), {record['new']} new tokens "
        f"each, sink {SINK}, lag {LAG}, think with half the key channels. *blocks*: held by one "
        f"request after its prompt. *peak*: most requests running at once with {most} in flight. "
        f"*blocks/formula*: blocks held over those that the counts promise, between steps. "
        f"Commit {', '.join(dict.fromkeys(run['git_sha'][:7] for run in record['runs']))}, "
        f"{machine['cores']} cores of an {machine['cpu']}; stock is `vllm serve` as it is there.",
        79,
    )
    held = [
        [
            mode,
            f"{row['1']['blocks_alone']}",
            f"{row['1']['blocks_alone'] / alone - 1:+.0%}",
            *(
                [
                    f"{full['peak']}",
                    f"{full['peak'] / stock:.1f}x",
                    f"{full['preemptions']}",
                    f"{full['blocks_over_formula']:.3f}",
                ]
                if (full := row.get(most))
                else [""] * 4
            ),
        ]
        for mode, row in rows.items()
    ]
    speed = [
        [
            mode,
            *(f"{row[c]['tokens_per_second']:.1f}" if c in row else "" for c in loads),
        ]
        for mode, row in rows.items()
    ]
    heads = ["engine", "blocks", "to stock", "peak", "to stock", "preempted", "blocks/formula"]
    return "\n\n".join(
        [
            text,
            table([heads, *held]),
            "Tokens a second by the number of requests in flight:",
            table([["engine", *loads], *speed]),
        ]
    )
