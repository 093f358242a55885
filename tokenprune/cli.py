"""The `tokenprune` command. Nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tokenprune import __version__
from tokenprune.errors import ConfigurationError, TokenPruneError
from tokenprune.installation import check_distributions
from tokenprune.policies import check_plugins
from tokenprune.presets import load_presets
from tokenprune.request import PRESETS

if TYPE_CHECKING:
    from tokenprune.engine.default_model import DefaultModel

app = typer.Typer(
    help="Per-request pruning of visual tokens and KV cache inside unmodified vLLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


PruneLayers = Annotated[
    str | None,
    typer.Option(
        "--prune-layers",
        "--prune_layers",
        metavar="LAYERS",
        help="Layers before which requests may drop visual tokens, e.g. 8,12,20; none serves KV "
        "methods only. Default: three layers chosen from the model's depth. serve and calibrate "
        "must be given the same.",
    ),
]

MaxNumWaitingTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-waiting-tokens",
        "--max_num_waiting_tokens",
        min=0,
        help="Tokens of pruned prompts that can wait until their prompt is complete, which is the "
        "longest prompt that transprune takes; memory for them is set aside at start. Default: "
        "the longest context, at most 32768.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tokenprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    check_plugins()


def _parse_layers(value: str | None) -> list[int] | None:
    if value is None:
        return None
    if value.strip() in ("", "none"):
        return []
    try:
        layers = [int(part) for part in value.split(",")]
    except ValueError:
        layers = []
    if not layers or layers[0] < 1 or layers != sorted(set(layers)):
        raise typer.BadParameter(
            f"must be ascending layer numbers like 8,12,20, or none, got {value!r}",
            param_hint="--prune-layers",
        )
    return layers


def _check_preset(value: str | None) -> str | None:
    if value is not None and value not in PRESETS:
        raise typer.BadParameter(
            f"must be one of {', '.join(PRESETS)}, got {value!r}", param_hint="--pruning-default"
        )
    return value


def _read_presets(path: Path | None) -> dict[str, Any]:
    try:
        return {} if path is None else load_presets(path)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error), param_hint="--pruning-presets") from None


def _show_vllm_help(wanted: bool) -> None:
    if wanted:
        from tokenprune.engine.launch import show_vllm_help

        show_vllm_help()
        raise typer.Exit


def _builtin_model() -> DefaultModel:
    from tokenprune.demo import builtin
    from tokenprune.engine.default_model import DefaultModel

    folder = builtin.model_folder()
    typer.echo(
        f"No model named: taking the built-in {builtin.NAME}; its card is {folder / builtin.CARD}"
    )
    return DefaultModel(folder, builtin.serve_flags())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[MODEL] [OPTIONS]",
    epilog="All other arguments go to vLLM as they are; see: tokenprune serve --vllm-help",
)
def serve(
    context: typer.Context,
    prune_layers: PruneLayers = None,
    pruning_default: Annotated[
        str | None,
        typer.Option(
            "--pruning-default",
            "--pruning_default",
            metavar="PRESET",
            help=f"Preset for requests that say nothing about pruning: {', '.join(PRESETS)}. "
            "Default: off.",
        ),
    ] = None,
    pruning_presets: Annotated[
        Path | None,
        typer.Option(
            "--pruning-presets",
            "--pruning_presets",
            metavar="FILE",
            help="YAML or JSON file of presets by name, e.g. one that tokenprune calibrate wrote; "
            "requests and --pruning-default may name them.",
        ),
    ] = None,
    allow_channel_pruning: Annotated[
        bool,
        typer.Option(
            "--allow-channel-pruning",
            "--allow_channel_pruning",
            help="Let requests prune KV channels.",
        ),
    ] = False,
    require_pruning: Annotated[
        bool,
        typer.Option(
            "--require-pruning",
            "--require_pruning",
            help="Refuse to start where the model or the flags leave nothing to prune, instead "
            "of serving as vllm serve does.",
        ),
    ] = False,
    max_num_waiting_tokens: MaxNumWaitingTokens = None,
    vllm_help: Annotated[
        bool,
        typer.Option(
            "--vllm-help",
            callback=_show_vllm_help,
            is_eager=True,
            help="Show the arguments that go to vLLM and exit.",
        ),
    ] = False,
) -> None:
    """Serve MODEL over the OpenAI API, as vllm serve does, with per-request pruning.

    Without MODEL, serve the built-in one: very small, trained on generated pictures and texts.
    """
    layers = _parse_layers(prune_layers)
    presets = _read_presets(pruning_presets)
    preset = _check_preset(pruning_default)

    from tokenprune.engine.launch import EngineOptions
    from tokenprune.engine.launch import serve as run

    options = EngineOptions(
        layers, preset, presets, allow_channel_pruning, require_pruning, max_num_waiting_tokens
    )
    run(context.args, options, _builtin_model)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[MODEL] [OPTIONS]",
    epilog="All other arguments go to vLLM as they are; see: tokenprune serve --vllm-help",
)
def calibrate(
    context: typer.Context,
    images: Annotated[
        Path,
        typer.Option("--images", metavar="DIR", help="Folder of pictures.", show_default=False),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="A prompt a line, asked about the pictures in turn; or, if it ends in .jsonl, "
            'lines like {"image": "a.png", "prompt": "..."}.',
            show_default=False,
        ),
    ],
    keep_ratio: Annotated[
        float,
        typer.Option(
            "--keep-ratio",
            metavar="RATIO",
            help="Share of the visual tokens to hold, mean over layers, in (0, 1).",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="YAML file of presets to write; the trials and a picture of them lie beside it.",
            show_default=False,
        ),
    ],
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Prompts to draw at random.")
    ] = 30,
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Points to try, the default included.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw and the search.")] = 0,
    prune_layers: PruneLayers = None,
) -> None:
    """Find vflowopt's parameters for MODEL: the hidden states of pruned prompts stay the closest.

    Needs no labels. Without MODEL, calibrate the built-in one.

    Started again with the same arguments, an interrupted search goes on.
    """
    layers = _parse_layers(prune_layers)
    if not 0 < keep_ratio < 1:
        raise typer.BadParameter(
            f"must be in (0, 1), got {keep_ratio:g}", param_hint="--keep-ratio"
        )

    from tokenprune.calibration.run import EngineProbe, Options
    from tokenprune.calibration.run import calibrate as run

    def open_probe(asked: list[tuple[list[Any], str]]) -> EngineProbe:
        from tokenprune.engine.launch import EngineOptions, start_offline

        llm = start_offline(context.args, EngineOptions(layers), _builtin_model)
        from tokenprune.engine.offline_probe import LastHiddenProbe

        return LastHiddenProbe(llm, asked)

    options = Options(images, prompts, keep_ratio, output, samples, trials, seed)
    run(options, open_probe, Console())


# the demo reads its own options, `--help` too
@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
def demo(context: typer.Context) -> None:
    """Ask the built-in model with and without pruning, then time a larger model."""
    from tokenprune.demo.run import run_demo

    run_demo(context.args)


def main() -> None:
    """Run the command line; an error of ours is one line and exit status 2."""
    try:
        check_distributions()
        app()
    except TokenPruneError as error:
        text = f"[red]Error:[/red] {escape(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
