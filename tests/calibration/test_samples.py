"""The prompts of a calibration, and the files that are refused."""

import json

import numpy as np
import pytest
from PIL import Image

from tokenprune.calibration.samples import Sample, digest, draw_samples, open_all
from tokenprune.errors import ConfigurationError


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{i}.png")
    (images / "notes.txt").write_text("no picture")
    return images


def prompts(folder, content, name="prompts.txt"):
    path = folder.parent / name
    path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
    return path


def test_a_text_file_is_cycled_over_the_pictures(folder):
    path = prompts(folder, "one?\n\n  two? \nthree?\nfour?\nfive?\nsix?\n")
    samples = draw_samples(folder, path, 99, seed=0)
    # pairs repeat after the least common multiple of 4 pictures and 6 prompts
    assert len(samples) == len(set(samples)) == 12
    assert {sample.text for sample in samples} == {
        *("one?", "two?", "three?", "four?", "five?", "six?")
    }
    assert {sample.pictures for sample in samples} == {(folder / f"{i}.png",) for i in range(4)}
    # a picture is not seen again before all were seen
    assert len({sample.pictures for sample in samples[:4]}) == 4


def test_lines_of_json_pair_pictures_and_prompts(folder):
    path = prompts(
        folder,
        [{"image": "0.png", "prompt": "one?"}, {"image": ["1.png", "2.png"], "prompt": "two?"}],
        "prompts.jsonl",
    )
    assert set(draw_samples(folder, path, 30, seed=0)) == {
        Sample((folder / "0.png",), "one?"),
        Sample((folder / "1.png", folder / "2.png"), "two?"),
    }


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_the_draw_depends_on_the_seed_alone(folder, name):
    content = (
        "\n".join("abcdefg")
        if name.endswith("txt")
        else [{"image": f"{i}.png", "prompt": c} for i in range(4) for c in "abcdefg"]
    )
    path = prompts(folder, content, name)
    drawn = [draw_samples(folder, path, 5, seed) for seed in (0, 0, 1)]
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_digest_knows_content_and_order(folder):
    samples = draw_samples(folder, prompts(folder, "one?\ntwo?"), 4, seed=0)
    before = digest(samples)
    assert digest(list(samples)) == before
    assert digest(samples[::-1]) != before
    first = samples[0].pictures[0]
    first.write_bytes(first.read_bytes() + b"\0")
    assert digest(samples) != before


def test_pictures_are_opened_in_rgb(folder):
    Image.new("LA", (8, 8)).save(folder / "0.png")
    ((pictures, text),) = open_all([Sample((folder / "0.png",), "one?")])
    assert text == "one?"
    assert pictures[0].mode == "RGB"
    assert pictures[0].size == (8, 8)


def test_broken_pictures_are_named_all_at_once(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").write_bytes(b"<html>not found</html>")
    samples = [Sample((folder / f"{i}.png",), "one?") for i in range(4)]
    with pytest.raises(ConfigurationError) as refused:
        open_all([*samples, *samples])
    message = str(refused.value)
    for i in range(3):
        assert message.count(f"{i}.png must be a whole picture, got") == 1
    assert "3.png" not in message


def test_many_broken_pictures_are_counted(folder):
    samples = []
    for i in range(6):
        (folder / f"{i}.png").write_bytes(b"")
        samples.append(Sample((folder / f"{i}.png",), "one?"))
    with pytest.raises(ConfigurationError, match=r"; and 3 more$"):
        open_all(samples)


def test_an_empty_or_missing_folder_is_refused(folder, tmp_path):
    path = prompts(folder, "one?")
    with pytest.raises(ConfigurationError, match="none must be a folder of pictures"):
        draw_samples(tmp_path / "none", path, 1, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=r"must hold pictures .*, got an empty folder"):
        draw_samples(tmp_path / "empty", path, 1, seed=0)
    (tmp_path / "empty" / "readme.md").write_text("")
    with pytest.raises(ConfigurationError, match=r"must hold pictures .*, got other files only"):
        draw_samples(tmp_path / "empty", path, 1, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("p.txt", "\n \n", "must hold a prompt a line, got an empty file", id="empty"),
        pytest.param("p.jsonl", "\n", "must hold an image and a prompt a line", id="empty-pairs"),
        pytest.param("p.jsonl", "\n{", r"line 2 of .* must be a JSON object, got", id="not-json"),
        pytest.param("p.jsonl", "[1]", r"with image and prompt, got \[1\]", id="list"),
        pytest.param(
            "p.jsonl",
            [{"image": "0.png", "question": "?"}],
            r"with image and prompt, got \['image', 'question'\]",
            id="key",
        ),
        pytest.param("p.jsonl", [{"image": "0.png", "prompt": " "}], "prompt in line 1", id="text"),
        pytest.param("p.jsonl", [{"image": [], "prompt": "?"}], "image in line 1", id="no-image"),
        pytest.param(
            "p.jsonl",
            [{"image": "../0.png", "prompt": "?"}],
            r"must name pictures in .*, got '\.\./0\.png'",
            id="another-folder",
        ),
        pytest.param("p.jsonl", [{"image": [3], "prompt": "?"}], "got 3", id="number"),
        pytest.param("p.jsonl", [{"image": [[]], "prompt": "?"}], r"got \[\]", id="nested"),
    ],
)
def test_an_illegal_file_of_prompts_is_refused_by_line(folder, name, content, message):
    path = prompts(folder, content, name)
    with pytest.raises(ConfigurationError, match=message) as refused:
        draw_samples(folder, path, 3, seed=0)
    assert str(path) in str(refused.value)


def test_a_file_of_prompts_must_be_text(folder):
    path = folder.parent / "prompts.txt"
    with pytest.raises(ConfigurationError, match="must be a text file of prompts, got"):
        draw_samples(folder, path, 3, seed=0)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="must be a text file of prompts, got"):
        draw_samples(folder, path, 3, seed=0)
