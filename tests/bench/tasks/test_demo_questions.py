"""The package's pictures and questions are what the generator writes."""

import numpy as np
from PIL import Image

from bench.tasks import demo_questions
from tokenprune.demo.quiz import FOLDER, INDEX


def test_the_shipped_set_is_the_generated_one(tmp_path):
    demo_questions.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in FOLDER.iterdir()}
    assert (tmp_path / INDEX).read_text() == (FOLDER / INDEX).read_text()
    # compression may differ between versions of Pillow, pixels may not
    for name in names - {INDEX}:
        with Image.open(tmp_path / name) as made, Image.open(FOLDER / name) as shipped:
            assert np.array_equal(np.asarray(made), np.asarray(shipped)), name
