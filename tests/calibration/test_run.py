"""The whole of a calibration but the engine: files in, a preset out, and what is refused."""

import io
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tokenprune.calibration.methods import vflowopt_space
from tokenprune.calibration.objective import Objective, cosine
from tokenprune.calibration.run import Options, calibrate
from tokenprune.cli import app
from tokenprune.errors import ConfigurationError
from tokenprune.policies.visual.vflowopt import VFlowOpt
from tokenprune.presets import load_presets
from tokenprune.request import PRESETS, parse_pruning
from tokenprune.shape import EngineShape

ENGINE = EngineShape(8, (0, 2, 3, 5), 4096)
GRID = 12


@dataclass
class Answer:
    hidden: np.ndarray
    num_visual: int
    kept: tuple[int, ...] | None


class FakeProbe:
    """Turns hidden states further, the further parameters are from a best point."""

    engine = ENGINE
    patch_grid = GRID
    model = {"model": "fake"}  # noqa: RUF012 - read only

    def __init__(self, samples, kept=True):
        self.samples = samples
        self.kept = kept
        self.asked = []

    def ask(self, pruning):
        policy = pruning.policy("visual")
        self.asked.append(policy)
        if policy is None:
            return [Answer(np.array([1.0, 0.0], np.float32), 100, None) for _ in self.samples]
        shares = np.cumprod(policy.stages)
        angle = abs(policy.alpha - 0.3) + abs(policy.threshold - 4) / 30 + abs(shares[0] - 0.4)
        kept = tuple(int(100 * shares[i]) for i in (0, 0, 1, 2))
        return [
            Answer(
                np.array([np.cos(angle), np.sin(angle)], np.float32),
                100,
                kept if self.kept else None,
            )
            for _ in self.samples
        ]


@pytest.fixture(autouse=True)
def _forget_presets():
    before = dict(PRESETS)
    yield
    PRESETS.clear()
    PRESETS.update(before)


@pytest.fixture
def options(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(images / f"{i}.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one?\ntwo?\n")
    return Options(images, prompts, 0.25, tmp_path / "policy.yaml", 4, 8, 0)


def run(options, **probe):
    opened = []

    def open_probe(samples):
        opened.append(FakeProbe(samples, **probe))
        return opened[0]

    text = io.StringIO()
    found = calibrate(options, open_probe, Console(file=text, width=400))
    return found, opened[0], text.getvalue()


def test_it_writes_a_preset_that_servers_and_requests_take(options):
    found, _, text = run(options)
    assert found.best.score > found.start.score
    assert load_presets(options.output) == {"vflowopt-0.25": found.pruning}
    by_name, by_value = parse_pruning("vflowopt-0.25"), parse_pruning(found.pruning)
    assert by_name == by_value
    cuts = by_value.policy("visual").cuts(ENGINE)
    # the budget is met exactly, on this engine's layers and no other's
    assert [layer for layer, _ in cuts] == [0, 3, 5]
    assert (3 * cuts[0][1] + 2 * cuts[1][1] + 3 * cuts[2][1]) / 8 == pytest.approx(0.25, rel=1e-12)
    comment = options.output.read_text().partition("vflowopt-0.25:")[0]
    for part in ("fake", f"{found.best.score:.4f}", f"{found.start.score:.4f}", "2,3,5", "seed 0"):
        assert part in comment
    assert f"{found.best.score:.4f} with those of trial {found.best.number}" in text
    assert "4 samples" in text


def test_it_draws_the_search(options):
    run(options)
    with Image.open(options.output.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 1000
        # something is drawn in each of the three colours
        found = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x99, 0x99, 0x99)} <= found


def test_the_search_starts_at_the_default_of_the_method(options):
    found, probe, _ = run(options)
    first = probe.asked[1]
    default = VFlowOpt(keep_ratio=0.25)
    assert first.threshold == default.threshold
    assert first.alpha == default.alpha
    assert first.cell == GRID / 2
    for (layer, share), (other, wanted) in zip(
        first.cuts(ENGINE), default.cuts(ENGINE), strict=True
    ):
        assert layer == other
        assert share == pytest.approx(wanted, rel=1e-9)
    assert found.start.number == 0


def test_a_second_run_gives_the_same_file_without_searching(options):
    run(options)
    before = options.output.read_text()
    options.output.unlink()
    _, probe, _ = run(options)
    assert options.output.read_text() == before
    # the prompts whole, the start as a check, and the best for its counts
    assert len(probe.asked) == 3


def test_other_prompts_search_anew_in_the_same_file(options):
    run(options)
    options.prompts.write_text("three?\n")
    _, probe, _ = run(options)
    assert len(probe.asked) == 2 + options.num_trials


def test_what_is_held_is_measured(options):
    found, _, _ = run(options)
    shares = np.cumprod(found.pruning["visual"]["stages"])
    held = sum(n * int(100 * share) for n, share in zip((3, 2, 3), shares, strict=True)) / 800
    assert found.kept_share == pytest.approx(held)


def test_fewer_pairs_than_asked_are_said(options):
    _, _, text = run(replace(options, num_samples=99, num_trials=1))
    assert "6 samples (99 were asked for" in text
    assert "no trial is better than the default" in text


def test_a_prompt_that_is_not_pruned_is_named(options):
    with pytest.raises(ConfigurationError, match=r"got '(one|two)\?' with .*png served whole"):
        run(options, kept=False)


def test_nothing_starts_with_broken_files(options):
    started = []
    (options.images / "1.png").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"1\.png must be a whole picture"):
        calibrate(options, started.append, Console(file=io.StringIO()))
    assert started == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("no/policy.yaml", "the folder of -o must exist"), ("policy.json", "must end in .yaml")],
)
def test_an_output_that_cannot_be_is_refused_at_once(options, tmp_path, name, message):
    with pytest.raises(ConfigurationError, match=message):
        run(replace(options, output=tmp_path / name))


def test_hidden_states_that_are_not_finite_are_refused(options):
    class Broken(FakeProbe):
        def ask(self, pruning):
            answers = super().ask(pruning)
            answers[2].hidden[0] = np.nan
            return answers

    objective = Objective(Broken(range(4)), ENGINE.stage_sizes(), "abcd")
    point = vflowopt_space(ENGINE, GRID, 0.25)
    with pytest.raises(ConfigurationError, match="must be finite, got nan for c"):
        objective.score(parse_pruning(point.pruning(point.start_point)))


def test_cosine():
    a, b = np.array([3.0, 4.0], np.float32), np.array([4.0, 3.0], np.float32)
    assert cosine(a, b) == pytest.approx(24 / 25)
    assert cosine(a, -2 * a) == pytest.approx(-1)


# the space of vflowopt


@pytest.mark.parametrize("keep_ratio", [0.03, 0.1, 0.25, 0.5, 0.97])
@pytest.mark.parametrize("boundaries", [(0, 2, 3, 5), (0, 3, 5), (0, 1, 7)])
def test_every_corner_of_the_space_is_legal(keep_ratio, boundaries):
    engine = EngineShape(8, boundaries, 4096)
    space = vflowopt_space(engine, GRID, keep_ratio)
    for side in (0, 1):
        point = {name: bounds[side] for name, bounds in space.coordinates.items()}
        policy = parse_pruning(space.pruning(point)).policy("visual")
        assert [share for _, share in policy.cuts(engine)] == pytest.approx(space.shares(point))


def test_ranges_scale_with_the_crop():
    ranges = vflowopt_space(ENGINE, 27, 0.25).ranges
    assert ranges == {"threshold": (0, 50), "cell": (3, 24), "alpha": (-10, 10)}
    ranges = vflowopt_space(ENGINE, 54, 0.25).ranges
    assert ranges == {"threshold": (0, 200), "cell": (6, 48), "alpha": (-10, 10)}


def test_stages_without_layers_of_their_own_are_refused():
    with pytest.raises(ConfigurationError, match=r"got one from the boundaries \[4\]; name two"):
        vflowopt_space(EngineShape(8, (0, 4), 4096), GRID, 0.25)


# the command


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.2", "nan"])
def test_keep_ratio_outside_its_interval_ends_with_status_2(ratio):
    arguments = ["--images", "i", "--prompts", "p", "-o", "o.yaml", "--keep-ratio", ratio]
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 2
    assert "must be in (0, 1)" in result.output


def test_the_command_needs_its_files_named():
    result = CliRunner().invoke(app, ["calibrate"])
    assert result.exit_code == 2
    assert "--images" in result.output
