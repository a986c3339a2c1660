"""`abe data get`: fetched from a server of the test's own, unpacked, and nothing outside."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import stat
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from abe.data import benchmarks
from abe.data.benchmarks import BENCHMARKS, Benchmark, Count
from abe.data.download import get, unpack
from abe.download import RemoteFile, fetch, waiting_for
from abe.errors import InputError, TakenError
from abe.files import locked


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG")
    return buffer.getvalue()


HEAD = "image_id class_id super_class_id path\n"
CONTENT = {
    "Stanford_Online_Products/Ebay_train.txt": f"{HEAD}1 1 1 mug final/1.JPG\n".encode(),
    "Stanford_Online_Products/Ebay_test.txt": f"{HEAD}2 2 1 mug final/2.JPG\n".encode(),
    "Stanford_Online_Products/mug final/1.JPG": jpeg(),
    "Stanford_Online_Products/mug final/2.JPG": jpeg(),
}


def zipped(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, content: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name) if isinstance(data, bytes) else data
            if isinstance(data, bytes):
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path


def tree(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(params=[zipped, tarred], ids=["zip", "tgz"])
def products(request, server, monkeypatch) -> Benchmark:
    """A benchmark of 2 images that is fetched from `server`."""
    name = "products.zip" if request.param is zipped else "products.tgz"
    archive = request.param(server.folder / name, CONTENT)
    checksum = f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}"
    file = RemoteFile(name, f"{server.url}/{name}", archive.stat().st_size, checksum)
    counts = {"train": Count(1, 1), "test": Count(1, 1)}
    benchmark = replace(BENCHMARKS["sop"], counts=counts, files=(file,))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "sop", benchmark)
    return benchmark


def test_get_fetches_unpacks_and_checks(products, server, tmp_path):
    root = tmp_path / "new" / "root"
    copy = get("sop", root)
    assert copy.complete
    [file] = products.files
    assert tree(root) == {file.name: (root / file.name).read_bytes(), **CONTENT}
    shutil.rmtree(server.folder)  # a complete copy is left alone
    assert get("sop", root).complete


def test_get_goes_on_with_a_download_that_broke_off(products, server, tmp_path):
    [file] = products.files
    root = tmp_path / "root"
    server.cut = file.size // 2
    with pytest.raises(InputError, match=r"bytes too early.*Run the same again to continue it"):
        get("sop", root)
    whole = (server.folder / file.name).read_bytes()
    assert tree(root) == {
        f"{file.name}.part": whole[: server.cut],
        f".{file.name}.lock": b"",
    }

    rest = f"bytes={server.cut}-"
    server.cut = None
    assert get("sop", root).complete
    assert server.requested == [None, rest]
    assert tree(root) == {file.name: whole, **CONTENT}


def test_of_several_processes_one_fetches(tmp_path, monkeypatch, capsys):
    """The others wait for it, and take what it has fetched."""
    monkeypatch.setattr("abe.download.WAIT_SECONDS", 0.01)
    file = RemoteFile("weights.bin", "http://127.0.0.1:9/none", None, None)
    path = tmp_path / file.name
    with ThreadPoolExecutor() as pool:
        with locked(tmp_path / ".weights.bin.lock", "taken"):
            waiting = pool.submit(fetch, file, tmp_path, "fetch it by hand")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
            assert capsys.readouterr().err.count("by another process: waiting for it") == 1
            path.write_bytes(b"fetched")
        assert waiting.result(timeout=60) == path
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_a_lock_that_was_removed_keeps_nobody_out(tmp_path, monkeypatch):
    """Who had opened it before that would share the file with nobody: it looks again."""
    lock, opened = tmp_path / ".weights.bin.lock", Path.open
    removed = []

    def open_then_lose(path, *args, **options):
        file = opened(path, *args, **options)
        if path == lock and not removed:
            removed.append(lock.unlink())
        return file

    monkeypatch.setattr(Path, "open", open_then_lose)
    with waiting_for(tmp_path / "weights.bin"):
        assert lock.exists()
        with pytest.raises(TakenError), locked(lock, "taken"):
            pass
    assert removed == [None]


def test_get_goes_on_with_an_unpacking_that_stopped(products, server, tmp_path):
    [file] = products.files
    shutil.copy(server.folder / file.name, tmp_path)  # put there by hand
    shutil.rmtree(server.folder)
    image = tmp_path / "Stanford_Online_Products" / "mug final" / "1.JPG"
    image.parent.mkdir(parents=True)
    image.with_name("1.JPG.part").write_bytes(b"half")
    assert get("sop", tmp_path).complete
    assert image.read_bytes() == jpeg()
    assert os.listdir(image.parent).count("1.JPG.part") == 0


def test_a_file_put_there_by_hand_is_verified(products, tmp_path):
    [file] = products.files
    (tmp_path / file.name).write_bytes(b"something else")
    with pytest.raises(InputError, match=r"has the sha256 .* instead of .*, remove it"):
        get("sop", tmp_path)
    assert not (tmp_path / "Stanford_Online_Products").exists()


def test_what_is_published_is_not_the_whole(server, tmp_path, monkeypatch):
    zipped(server.folder / "products.zip", dict(list(CONTENT.items())[:3]))
    file = RemoteFile("products.zip", f"{server.url}/products.zip", None, None)
    counts = {"train": Count(1, 1), "test": Count(1, 1)}
    benchmark = replace(BENCHMARKS["sop"], counts=counts, files=(file,))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "sop", benchmark)
    with pytest.raises(InputError, match=r"missing files: 1 of 2: mug final/2\.JPG"):
        get("sop", tmp_path / "root")


def test_without_network_it_says_where_to_put_the_file(products, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/products.zip"
    [file] = products.files
    away = replace(products, files=(replace(file, url=url),))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "sop", away)
    with pytest.raises(InputError) as error:
        get("sop", tmp_path / "root")
    for part in (
        "failed (",
        f"put {file.name} ({url}, {file.size:,} bytes, {file.checksum}) into {tmp_path / 'root'}",
        f"run `abe data get sop --root {tmp_path / 'root'}` again",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cars196", r"car_ims\.tgz \(1,956,628,579 bytes, md5:d5c8f0aa.*cars_annos\.mat"),
        ("inshop", r"put img\.zip and list_eval_partition\.txt into .*InShopRetrieval\.html"),
        (
            "cub200-2010",
            "put it into .* by hand, as https://www.vision.caltech.edu/datasets/ has it",
        ),
        ("cub2000", "did you mean 'cub200'"),
    ],
)
def test_what_has_no_address(name, says, tmp_path):
    with pytest.raises(InputError, match=says):
        get(name, tmp_path)
    assert not os.listdir(tmp_path)


def test_no_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=6_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"sop needs about 6\.2 GB in .*, where 6\.0 GB are free"):
        get("sop", tmp_path / "new")


def test_room_is_needed_for_what_is_not_there_yet(products, server, tmp_path, monkeypatch):
    """Twice the archive, less what was fetched, and then less what was unpacked of it."""
    [file] = products.files
    part = tmp_path / f"{file.name}.part"
    part.write_bytes((server.folder / file.name).read_bytes()[:100])
    usage = shutil.disk_usage(tmp_path)

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=count))

    free(2 * file.size - 101)
    with pytest.raises(InputError, match="sop needs about"):
        get("sop", tmp_path)
    free(2 * file.size - 100)
    assert get("sop", tmp_path).complete
    assert server.requested == ["bytes=100-"]

    image = tmp_path / "Stanford_Online_Products" / "mug final" / "2.JPG"
    image.unlink()
    free(file.size - len(jpeg()) - 1)
    with pytest.raises(InputError, match="sop needs about"):
        get("sop", tmp_path)
    free(file.size - len(jpeg()))
    assert get("sop", tmp_path).complete


def test_every_file_of_the_table():
    documented = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    for benchmark in BENCHMARKS.values():
        assert f"`{benchmark.name}`" in documented
        assert benchmark.homepage.startswith("https://")
        for file in benchmark.files:
            assert file.url is None or file.url.endswith(f"/{file.name}")
            assert file.url is None or file.checksum
            assert (file.size is None) == (file.checksum is None)
            if file.checksum:
                algorithm, _, digest = file.checksum.partition(":")
                assert len(digest) == hashlib.new(algorithm).digest_size * 2
                assert file.name in documented
                assert f"{file.size:,}" in documented
                assert digest in documented


# --- Archives that mean harm -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../out.txt", "/{outside}/out.txt", "a/../../out.txt", "link/out", ".", "a/..", "loop/../.."],
)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_no_file_lands_outside(pack, name, tmp_path):
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    name = name.replace("/{outside}", str(outside))
    archive = pack(tmp_path / f"evil.{'zip' if pack is zipped else 'tgz'}", {name: b"evil"})
    with pytest.raises(InputError, match="would land outside"):
        unpack(archive, inside)
    assert tree(inside) == {} == tree(outside)
    assert sorted(tmp_path.iterdir()) == sorted([*before, archive])


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_link_in_place_of_the_part_is_not_written_through(pack, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "x.jpg.part").symlink_to("../victim")
    archive = pack(tmp_path / f"fine.{'zip' if pack is zipped else 'tgz'}", {"x.jpg": b"picture"})
    unpack(archive, inside)
    assert victim.read_bytes() == b"precious"
    assert tree(inside) == {"x.jpg": b"picture"}


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_links_that_lead_to_themselves(pack, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "loop").symlink_to("loop")
    suffix = "zip" if pack is zipped else "tgz"
    archive = pack(tmp_path / f"within.{suffix}", {"loop/x.jpg": b"picture"})
    with pytest.raises(InputError, match=rf"cannot be unpacked in {inside}: .*{inside / 'loop'}"):
        unpack(archive, inside)
    unpack(pack(tmp_path / f"instead.{suffix}", {"loop": b"picture"}), inside)
    assert tree(inside) == {"loop": b"picture"}


def test_names_that_no_file_can_have(tmp_path):
    name = tarfile.TarInfo("x")
    name.pax_headers = {"path": "a\0b"}
    with pytest.raises(InputError, match=r"names\.tgz is damaged \(embedded null byte\)"):
        unpack(tarred(tmp_path / "names.tgz", {"x": name}), tmp_path / "root")

    archive = zipped(tmp_path / "names.zip", {"ä": b"content"})
    archive.write_bytes(archive.read_bytes().replace("ä".encode(), b"\xff\xff"))
    with pytest.raises(InputError, match=r"names\.zip is damaged \('utf-8' codec can't decode"):
        unpack(archive, tmp_path / "root")


def test_links_and_devices_are_left_out(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    entries: dict[str, bytes | tarfile.TarInfo] = {}
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        entries[f"kind {kind!r}"] = info = tarfile.TarInfo(f"kind {kind!r}")
        info.type, info.linkname = kind, "../secret"
    inside = tmp_path / "tgz"
    unpack(tarred(tmp_path / "links.tgz", entries | {"a/file": b"content"}), inside)
    assert tree(inside) == {"a/file": b"content"}
    assert os.listdir(inside) == ["a"]

    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr(link, "../secret")
        archive.writestr("folder/", "")
        archive.writestr("a/file", "content")
    unpack(tmp_path / "links.zip", tmp_path / "zip")
    assert tree(tmp_path / "zip") == {"a/file": b"content"}
    assert os.listdir(tmp_path / "zip") == ["a"]


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_damaged_archives(pack, tmp_path):
    suffix = "zip" if pack is zipped else "tgz"
    archive = pack(tmp_path / f"damaged.{suffix}", {"a": os.urandom(5000), "b": os.urandom(5000)})
    content = archive.read_bytes()

    def flipped(place: int) -> bytes:
        changed = bytearray(content)
        changed[place] ^= 1
        return bytes(changed)

    trailer = [flipped(-6)] * (pack is tarred)  # where gzip has its checksum
    for damaged in (b"", b"<html>", content[:6000], content[:-4], flipped(3000), *trailer):
        archive.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"damaged\.{suffix} is damaged \(.*fetch it again"):
            unpack(archive, tmp_path / "root")
    archive.write_bytes(content)
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "root" / "a" / "x").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot be unpacked in .*directory"):
        unpack(archive, tmp_path / "root")


def test_a_damaged_archive_of_another_compression(tmp_path):
    archive = tmp_path / "lzma.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a", bytes(range(256)) * 20)
    content = bytearray(archive.read_bytes())
    content[60] ^= 255
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"lzma\.zip is damaged \(Corrupt input data\)"):
        unpack(archive, tmp_path / "root")


def test_an_archive_with_a_password(tmp_path):
    """As img_highres.zip has."""
    archive = zipped(tmp_path / "locked.zip", {"a": b"content"})
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"password required .*: unpack it by hand in"):
        unpack(archive, tmp_path / "root")
