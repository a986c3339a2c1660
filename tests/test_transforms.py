"""What reaches the network, pixel by pixel."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from abe.data.transforms import Preprocessing, center_crop, pad_to_square, random_crop_and_flip
from abe.errors import InputError

IMAGENET = Preprocessing(
    "RGB", mean=(123.675, 116.28, 103.53), scale=(1 / 58.395, 1 / 57.12, 1 / 57.375)
)


def places(height, width):
    """An image whose every pixel says where it was."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1)


# --- Preprocessing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preprocessing", [Preprocessing(), Preprocessing(scale=0.5), IMAGENET, Preprocessing("RGB")]
)
def test_normalize_is_the_formula_in_the_networks_channel_order(preprocessing):
    images = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    normalized = preprocessing.normalize(images)
    assert normalized.dtype == torch.float32
    scale = np.broadcast_to(preprocessing.scale, 3)
    for channel in range(3):
        source = images[:, 2 - channel if preprocessing.channels == "BGR" else channel]
        expected = (source.double() - preprocessing.mean[channel]) * scale[channel]
        torch.testing.assert_close(normalized[:, channel].double(), expected, atol=1e-4, rtol=0)


def test_imagenet_statistics_are_those_of_torchvision():
    images = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = (images / 255 - mean) / std
    torch.testing.assert_close(IMAGENET.normalize(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_normalize_keeps_channels_last_and_the_images(channels):
    images = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    normalized = Preprocessing(channels).normalize(images)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_whole_numbers_do_not_make_whole_pixels():
    preprocessing = Preprocessing(mean=(1, 2, 3), scale=2)
    normalized = preprocessing.normalize(torch.zeros(1, 3, 2, 2).byte())
    assert normalized.dtype == torch.float32
    assert normalized[0, :, 0, 0].tolist() == [-2, -4, -6]


@pytest.mark.parametrize("preprocessing", [Preprocessing(), IMAGENET, Preprocessing(crop=256)])
def test_json_and_back(preprocessing):
    values = json.loads(json.dumps(preprocessing.to_json()))
    assert Preprocessing.from_json(values) == preprocessing


def test_missing_keys_keep_their_defaults():
    assert Preprocessing.from_json({"resize": 300}) == Preprocessing(resize=300)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": "BGR"}, r"preprocessing: colour='BGR': Unexpected"),
        ({"channels": "BRG"}, r"preprocessing: channels='BRG': .*'RGB' or 'BGR'"),
        ({"channels": None}, r"preprocessing: channels=None: .*'RGB' or 'BGR'"),
        ({"mean": 104}, r"preprocessing: mean=104: .* a valid tuple"),
        ({"mean": "104"}, r"preprocessing: mean='104': .* a valid tuple"),
        ({"mean": [1, 2]}, r"preprocessing: mean=\[1, 2\]: Field required"),
        ({"mean": [1, 2, 3, 4]}, r"preprocessing: mean=\[1, 2, 3, 4\]: .* at most 3 items"),
        ({"mean": [1, "2", 3]}, r"preprocessing: mean=\[1, '2', 3\]: .* a valid number"),
        ({"mean": [1, 2, float("nan")]}, r"preprocessing: mean=.*: .* a finite number"),
        ({"scale": "2"}, r"preprocessing: scale='2': .* a valid number or .* a valid tuple"),
        ({"scale": True}, r"preprocessing: scale=True: .* a valid number"),
        ({"scale": 0}, r"preprocessing: scale=0: .* greater than 0"),
        ({"scale": float("inf")}, r"preprocessing: scale=inf: .* a finite number"),
        ({"scale": [1, 2, -3]}, r"preprocessing: scale=\[1, 2, -3\]: .* greater than 0"),
        ({"resize": "256"}, r"preprocessing: resize='256': .* a valid integer"),
        ({"resize": 256.5}, r"preprocessing: resize=256\.5: .* a valid integer"),
        ({"crop": True}, r"preprocessing: crop=True: .* a valid integer"),
        ({"crop": 300}, r"preprocessing: data\.crop=300 does not fit into data\.resize=256"),
        ({"crop": 0}, r"preprocessing: data\.crop=0"),
        ({"crop": "a", "mean": 0}, r"preprocessing: mean=0: .*; crop='a': .* a valid integer"),
    ],
)
def test_json_that_is_no_preprocessing(values, message):
    with pytest.raises(InputError, match=message):
        Preprocessing.from_json(values)


def test_a_crop_larger_than_the_square():
    with pytest.raises(InputError, match=r"data\.crop=100 does not fit into data\.resize=99"):
        Preprocessing(resize=99, crop=100)


# --- pad_to_square -----------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 48))
def test_the_longer_side_fills_the_square_and_black_the_rest(width, height, side):
    white = Image.new("RGB", (width, height), "white")
    square = pad_to_square(white, side)
    assert square.shape == (side, side, 3)
    assert square.dtype == np.uint8
    filled = (square == 255).all(-1)
    assert np.array_equal(filled, (square != 0).all(-1))
    rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    assert filled[np.ix_(rows, columns)].all()
    for length, where in ((height, rows), (width, columns)):
        expected = max(1, length * side / max(width, height))
        assert abs(len(where) - expected) <= 0.5
        before, after = where[0], side - 1 - where[-1]
        assert after - before in (0, 1)


def test_an_image_of_that_size_stays_as_it_is():
    image = Image.fromarray(places(20, 20))
    np.testing.assert_array_equal(pad_to_square(image, 20), image)
    tall = places(20, 11)
    expected = np.zeros((20, 20, 3), np.uint8)
    expected[:, 4:15] = tall
    np.testing.assert_array_equal(pad_to_square(Image.fromarray(tall), 20), expected)


def test_a_large_image_is_averaged_and_not_sampled():
    checks = (255 * (np.indices((256, 256)).sum(0) % 2)).astype(np.uint8)
    square = pad_to_square(Image.fromarray(checks).convert("RGB"), 32)
    np.testing.assert_allclose(square, 127.5, atol=1)


# --- crops -------------------------------------------------------------------------------------


def test_a_random_crop_is_a_part_of_the_image_or_its_mirror_and_every_one_comes_up():
    image, crop = places(7, 9), 5
    seen = set()
    for seed in range(400):
        part = random_crop_and_flip(image, crop, np.random.default_rng(seed))
        assert part.shape == (crop, crop, 3)
        flipped = part[0, 0, 1] > part[0, -1, 1]
        upright = part[:, ::-1] if flipped else part
        top, left, _ = upright[0, 0].tolist()
        np.testing.assert_array_equal(upright, image[top : top + crop, left : left + crop])
        seen.add((top, left, bool(flipped)))
    assert len(seen) == 3 * 5 * 2


def test_a_random_crop_is_the_generators_alone():
    image = places(40, 40)
    crops = [random_crop_and_flip(image, 8, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
    np.testing.assert_array_equal(image, places(40, 40))


@pytest.mark.parametrize(
    ("side", "crop", "first"), [(9, 5, 2), (8, 5, 1), (5, 5, 0), (256, 224, 16)]
)
def test_the_centre_crop(side, crop, first):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    expected = image[first : first + crop, first : first + crop]
    np.testing.assert_array_equal(center_crop(image, crop), expected)
