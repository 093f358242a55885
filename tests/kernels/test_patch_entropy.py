import math
from collections import Counter

import pytest
import torch

from tokenprune.kernels import patch_entropy, patch_entropy_reference


@pytest.fixture
def make_image(generator, device):
    def make(height, width, values=6):
        image = torch.randint(0, values, (3, height, width), generator=generator) * 40
        return image.to(device, torch.uint8)

    return make


def _written_out(image, patch):
    grey = [[sum(p) // 3 for p in row] for row in image.permute(1, 2, 0).tolist()]
    out = []
    for top in range(0, len(grey) - patch + 1, patch):
        for left in range(0, len(grey[0]) - patch + 1, patch):
            counts = Counter(v for row in grey[top : top + patch] for v in row[left : left + patch])
            shares = [c / patch**2 for c in counts.values()]
            out.append(-sum(p * math.log2(p) for p in shares))
    return out


@pytest.mark.parametrize(
    ("height", "width", "patch"),
    [
        pytest.param(8, 8, 8, id="one-patch"),
        pytest.param(4, 6, 1, id="patches-of-one-pixel"),
        pytest.param(28, 42, 14, id="clip-patches"),
        pytest.param(35, 30, 14, id="rests-at-the-right-and-the-bottom"),
        pytest.param(21, 14, 7, id="not-a-power-of-two"),
        pytest.param(40, 40, 20, id="patch-of-several-tiles"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_entropy_follows_the_formula(make_image, assert_matches, height, width, patch, backend):
    image = make_image(height, width)
    expected = _written_out(image, patch)
    assert_matches(patch_entropy_reference(image, patch), expected, rtol=1e-12, atol=1e-12)
    actual = patch_entropy(image, patch, backend=backend)
    assert actual.dtype == torch.float32
    # log2 P - mean of log2 counts: values up to 9 cancel
    assert_matches(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_extremes_are_zero_and_all_bits(device, assert_matches, backend):
    flat = torch.full((3, 16, 16), 255, dtype=torch.uint8, device=device)
    every = torch.arange(256, device=device, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    assert_matches(patch_entropy(flat, 16, backend=backend), [0.0], rtol=0, atol=2e-6)
    assert_matches(patch_entropy(every, 16, backend=backend), [8.0])
    # values 128 apart stay apart
    image = torch.tensor([10, 138], dtype=torch.uint8, device=device).expand(3, 2, 2)
    assert_matches(patch_entropy(image, 2, backend=backend), [1.0])


def test_the_image_may_be_a_view(make_image, assert_matches):
    image = make_image(20, 30)
    view = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not view.is_contiguous()
    assert_matches(
        patch_entropy(view, 5, backend="triton"),
        patch_entropy_reference(image, 5),
        atol=2e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("image", "patch", "message"),
    [
        pytest.param(torch.ones(3, 4, 4), 2, "image must be uint8", id="float"),
        pytest.param(torch.ones(1, 4, 4, dtype=torch.uint8), 2, "image must be", id="one-channel"),
        pytest.param(torch.ones(3, 4, 8, dtype=torch.uint8), 5, "within 1..4", id="too-large"),
        pytest.param(torch.ones(3, 4, 4, dtype=torch.uint8), 0, "within 1..4", id="zero"),
    ],
)
def test_bad_inputs_are_refused(image, patch, message):
    with pytest.raises(ValueError, match=message):
        patch_entropy(image, patch)
