"""The `tokenprune` command. Nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokenprune import __version__
from tokenprune.errors import TokenPruneError
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
    pass


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


def _builtin_model() -> DefaultModel:
    from tokenprune.demo import builtin
    from tokenprune.engine.default_model import DefaultModel

    folder = builtin.model_folder()
    typer.echo(
        f"No model named: serving the built-in {builtin.NAME}; its card is {folder / builtin.CARD}"
    )
    return DefaultModel(folder, builtin.serve_flags())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[MODEL] [OPTIONS]",
    epilog="All other arguments go to vLLM as they are; see: vllm serve --help",
)
def serve(
    context: typer.Context,
    prune_layers: Annotated[
        str | None,
        typer.Option(
            "--prune-layers",
            "--prune_layers",
            metavar="LAYERS",
            help="Layers before which requests may drop visual tokens, e.g. 8,12,20; none "
            "serves KV methods only. Default: three layers chosen from the model's depth.",
        ),
    ] = None,
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
    allow_channel_pruning: Annotated[
        bool,
        typer.Option(
            "--allow-channel-pruning",
            "--allow_channel_pruning",
            help="Let requests prune KV channels.",
        ),
    ] = False,
) -> None:
    """Serve MODEL over the OpenAI API, as vllm serve does, with per-request pruning.

    Without MODEL, serve the built-in one: very small, trained on generated pictures and texts.
    """
    layers, preset = _parse_layers(prune_layers), _check_preset(pruning_default)

    from tokenprune.engine.launch import serve as run

    run(context.args, layers, preset, _builtin_model, allow_channel_pruning)


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
        app()
    except TokenPruneError as error:
        Console(stderr=True).print(f"[red]Error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
