"""Settings: the same in JSON and in Python, changed by key=value, refused with what would fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from abe.config import Config, _keys, explain
from abe.errors import InputError
from abe.recipes import RECIPES, get_recipe
from abe.results import flatten


def setting(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


# --- JSON and Python ---------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_round_trip(recipe: str) -> None:
    config = get_recipe(recipe)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_what_is_left_out_of_json_has_its_default() -> None:
    assert Config.from_json({"train": {"steps": 7}}).train.batch_size == Config().train.batch_size


def test_settings_do_not_change() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0


def test_the_last_part_of_a_name_is_enough_to_find_a_setting() -> None:
    names = [name.rpartition(".")[2] for name in _keys(Config)]
    assert len(set(names)) == len(names)
    assert set(_keys(Config)) >= {"seed", "model.weights", "data.crop", "train.lr"}


# --- key=value ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("seed=3", 3),
        ("train.lr=1e-4", 1e-4),
        ("train.steps=10.0", 10),
        ("train.clip_norm=5", 5.0),
        ("tracking=mlflow", ("mlflow",)),
        ("tracking=tensorboard, wandb", ("tensorboard", "wandb")),
        ('tracking=["mlflow"]', ("mlflow",)),
        ("tracking=none", ()),
        ("train.clip_norm=null", None),
        ("train.clip_norm=none", None),
        ("model.weights=None", None),
        ("model.weights=null", None),
        ("model.branch_point=pool4", "pool4"),
        ('model.branch_point="pool4"', "pool4"),
        ("data.cache=true", True),
        ("data.cache=False", False),
        ("data.source=photos", "photos"),
        ("data.source=my photos=2", "my photos=2"),
        ('data.source="null"', "null"),
        (r'data.source="a \"quoted\" name"', 'a "quoted" name'),
        ("data.source='single'", "'single'"),
        ("data.source=2010", "2010"),
        ("data.source=[a]", "[a]"),
        ("data.source=café", "café"),
        ("train.metric_loss=ArcFaceLoss(margin=28.6)", "ArcFaceLoss(margin=28.6)"),
        ("train.metric_loss=TripletMarginLoss(swap=True)", "TripletMarginLoss(swap=True)"),
        (" train.lr =2", 2.0),
    ],
)
def test_override(assignment: str, value: object) -> None:
    config = Config().with_overrides([assignment])
    found = setting(config, assignment.partition("=")[0].strip())
    assert found == value
    assert type(found) is type(value)


def test_overrides_leave_the_rest_alone_and_the_last_one_counts() -> None:
    config = get_recipe("photographs")
    changed = config.with_overrides(["train.lr=1", "train.lr=2"])
    assert changed.train.lr == 2
    assert changed.with_overrides([f"train.lr={config.train.lr}"]) == config
    assert config.with_overrides([]) == config


def test_overrides_are_checked_together() -> None:
    """Neither of the two fits without the other."""
    config = Config().with_overrides(["data.crop=300", "data.resize=320"])
    assert (config.data.resize, config.data.crop) == (320, 300)


# --- What is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sed", "seed"),
        ("lr", "train.lr"),
        ("batchsize", "train.batch_size"),
        ("train.batch-size", "train.batch_size"),
        ("training.lr", "train.lr"),
        ("data.batch_size", "train.batch_size"),
        ("model.learners", "model.num_learners"),
        ("train.lr.value", None),
        ("train.zzz", None),
        ("zzz", None),
        ("", None),
        (".", None),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str | None) -> None:
    with pytest.raises(InputError) as error:
        Config().with_overrides([f"{key}=1"])
    hint = f"did you mean {nearest!r}?" if nearest else "see `abe config` for all of them"
    assert str(error.value) == f"there is no setting {key!r}: {hint}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "no setting 'sed': did you mean 'seed'?"),
        ({"train": {"step": 1}}, "no setting 'train.step': did you mean 'train.steps'?"),
        ({"train": {"steps": "1x"}}, "train.steps='1x': it has to be a valid integer"),
        ({"train": 5}, "train=5: it has to be a valid dictionary"),
        ({"seed": {}}, "seed={}: it has to be a valid integer"),
        ([], "the configuration=[]: it has to be a valid dictionary"),
    ],
)
def test_unknown_and_wrong_values_in_json(values: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        Config.from_json(values)
    assert str(error.value).endswith(message)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as error:
        Config().with_overrides(["train.lr=-1", "train.stepps=5", "seed=x"])
    assert str(error.value).split("; ") == [
        "seed='x': it has to be a valid integer",
        "train.lr=-1: it has to be greater than 0",
        "there is no setting 'train.stepps': did you mean 'train.steps'?",
    ]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "'seed': write key=value"),
        ("train=5", "train is a group of settings"),
        ("train.steps=-1", "train.steps=-1: it has to be greater than or equal to 0"),
        ("train.steps=1.5", "train.steps=1.5: it has to be a valid integer"),
        (f"train.steps={'9' * 5000}", "train.steps='999.*999': "),
        ("train.lr=Infinity", "train.lr=inf: it has to be a finite number"),
        ("train.lr=NaN", "train.lr=nan: it has to be a finite number"),
        ("train.lr=null", "train.lr=None: it has to be a valid number"),
        ('train.lr={"value": 1}', "train.lr={'value': 1}: it has to be a valid number"),
        ("train.lr=" + "[" * 50_000, r"train.lr='\[\[\[.*: it has to be a valid number"),
        ("data.cache=maybe", "data.cache='maybe': it has to be a valid boolean"),
        ("protocol=test", "protocol='test': it has to be 'val', 'paper' or 'both'"),
        ("tracking=board", "tracking.0='board': it has to be 'tensorboard', 'mlflow' or 'wandb'"),
        ("tracking=0", "tracking=0: it has to be a valid tuple"),
        (f"seed={2**63}", "seed=9223372036854775808: it has to be less than"),
        ("model.attention_depth=0", "model.attention_depth=0: it has to be greater than or equal"),
        ("train.margin=0", "train.margin=0: it has to be greater than 0"),
        ("model.num_learners=3", "embedding_dim=512 cannot be shared by 3 learners: use 510 or"),
        ("model.backbone=vgg", "backbone 'vgg' is unknown: use one of googlenet, "),
        ("data.crop=300", "data.crop=300 does not fit into data.resize=256"),
        ("data.crop=16", "data.crop=16 is too small for model.backbone=googlenet"),
        (
            "model.backbone=resnet50",
            "googlenet-mini-imagenet-v2 are of the backbone googlenet, not of resnet50: "
            "use torchvision-resnet50, ",
        ),
    ],
)
def test_values_that_do_not_fit(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Config().with_overrides([assignment])
    assert len(str(error.value)) < 300
    assert "Input should" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "batch_size", "fits"),
    [
        ("pairs", 6, "4 or 8"),
        ("pairs", 30, "28 or 32"),
        ("classes", 4, "8 or 12"),
        ("classes", 30, "28 or 32"),
    ],
)
def test_batches_that_the_sampler_cannot_fill(sampler: str, batch_size: int, fits: str) -> None:
    with pytest.raises(InputError, match=f"train.batch_size={batch_size} .*: use {fits}$"):
        Config().with_overrides([f"train.sampler={sampler}", f"train.batch_size={batch_size}"])
    for size in fits.split(" or "):
        Config().with_overrides([f"train.sampler={sampler}", f"train.batch_size={size}"])


# --- Digest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "assignment",
    ["seed=1", "protocol=paper", "train.lr=0.5", "model.weights=none", "data.source=cars"],
)
def test_digest_tells_runs_apart(assignment: str) -> None:
    config = Config().with_overrides(["data.source=birds"])
    assert config.with_overrides([assignment]).digest != config.digest


def test_digest_leaves_out_where_and_how_fast() -> None:
    config = Config().with_overrides(["data.source=/here/birds"])
    assert len(config.digest) == 12
    for assignment in (
        "device=cpu",
        "tracking=mlflow,wandb",
        "data.workers=4",
        "data.cache=true",
        "data.source=/there/birds",
        "data.source=birds/",
    ):
        assert config.with_overrides([assignment]).digest == config.digest, assignment
    assert "/here" not in json.dumps(config.portable())
    here, there = (Config().with_overrides([f"model.weights=/{x}/net.onnx"]) for x in ("a", "b"))
    assert here.digest == there.digest


def test_anchored_paths_hold_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = Config().with_overrides(["data.source=birds", "model.weights=net.onnx"])
    assert own.anchored().data.source == str(tmp_path / "birds")
    assert own.anchored().model.weights == str(tmp_path / "net.onnx")
    assert own.anchored().digest == own.digest
    benchmark = Config().with_overrides(["data.source=cub200", "data.root=sets"]).anchored()
    assert (benchmark.data.source, benchmark.data.root) == ("cub200", str(tmp_path / "sets"))
    for named in (Config(), get_recipe("demo")):
        assert named.anchored() == named


def test_the_digest_is_of_the_content_of_a_start(tmp_path: Path) -> None:
    """Of a file, and of a checkpoint's folder; not of where they are."""
    digests = []
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder / "net").mkdir(parents=True)
        starts = [tmp_path / folder / "net", tmp_path / folder / "net.pth"]
        for file in (starts[0] / "model.safetensors", starts[1]):
            file.write_bytes(content)
        digests.append([Config().with_overrides([f"model.weights={s}"]).digest for s in starts])
    assert digests[0] == digests[1]
    assert all(x != y for x, y in zip(digests[0], digests[2], strict=True))


# --- What there is to set ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_explained_settings_are_the_configuration(recipe: str) -> None:
    """All of them, each with what --set takes to come to the same, and a sentence."""
    config = get_recipe(recipe).with_overrides(["tracking=none", "train.clip_norm=2"])
    explained = explain(config)
    same = Config().with_overrides(f"{each.key}={each.value}" for each in explained)
    assert same == config
    assert [each.key for each in explained] == list(flatten(config.to_json()))
    assert all(each.meaning.endswith(".") for each in explained)


def test_what_a_setting_takes() -> None:
    takes = {each.key: each.takes for each in explain(Config())}
    assert takes["train.optimizer"] == "sgd | adamw"
    assert takes["train.decay_factor"] == "number > 0 and <= 1"
    assert takes["train.chunk_size"] == "integer >= 1 | none"
    assert takes["data.cache"] == "true | false"
    assert takes["tracking"] == "some of tensorboard | mlflow | wandb"
    assert takes["device"] == "text"


# --- Recipes -----------------------------------------------------------------------------------


def test_recipes_are_what_their_names_say() -> None:
    for name in RECIPES:
        assert get_recipe(name).recipe == name
    paper = get_recipe("paper")
    assert (paper.model.num_learners, paper.model.embedding_dim) == (8, 512)
    assert paper.model.weights == "bvlc-googlenet"  # ImageNet's
    assert (paper.data.resize, paper.data.crop) == (256, 224)
    assert (paper.train.sampler, paper.train.batch_size) == ("pairs", 64)
    assert (paper.train.margin, paper.train.divergence_margin) == (1, 1)
    assert paper.train.divergence_weight == 1
    assert paper.train.normalization == paper.train.divergence_normalization == "per_image"


def test_unknown_recipe() -> None:
    with pytest.raises(InputError, match="no recipe 'papier': did you mean 'paper'"):
        get_recipe("papier")


def test_a_file_of_a_known_start_s_name_is_not_that_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = get_recipe("demo")
    digest = config.digest
    monkeypatch.chdir(tmp_path)
    assert config.model.weights is not None
    (tmp_path / config.model.weights).write_bytes(b"something else")
    assert config.digest == digest


def test_the_home_folder_may_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    config = Config().with_overrides(["model.weights=~/w.safetensors", "data.source=~/photos"])
    anchored = config.anchored()
    assert anchored.model.weights == str(tmp_path / "w.safetensors")
    assert anchored.data.source == str(tmp_path / "photos")
    assert anchored.digest == config.digest
    (tmp_path / "w.safetensors").write_bytes(b"others")
    assert anchored.digest == config.digest
    assert Config().digest != config.digest
