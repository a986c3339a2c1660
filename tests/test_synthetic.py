import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from abe.data.synthetic import (
    BODIES,
    FAMILY_SIZE,
    ROOFLINES,
    VOCABULARY,
    Nuisance,
    Parts,
    SyntheticVehicles,
    draw_vehicle,
)
from abe.errors import InputError

PARTS = Parts(**{part: values[0] for part, values in VOCABULARY.items()})

DIGEST = """
import hashlib
from abe.data.synthetic import SyntheticVehicles
vehicles = SyntheticVehicles(num_classes=30, images_per_class=3, size=64, seed=5)
digest = hashlib.sha256(repr(vehicles.parts).encode())
for index in range(0, len(vehicles), 7):
    digest.update(vehicles.load(index).tobytes())
print(digest.hexdigest())
"""


def picture(parts: Parts, number: int, size: int = 96) -> np.ndarray:
    return np.asarray(draw_vehicle(parts, size, np.random.default_rng([1, 2, number])), np.float32)


def changed_pixels(a: np.ndarray, b: np.ndarray) -> int:
    return int((np.abs(a - b).max(axis=2) > 30).sum())


def test_identical_in_every_process():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_an_image_depends_on_nothing_drawn_before():
    vehicles = SyntheticVehicles(num_classes=8, images_per_class=4, size=48)
    alone = vehicles.load(21).tobytes()
    np.random.seed(3)  # noqa: NPY002
    for index in range(21):
        vehicles.load(index)
    assert vehicles.load(21).tobytes() == alone


def test_more_classes_and_images_keep_the_first_ones():
    small = SyntheticVehicles(num_classes=10, images_per_class=2, size=48)
    large = SyntheticVehicles(num_classes=40, images_per_class=5, size=48)
    assert large.parts[:10] == small.parts
    assert large.class_names[:10] == small.class_names
    assert large.load(7 * 5 + 1).tobytes() == small.load(7 * 2 + 1).tobytes()


def test_another_seed_is_another_set():
    one, other = (SyntheticVehicles(num_classes=40, size=48, seed=seed) for seed in (0, 1))
    assert not set(one.parts) & set(other.parts)
    assert one.load(0).tobytes() != other.load(0).tobytes()


def test_classes_are_distinct_combinations_of_known_parts():
    vehicles = SyntheticVehicles(num_classes=400)
    assert len(set(vehicles.parts)) == len(set(vehicles.class_names)) == 400
    for parts in vehicles.parts:
        for part, value in dataclasses.asdict(parts).items():
            assert value in VOCABULARY[part]


def test_a_family_shares_all_but_one_to_three_parts_with_its_founder():
    classes = SyntheticVehicles(num_classes=400).parts
    for founder in range(0, 400, FAMILY_SIZE):
        for sibling in classes[founder + 1 : founder + FAMILY_SIZE]:
            pairs = zip(
                dataclasses.astuple(classes[founder]), dataclasses.astuple(sibling), strict=True
            )
            assert 1 <= sum(a != b for a, b in pairs) <= 3
            assert sibling.body == classes[founder].body


def test_held_out_classes_recombine_parts_seen_in_training():
    classes = SyntheticVehicles(num_classes=200).parts
    train, test = classes[:100], classes[100:]
    assert not set(train) & set(test)
    for part in VOCABULARY:
        assert {getattr(p, part) for p in test} <= {getattr(p, part) for p in train}


@pytest.mark.parametrize("part", VOCABULARY)
def test_each_value_of_a_part_can_be_seen(part):
    variants = [dataclasses.replace(PARTS, **{part: value}) for value in VOCABULARY[part]]
    drawn = [[picture(parts, number) for number in range(3)] for parts in variants]
    for a, b in itertools.combinations(drawn, 2):
        assert sum(changed_pixels(x, y) for x, y in zip(a, b, strict=True)) >= 15


def test_a_small_part_changes_nothing_else():
    other = dataclasses.replace(PARTS, rim="moon", lamp="slit")
    changed = changed_pixels(picture(PARTS, 0), picture(other, 0))
    assert 0 < changed < 0.15 * 96 * 96


@pytest.mark.parametrize("body", BODIES)
def test_every_body_can_be_drawn_with_every_roofline(body):
    drawn = {
        picture(dataclasses.replace(PARTS, body=body, roofline=roofline), 0, size=48).tobytes()
        for roofline in ROOFLINES
    }
    assert len(drawn) == len(ROOFLINES)


def test_nuisance_varies_within_a_class():
    vehicles = SyntheticVehicles(num_classes=2, images_per_class=20, size=48)
    images = [vehicles.load(index) for index in range(20)]
    assert len({hashlib.sha256(image.tobytes()).digest() for image in images}) == 20
    pixels = np.stack([np.asarray(image, np.float64) for image in images])
    assert pixels.mean(axis=(1, 2)).std(axis=0).min() > 10  # overall colour
    assert pixels.std(axis=0).mean() > 30  # everywhere in the frame

    drawn = [Nuisance.sample(np.random.default_rng([0, 0, number])) for number in range(20)]
    assert {nuisance.mirrored for nuisance in drawn} == {False, True}
    for field in ("paint", "yaw", "elevation", "roll", "distance", "fill", "shift", "light"):
        assert len({getattr(nuisance, field) for nuisance in drawn}) == 20


def test_raw_pixels_fail():
    vehicles = SyntheticVehicles(num_classes=60, images_per_class=8, size=48)
    pixels = np.stack(
        [
            np.asarray(vehicles.load(i).resize((32, 32), Image.Resampling.BILINEAR), float).ravel()
            for i in range(len(vehicles))
        ]
    )
    squares = (pixels**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(distances, np.inf)
    labels = vehicles.labels
    recall_at_1 = (labels[distances.argmin(axis=1)] == labels).mean()
    assert recall_at_1 < 0.1


@pytest.mark.parametrize("size", [32, 96, 128])
def test_images_are_rgb_squares(size):
    image = SyntheticVehicles(num_classes=2, size=size).load(3)
    assert (image.mode, image.size) == ("RGB", (size, size))


def test_labels_names_and_length():
    vehicles = SyntheticVehicles(num_classes=5, images_per_class=3)
    assert len(vehicles) == 15
    assert vehicles.labels.dtype == np.int64
    assert vehicles.labels.tolist() == [c for c in range(5) for _ in range(3)]
    assert len(vehicles.class_names) == 5
    assert vehicles.describe(7) == "synthetic class 2 image 1"


def test_select_keeps_labels_and_class_names():
    vehicles = SyntheticVehicles(num_classes=6, images_per_class=4, size=48)
    chosen = vehicles.select(np.array([21, 2, 13]))
    again = chosen.select(np.array([2, 0]))
    assert chosen.labels.tolist() == [5, 0, 3]
    assert again.labels.tolist() == [3, 5]
    assert chosen.class_names == again.class_names == vehicles.class_names
    assert [again.describe(i) for i in range(len(again))] == [
        "synthetic class 3 image 1",
        "synthetic class 5 image 1",
    ]
    assert again.load(1).tobytes() == vehicles.load(21).tobytes()
    assert len(vehicles) == 24


@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_classes", 1), ("images_per_class", 1), ("size", 31), ("seed", -1)],
)
def test_arguments_that_make_no_set_are_refused(argument, value):
    with pytest.raises(InputError, match=rf"{argument} is {value}, but it has to be"):
        SyntheticVehicles(**{argument: value})
