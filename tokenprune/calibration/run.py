"""`tokenprune calibrate`, from its options to its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenprune import __version__
from tokenprune.calibration.methods import vflowopt_space
from tokenprune.calibration.objective import Objective, Probe
from tokenprune.calibration.plot import draw
from tokenprune.calibration.samples import Sample, digest, draw_samples, open_all
from tokenprune.calibration.search import Trial, best_of, check_installed, search
from tokenprune.calibration.space import SearchSpace
from tokenprune.errors import ConfigurationError
from tokenprune.presets import dump_presets
from tokenprune.request import parse_pruning
from tokenprune.shape import EngineShape


class EngineProbe(Probe, Protocol):
    """A probe that also tells about its engine."""

    engine: EngineShape

    @property
    def model(self) -> Mapping[str, Any]:
        """What names the model and how it is run, as plain data."""

    @property
    def patch_grid(self) -> int:
        """Side of the vision tower's grid of patches."""


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        images: Folder of pictures.
        prompts: File of prompts.
        keep_ratio: Share of the visual tokens held, mean over layers, in (0, 1).
        output: The file of presets to write, ending in .yaml; trials and picture lie beside it.
        num_samples: Prompts to draw.
        num_trials: Trials in all, the start included.
        seed: Seed of the draw and of the search.
    """

    images: Path
    prompts: Path
    keep_ratio: float
    output: Path
    num_samples: int
    num_trials: int
    seed: int

    @property
    def trials(self) -> Path:
        """File of the trials."""
        return self.output.with_suffix(".trials")

    @property
    def picture(self) -> Path:
        """File of the picture."""
        return self.output.with_suffix(".png")


@dataclass(frozen=True)
class Calibration:
    """What came out.

    Attributes:
        name: Name of the preset.
        pruning: Its value.
        start: The trial of the method's default.
        best: The best trial.
        kept_share: Share of the visual tokens the best one holds, mean over samples and layers.
    """

    name: str
    pruning: Mapping[str, Any]
    start: Trial
    best: Trial
    kept_share: float


def calibrate(
    options: Options,
    open_probe: Callable[[list[tuple[list[Any], str]]], EngineProbe],
    console: Console,
    make_space: Callable[[EngineShape, int, float], SearchSpace] = vflowopt_space,
) -> Calibration:
    """Search the best parameters for one model, and write them as a preset.

    Args:
        options: What to search with.
        open_probe: Starts the engine for the samples' pictures and texts.
        console: Where progress is shown.
        make_space: The space of the method, from engine, patch grid and budget.

    Raises:
        ConfigurationError: A file or folder is not as it must be, or the model cannot be pruned.
        InstallationError: The extra is not installed.
    """
    check_installed()
    if options.output.suffix not in (".yaml", ".yml"):
        raise ConfigurationError(f"the file of -o must end in .yaml, got {options.output}")
    if not options.output.absolute().parent.is_dir():
        raise ConfigurationError(
            f"the folder of -o must exist, got {options.output.absolute().parent}"
        )
    samples = draw_samples(options.images, options.prompts, options.num_samples, options.seed)
    opened = open_all(samples)
    _say(console, f"{len(samples)} samples{_shortage(options, samples)}. Starting the engine ...")
    probe = open_probe(opened)
    space = make_space(probe.engine, probe.patch_grid, options.keep_ratio)
    with _progress(console) as progress:
        task = progress.add_task("without pruning", total=options.num_trials)
        names = [f"{s.text!r} with {', '.join(map(str, s.pictures))}" for s in samples]
        objective = Objective(probe, probe.engine.stage_sizes(), names)
        scores: list[float] = []

        def show(trial: Trial) -> None:
            scores.append(trial.score)
            progress.update(task, advance=1, description=f"cosine {max(scores):.4f}")

        trials = search(
            space,
            lambda point: objective.score(parse_pruning(space.pruning(point))),
            storage=options.trials,
            identity={"model": probe.model, "samples": digest(samples)},
            num_trials=options.num_trials,
            seed=options.seed,
            on_trial=show,
        )
    best = best_of(trials)
    pruning = space.pruning(best.point)
    objective.score(parse_pruning(pruning))
    found = Calibration(
        f"{space.method}-{options.keep_ratio:g}", pruning, trials[0], best, objective.kept_share
    )
    options.output.write_text(
        dump_presets({found.name: pruning}, _comment(options, probe, samples, found)),
        encoding="utf-8",
    )
    draw(space, trials, options.picture)
    _report(options, found, console)
    return found


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _shortage(options: Options, samples: list[Sample]) -> str:
    if len(samples) == options.num_samples:
        return ""
    return f" ({options.num_samples} were asked for, and the files make no more)"


def _comment(
    options: Options, probe: EngineProbe, samples: list[Sample], found: Calibration
) -> str:
    layers = ",".join(map(str, probe.engine.prune_layers))
    # where a folder lies is nobody's business
    model = (
        Path(probe.model["model"]).name
        if Path(probe.model["model"]).is_dir()
        else (probe.model["model"])
    )
    return f"""\
tokenprune {__version__} calibrate: {model}, keep ratio {options.keep_ratio:g}
mean cosine of {len(samples)} samples: {found.best.score:.4f} (trial {found.best.number} of \
{options.num_trials}), default parameters {found.start.score:.4f}; seed {options.seed}
visual tokens held, mean over layers and samples: {found.kept_share:.4f}

tokenprune serve MODEL --prune-layers {layers} --pruning-presets {options.output.name}
and in a request: "pruning": "{found.name}", or the object below as it stands"""


def _report(options: Options, found: Calibration, console: Console) -> None:
    start, best = found.start, found.best
    _say(
        console,
        f"Mean cosine of the last hidden state, pruned against full: {start.score:.4f} with the "
        f"default parameters, {best.score:.4f} with those of trial {best.number}"
        f"{'; no trial is better than the default' if best.number == 0 else ''}. "
        f"Visual tokens held: {found.kept_share:.4f} of all, mean over layers and samples.",
    )
    _say(
        console,
        f"Preset {found.name} is in {options.output}, the search in {options.picture} and "
        f"{options.trials}. Serve with --pruning-presets {options.output}.",
    )


def _say(console: Console, text: str) -> None:
    # a path may look like markup
    console.print(text, markup=False, highlight=False, soft_wrap=True)
