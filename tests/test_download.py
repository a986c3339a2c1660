"""`abe data get`: fetched from a server of the test's own, unpacked, and nothing outside."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import shutil
import socket
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from abe.data import benchmarks
from abe.data.benchmarks import BENCHMARKS, Benchmark, Count
from abe.data.download import get, unpack
from abe.download import RemoteFile
from abe.errors import InputError


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def published(tmp_path, monkeypatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address that it is served at."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "published"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


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
def products(request, published, monkeypatch) -> Benchmark:
    """A benchmark of 2 images that is fetched from `published`."""
    folder, url = published
    name = "products.zip" if request.param is zipped else "products.tgz"
    archive = request.param(folder / name, CONTENT)
    checksum = f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}"
    file = RemoteFile(name, f"{url}/{name}", archive.stat().st_size, checksum)
    counts = {"train": Count(1, 1), "test": Count(1, 1)}
    benchmark = replace(BENCHMARKS["sop"], counts=counts, files=(file,))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "sop", benchmark)
    return benchmark


def test_get_fetches_unpacks_and_checks(products, published, tmp_path):
    root = tmp_path / "new" / "root"
    copy = get("sop", root)
    assert copy.complete
    [file] = products.files
    assert tree(root) == {file.name: (root / file.name).read_bytes(), **CONTENT}
    shutil.rmtree(published[0])  # a complete copy is left alone
    assert get("sop", root).complete


def test_get_goes_on_with_an_unpacking_that_stopped(products, published, tmp_path):
    [file] = products.files
    shutil.copy(published[0] / file.name, tmp_path)  # put there by hand
    shutil.rmtree(published[0])
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


def test_what_is_published_is_not_the_whole(published, tmp_path, monkeypatch):
    folder, url = published
    zipped(folder / "products.zip", dict(list(CONTENT.items())[:3]))
    file = RemoteFile("products.zip", f"{url}/products.zip", None, None)
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
        ("cub200-2010", "not published as a file: there is nothing to fetch"),
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
    "name", ["../out.txt", "/{outside}/out.txt", "a/../../out.txt", "link/out"]
)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_no_file_lands_outside(pack, name, tmp_path):
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    name = name.replace("/{outside}", str(outside))
    archive = pack(tmp_path / f"evil.{'zip' if pack is zipped else 'tgz'}", {name: b"evil"})
    with pytest.raises(InputError, match="would land outside"):
        unpack(archive, inside)
    assert tree(inside) == {} == tree(outside)
    assert not (tmp_path / "out.txt").exists()


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
    changed = content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]
    for damaged in (b"", b"<html>", content[:6000], *([changed] * (pack is zipped))):
        archive.write_bytes(damaged)
        with pytest.raises(InputError, match=f"damaged.{suffix} "):
            unpack(archive, tmp_path / "root")
    archive.write_bytes(content)
    (tmp_path / "root" / "a").unlink(missing_ok=True)
    (tmp_path / "root" / "a" / "x").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot be unpacked in .*directory"):
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
