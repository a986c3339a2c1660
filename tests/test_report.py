"""The report of made-up runs: random embeddings, and a network with random weights."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image

from abe.checkpoint import Best, build_model, save_checkpoint
from abe.config import Config
from abe.data.splits import open_splits
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.evaluate import pair_cosines, score
from abe.files import append_json_line, write_json
from abe.report import figures
from abe.report.html import write_report
from abe.report.runs import read_runs
from abe.results import result_record, write_result
from abe.runtime import environment

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CLASSES, IMAGES = 8, 5  # 4 of the classes are for testing
HOSTILE = "h_<img src=x onerror=alert(1)>&\"'"
LAYERS = [f"layer_{number}" for number in range(9)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "birds"
    rng = np.random.default_rng(0)
    for name in [*"abcdefg", HOSTILE]:
        (root / name).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC)
            image.save(root / name / f"{name[0]}_{number}.png")
    return root


def configuration(data: Path, *settings: str) -> Config:
    return Config().with_overrides(
        [
            f"data.source={json.dumps(str(data))}",
            "data.resize=56",
            "data.crop=48",
            "data.val_classes=0.5",
            "model.embedding_dim=16",
            "model.num_learners=2",
            "model.weights=none",
            "train.steps=40",
            *settings,
        ]
    )


def embeddings_of(labels: np.ndarray, learners: int, seed: int) -> torch.Tensor:
    """Classes that overlap, so that some queries go right and some go wrong; (N, M, 8)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, learners, 8, generator=generator)
    noise = torch.randn(len(labels), learners, 8, generator=generator)
    return F.normalize(centres[torch.as_tensor(labels)] + 1.2 * noise, dim=-1)


def make_run(path: Path, config: Config, selection_recall: float, seed: int = 0) -> Path:
    """A folder as `Trainer` leaves it."""
    splits = open_splits(config.data, config.protocol)
    torch.manual_seed(seed)
    best = Best(20, selection_recall)
    save_checkpoint(
        path / "checkpoints",
        step=20,
        config=config,
        preprocessing=Preprocessing(resize=config.data.resize, crop=config.data.crop),
        weights=None,
        best=best,
        model=build_model(config).state_dict(),
        training={},
    )
    write_json(path / "config.json", config.to_json())
    for step in range(41):
        line = {
            "loss": 4 - step / 20,
            "divergence": 2 - step / 20,
            "learner_cosine": None if config.model.num_learners == 1 else 0.9 - step / 100,
            "update_to_weight": dict.fromkeys(LAYERS, (1 + step) * 1e-4),
        }
        append_json_line(path / "metrics.jsonl", {"step": step, **line})
        if step % 20 == 0:
            append_json_line(path / "metrics.jsonl", {"step": step, "recall_at_1": step / 80})
    embeddings = embeddings_of(splits.test.labels, config.model.num_learners, seed)
    return write_scores(path, config, embeddings, best)


def write_scores(
    path: Path,
    config: Config,
    embeddings: torch.Tensor,
    best: Best | None,
    method: str | None = None,
) -> Path:
    splits = open_splits(config.data, config.protocol)
    ks = [k for k in splits.ks if k < len(splits.test)]
    record = result_record(
        config,
        scores=score(embeddings, splits.test.labels, ks),
        best=best,
        data=splits.describe(),
        images_digest=splits.digest,
        weights=None,
        environment=environment(torch.device("cpu")) | {"precision": "fp32"},
        method=method,
    )
    write_result(path, record, embeddings)
    return path


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    config = configuration(data)
    labels = open_splits(config.data, config.protocol).test.labels
    pixels = write_scores(root / "pixels", config, embeddings_of(labels, 1, 3), None, "raw pixels")
    start = write_scores(
        root / "start", config, embeddings_of(labels, 1, 4), None, "pretrained start"
    )
    (start / "embeddings.safetensors").unlink()
    head = configuration(data, "model.network=m-heads", "model.num_learners=1")
    return {
        "pixels": pixels,
        "start": start,
        "head": make_run(root / "head", head, 0.4),
        "abe": make_run(root / "abe", config, 0.5, seed=1),
    }


@pytest.fixture(scope="module")
def page_file(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "new folder" / "report.html"
    write_report(list(runs.values()), output)
    return output


@pytest.fixture(scope="module")
def page(page_file: Path) -> str:
    return page_file.read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}">.*?</section>', page, re.S)
    return found


def text(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", markup)).split())


def table(markup: str) -> list[list[str]]:
    rows = re.findall(r"<tr.*?</tr>", markup, re.S)
    return [
        [text(cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.S)] for row in rows
    ]


def record(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def elsewhere(run: Path, source: Path) -> Path:
    """A run whose images are at `source`, by a record that does not know which they were."""
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = str(source)
    write_json(run / "config.json", config)
    write_json(run / "result.json", record(run) | {"images_digest": None})
    return run


def test_finding_names_the_scores(page: str, runs: dict[str, Path]) -> None:
    (heading,) = re.findall(r"<h1>.*?</h1>", page, re.S)
    percent = {n: 100 * record(r)["scores"]["ensemble"]["recall@1"] for n, r in runs.items()}
    assert text(heading).startswith(
        f"ABE-216 finds an image of the same class first in {percent['abe']:.1f} % of 20 queries; "
    )
    assert f"raw pixels in {percent['pixels']:.1f} %" in text(heading)
    assert f"pretrained start in {percent['start']:.1f} %" in text(heading)
    assert "protocol val" in page


def test_table_shows_the_records(page: str, runs: dict[str, Path]) -> None:
    head, *rows = table(section(page, "results"))
    assert head[:6] == ["Method", "Recall@1", "Recall@2", "Recall@4", "Recall@8", "MAP@R"]
    assert [row[0] for row in rows] == ["raw pixels", "pretrained start", "1-head16", "ABE-216"]
    for row, run in zip(rows, runs.values(), strict=True):
        scores = record(run)["scores"]
        keys = ["recall@1", "recall@2", "recall@4", "recall@8", "map@r"]
        assert row[1:6] == [f"{100 * scores['ensemble'][key]:.1f}" for key in keys]
    learners = sorted(100 * each["recall@1"] for each in record(runs["abe"])["scores"]["learners"])
    cosine = record(runs["abe"])["scores"]["similarity"]["self"]
    assert rows[3][6:] == [f"{learners[0]:.1f}\N{EN DASH}{learners[1]:.1f}", f"{cosine:.2f}"]
    assert rows[2][6:] == ["", ""]


def test_best_scores_are_bold(page: str, runs: dict[str, Path]) -> None:
    best = max(record(run)["scores"]["ensemble"]["map@r"] for run in runs.values())
    assert f"<b>{100 * best:.1f}</b>" in section(page, "results")
    scores = [record(run)["scores"]["ensemble"] for run in runs.values()]
    expected = sum(
        row[key] == max(each[key] for each in scores)
        for row in scores
        for key in ("recall@1", "recall@2", "recall@4", "recall@8", "map@r")
    )
    assert section(page, "results").count("<b>") == expected


def test_curves_pass_through_the_log(page: str) -> None:
    training = section(page, "training")
    assert len(re.findall('role="img"', training)) == 4
    assert "ABE-2^16: 0 at step 0, 50 at step 40" in training  # recall_at_1, in %
    assert "ABE-2^16: 4 at step 0, 2 at step 40" in training  # loss
    cosine = training[training.index("Learners&#39; cosine, mean") :]
    assert "1-head" not in cosine  # a single learner has none


def test_line_chart_maps_steps_and_values() -> None:
    chart = figures.line_chart("t", "unit", {"a": ("s", [(0, 0.0), (50, 5.0), (100, 10.0)])})
    assert chart is not None
    assert chart.marks[0].path == "M0.0 100.00L50.0 50.00L100.0 0.00"
    assert figures.line_chart("t", "unit", {"a": ("s", [])}) is None
    long = figures.line_chart("t", "u", {"a": ("s", [(step, 1.0) for step in range(100_000)])})
    assert long is not None
    assert long.marks[0].path.count("L") < figures.DRAWN_POINTS
    assert long.marks[0].path.rpartition("L")[2].startswith("100.0 ")  # the last step


@pytest.mark.parametrize(
    "values", [(6.85505,), (0.0,), (50.0,), (-1.0, -1.0), (1e6 + 0.1, 1e6 + 0.2), (6.85505, 6.8551)]
)
def test_ticks_of_a_flat_line_read_differently(values: tuple[float, ...]) -> None:
    chart = figures.line_chart("t", "u", {"a": ("s", list(enumerate(values)))})
    assert chart is not None
    shown = [f"{tick:,g}" for tick in chart.y.ticks]  # as the template has it
    assert len(set(shown)) == len(shown) >= 3
    assert chart.y.low <= min(values) <= max(values) <= chart.y.high


def test_histogram_counts_each_pair_once() -> None:
    values = torch.tensor([-1.0, -0.999, 0.003, 0.01, 0.99, 1.0, 1.0000001])
    counts = figures.histogram(values)
    width = 2 / figures.HISTOGRAM_BINS
    expected = [0] * figures.HISTOGRAM_BINS
    for value in values.double().tolist():
        expected[min(int((value + 1) // width), figures.HISTOGRAM_BINS - 1)] += 1
    assert counts.tolist() == expected
    assert counts.sum() == len(values)


def test_histogram_chart_draws_the_counts() -> None:
    embeddings = embeddings_of(np.repeat(np.arange(4), 5), 2, 0)
    cosines = pair_cosines(embeddings, torch.arange(4).repeat_interleave(5))
    chart = figures.histogram_chart("t", cosines, -1)
    assert [mark.style for mark in chart.marks] == ["positive", "negative", "self"]
    for mark in chart.marks:
        counts = figures.histogram(cosines[mark.style])
        drawn = [100 - float(y) for y in re.findall(r"V([\d.]+)H", mark.path)]
        occupied = counts[counts.nonzero()[0][0] : counts.nonzero()[0][-1] + 1]
        np.testing.assert_allclose(drawn, 100 * occupied / counts.max(), atol=0.01)


def test_histograms_leave_out_self_pairs_of_one_learner(page: str) -> None:
    similarity = section(page, "similarity")
    assert len(re.findall('role="img"', similarity)) == 2
    assert similarity.count('<g class="self">') == 1 + 1  # the legend and ABE-2


def test_overlays_share_one_stretch() -> None:
    picture = np.full((8, 8, 3), 200, np.uint8)
    masks = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1).expand(3, 4, 4)
    closed, half, opened = (np.asarray(image)[4, 4] for image in figures.overlays(picture, masks))
    for shown, value in ((closed, 0.0), (half, 0.5), (opened, 1.0)):
        colour = 255 * (0.45 * 200 / 255 + 0.55 * np.array(colormaps["viridis"](value)[:3]))
        np.testing.assert_allclose(shown, colour, atol=2)


def test_overlay_is_bright_where_the_mask_is_open() -> None:
    masks = torch.zeros(1, 2, 2)
    masks[0, 0, 1] = 1
    (image,) = figures.overlays(np.zeros((16, 16, 3), np.uint8), masks)
    brightness = np.asarray(image).sum(2).astype(int)
    assert brightness[0, 15] == brightness.max() > brightness[15, 0]


def test_selective_channels_differ_in_place_not_in_level() -> None:
    masks = torch.full((2, 3, 5, 4, 4), 0.5)
    masks[:, 0, 1] = 1.0  # learner 1 has channel 1 open everywhere
    masks[:, 0, 3, :2] = 0.9  # learner 1 looks at the top in channel 3
    masks[:, 1, 3, 2:] = 0.9  # learner 2 at the bottom
    masks[:, 0, 4, 0, 0] = 0.6
    assert figures.selective_channels(masks, 2) == [3, 4]


def test_mask_pictures_differ_between_learners(page: str) -> None:
    masks = section(page, "masks")
    rows = [
        re.findall(r'src="(data:[^"]+)"', row)
        for row in re.findall(r"<tr.*?</tr>", masks, re.S)
        if "learner" in text(row)
    ]
    assert [len(row) for row in rows] == [6] * 4  # learners 1 and 2; means, then single channels
    for one, two in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert all(a != b for a, b in zip(one, two, strict=True))
    header, encoded = rows[0][0].split(",", 1)
    assert header == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (48, 48)  # the crop


def test_neighbours_are_those_of_brute_force(page: str, runs: dict[str, Path], data: Path) -> None:
    test = open_splits(configuration(data).data, "val").test
    files = [Path(test.describe(index)).name for index in range(len(test))]
    read = {run.path.name: run for run in read_runs(list(runs.values()))}
    spaces = {"raw pixels": read["pixels"].ensemble, "1-head16": read["head"].ensemble}
    spaces["ABE-216"] = read["abe"].embeddings.flatten(1)
    spaces |= {f"learner {m + 1} alone": read["abe"].embeddings[:, m] for m in range(2)}

    queries = re.findall(r'<article class="query">.*?</article>', section(page, "neighbours"), re.S)
    assert len(queries) == 6
    first_right = []
    for query in queries:
        (name,) = re.findall('alt="query (.*?)"', query)
        index = files.index(html.unescape(name))
        rankings = re.findall(r'<div class="ranking">.*?</ol>', query, re.S)
        assert len(rankings) == len(spaces)
        for ranking in rankings:
            (title,) = re.findall(r"<b>(.*?)</b>", ranking)
            space = spaces[text(title)].double().numpy()
            nearest = [i for i in np.argsort(-(space @ space[index])) if i != index][:5]
            shown = re.findall(
                r'<li class="(\w+)">.*?alt="(.*?)".*?aria-label="(\w+)"', ranking, re.S
            )
            assert [html.unescape(file) for _, file, _ in shown] == [files[i] for i in nearest]
            right = [test.labels[i] == test.labels[index] for i in nearest]
            assert [mark == "right" for mark, _, _ in shown] == right
            assert [said == "right" for _, _, said in shown] == right
            assert f"{sum(right)} of 5 right" in text(ranking)
            if text(title) == "ABE-216":
                first_right.append(right[0])
    assert first_right == [True] * 4 + [False] * 2


def test_page_is_self_contained_and_small(page: str) -> None:
    assert "://" not in page
    references = re.findall(r'(?:src|href)="(.*?)"', page)
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert "<script" not in page
    assert len(page) < 1_000_000


def test_page_escapes_what_users_name(page: str) -> None:
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert html.unescape(page.replace("<wbr>", "")).count(HOSTILE) > 0


def test_names_that_are_not_utf_8_are_shown_by_their_bytes(
    data: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    birds = copy(data, tmp_path / "birds")
    name, file = os.fsdecode(b"h_\xff"), os.fsdecode(b"g_0\xff.png")
    (birds / HOSTILE).rename(birds / name)
    (birds / "g" / "g_0.png").rename(birds / "g" / file)
    write_report([elsewhere(copy(runs["abe"], tmp_path / "run"), birds)], tmp_path / "report.html")
    assert r"h_\udcff" in (tmp_path / "report.html").read_text("utf-8").replace("<wbr>", "")


def test_fewer_queries_than_are_shown(data: Path, tmp_path: Path) -> None:
    """The smallest test is of two pairs."""
    learned = [f"{name}/{name}_{number}.png,{name},train" for name in "abcd" for number in (0, 1)]
    tested = [f"g/g_{number}.png,{name},test" for number, name in enumerate("xxyy")]
    file = copy(data, tmp_path / "birds") / "few.csv"
    file.write_text("\n".join(["path,label,split", *learned, *tested]))
    run = make_run(tmp_path / "run", configuration(file), 0.5)
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "of 4 queries" in text(page)
    right = round(4 * record(run)["scores"]["ensemble"]["recall@1"])
    queries = re.findall(r'alt="query (.*?)"', section(page, "neighbours"))
    assert len(set(queries)) == len(queries) == right + min(2, 4 - right)


def test_queries_without_a_match_are_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abe.report.html.have_match", lambda *labels: np.zeros(20, bool))
    with pytest.raises(InputError, match=r"none of the test images of \S+abe has another .*: put"):
        write_report([runs["abe"]], tmp_path / "report.html")


def test_details_list_digest_settings_and_updates(page: str, runs: dict[str, Path]) -> None:
    details = section(page, "details")
    assert record(runs["abe"])["config_digest"] in details
    rows = {row[0]: row[1:] for row in table(details) if row}
    assert rows["model.network"] == ["m-heads", "abe"]
    assert "train.lr" not in rows
    assert rows["layer_8"] == ["1.0e-04", "2.1e-03", "4.1e-03"]
    assert "layer_4" not in rows


def test_selection_decides_what_the_page_is_about(runs: dict[str, Path], tmp_path: Path) -> None:
    head = copy(runs["head"], tmp_path / "head")
    result = record(head) | {"selection_recall@1": 0.9}
    write_json(head / "result.json", result)
    write_report([runs["abe"], head], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert text(page[page.index("<h1>") :]).startswith("1-head16 finds")
    assert "Attention masks of ABE-2" in page
    assert "alone" not in section(page, "neighbours")


def test_runs_without_attention_have_no_masks(runs: dict[str, Path], tmp_path: Path) -> None:
    write_report([runs["head"]], tmp_path / "report.html")
    assert 'id="masks"' not in (tmp_path / "report.html").read_text()


def test_runs_of_one_method_are_told_apart(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    (abe,) = read_runs([runs["abe"]])
    assert abe.embeddings is not None
    config = configuration(data, "train.lr=0.5", "seed=7")
    folder = copy(runs["abe"], tmp_path / "b")
    other = write_scores(folder, config, abe.embeddings, Best(20, 0.5))
    labels = [run.label for run in read_runs([runs["abe"], other, runs["head"], other])]
    assert labels == ["ABE-2^16 (seed 0, lr 0.001)", "ABE-2^16 (seed 7, lr 0.5)", "1-head^16"]
    twin = copy(other, tmp_path / "c")
    assert str(twin) in read_runs([other, twin])[1].label


def test_skipped_files_and_test_set_selection_are_stamped(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = copy(runs["abe"], tmp_path / "run")
    result = record(run)
    result["data"]["skipped"] = 3
    result["protocol"] = "paper"
    write_json(run / "result.json", result)
    write_report([run, runs["head"]], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    rows = table(section(page, "results"))
    assert "3 files skipped" in rows[1][0]
    assert [row[-1] for row in rows] == ["Protocol", "paper", "val"]
    assert "The test images themselves picked the checkpoint" in page


def test_the_page_says_what_picked_the_checkpoint_of_both_protocols(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = copy(runs["abe"], tmp_path / "run")
    write_json(run / "result.json", record(run) | {"protocol": "both"})
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "the test images were scored all along, and picked nothing" in page
    assert "Recall@1 on held-out classes" in page


def not_a_folder(run: Path) -> list[Path]:
    return [run / "missing"]


def unfinished(run: Path) -> list[Path]:
    (run / "result.json").unlink()
    return [run]


def no_run(run: Path) -> list[Path]:
    (run / "result.json").unlink()
    (run / "config.json").unlink()
    return [run]


def no_config(run: Path) -> list[Path]:
    (run / "config.json").unlink()
    return [run]


def unknown_setting(run: Path) -> list[Path]:
    write_json(run / "config.json", {"sed": 1})
    return [run]


def damaged_result(run: Path) -> list[Path]:
    (run / "result.json").write_text('{"method": ')
    return [run]


def foreign_result(run: Path) -> list[Path]:
    write_json(run / "result.json", {"selected_step": 1})
    return [run]


def no_embeddings(run: Path) -> list[Path]:
    (run / "embeddings.safetensors").unlink()
    return [run]


def damaged_embeddings(run: Path) -> list[Path]:
    (run / "embeddings.safetensors").write_bytes(b"cut")
    return [run]


def foreign_embeddings(run: Path) -> list[Path]:
    result = record(run)
    write_result(run, result, torch.zeros(7, 2, 8))
    return [run]


def no_checkpoint(run: Path) -> list[Path]:
    shutil.rmtree(run / "checkpoints")
    return [run]


def moved_images(run: Path) -> list[Path]:
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] += "-moved"
    write_json(run / "config.json", config)
    return [run]


def fewer_images(run: Path) -> list[Path]:
    birds = copied_images(run)
    (birds / "g" / "g_0.png").unlink()
    return [run]


def renamed_image(run: Path) -> list[Path]:
    birds = copied_images(run)
    (birds / "g" / "g_0.png").rename(birds / "g" / "g_00.png")
    return [run]


def copied_images(run: Path) -> Path:
    digest = record(run)["images_digest"]
    config = json.loads((run / "config.json").read_text())
    birds = copy(Path(config["data"]["source"]), run / "birds")
    elsewhere(run, birds)
    write_json(run / "result.json", record(run) | {"images_digest": digest})
    return birds


def other_classes(run: Path) -> list[Path]:
    result = record(run)
    result["scores"]["ensemble"]["recall@1"] /= 2
    write_json(run / "result.json", result)
    return [run]


def other_data(run: Path) -> list[Path]:
    other = copy(run, run / "other")
    result = record(other)
    result["data"]["name"] = "fish"
    write_json(other / "result.json", result)
    return [run, other]


def other_images_of_that_name(run: Path) -> list[Path]:
    """A run whose record knows no images stands between two that do."""
    older, other = copy(run, run / "older"), copy(run, run / "other")
    write_json(older / "result.json", record(run) | {"images_digest": None})
    write_json(other / "result.json", record(run) | {"images_digest": "0123456789ab"})
    return [older, run, other]


def only_baselines(run: Path) -> list[Path]:
    write_json(run / "result.json", record(run) | {"selected_step": None})
    return [run]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_a_folder, r"missing is not a folder: give"),
        (unfinished, r"run is not finished: go on with `abe train --resume \S+run`"),
        (no_run, r"run has no result.json: give"),
        (no_config, r"config.json cannot be read"),
        (unknown_setting, r"config.json: there is no setting 'sed'"),
        (damaged_result, r"result.json cannot be read"),
        (foreign_result, r"result.json is not what this version of abe writes .*: train"),
        (no_embeddings, r"embeddings.safetensors cannot be read .*: train"),
        (damaged_embeddings, r"embeddings.safetensors cannot be read .*: train"),
        (foreign_embeddings, r"embeddings.safetensors holds \(7, 2, 8\), .* 20 test images"),
        (no_checkpoint, r"run has no checkpoints: give the folder of a run"),
        (
            moved_images,
            r"the images of \S+run cannot be opened: .*birds-moved.* data.source in \S+",
        ),
        (fewer_images, r"tested on 20 images, \S+birds has 19 now: put"),
        (renamed_image, r"images or classes of \S+birds were .* renamed since \S+run .*: put"),
        (other_classes, r"run has Recall@1 0\.\d+, by the classes .* put the images back"),
        (other_data, r"run was tested on .*birds .* on fish .*: write a report of each"),
        (
            other_images_of_that_name,
            r"images of \S+run and \S+other are not the same, although both are called birds: wr",
        ),
        (only_baselines, r"at least one trained run"),
    ],
)
def test_what_cannot_be_reported_on(
    damage, message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    paths = damage(copy(runs["abe"], tmp_path / "run"))
    with pytest.raises(InputError, match=message):
        write_report(paths, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_output_that_cannot_be_written(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path} cannot be written: "):
        write_report([runs["head"]], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_in_a_browser(page_file: Path, width: int, scheme: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: neither chromium nor google-chrome is installed")
    complaints: list[str] = []
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "request",
            lambda request: (
                complaints.append(request.url)
                if not request.url.startswith(("data:", "file:"))
                else None
            ),
        )
        tab.goto(page_file.as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        screenshot = tab.screenshot(full_page=True)
        scroll_width = tab.evaluate("document.documentElement.scrollWidth")
        broken = tab.evaluate("[...document.images].filter(each => !each.naturalWidth).length")
        cut = tab.evaluate(
            """[...document.querySelectorAll('h1, h2, p, .plot i, figcaption')].filter(each =>
            each.getBoundingClientRect().right > innerWidth ||
            each.getBoundingClientRect().left < 0).length"""
        )
        contrast = tab.evaluate(CONTRASTS)
        browser.close()
    assert complaints == []
    assert scroll_width <= width
    assert (broken, cut) == (0, 0)
    assert min(contrast.values()) >= 4.5, contrast
    corner = Image.open(io.BytesIO(screenshot)).convert("L").getpixel((2, 2))
    assert (corner > 128) == (scheme == "light")


# WCAG's contrast of text colours with the page.
CONTRASTS = """() => {
  const probe = document.body.appendChild(document.createElement("i"));
  const luminance = name => {
    probe.style.color = `var(${name})`;
    const channels = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const [r, g, b] = channels.map(c => c / 255).map(
      c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = luminance("--page");
  return Object.fromEntries(["--ink", "--soft", "--accent", "--wrong"].map(name => {
    const [low, high] = [luminance(name), page].sort((a, b) => a - b);
    return [name, (high + 0.05) / (low + 0.05)];
  }));
}"""
