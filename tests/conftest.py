"""Where each test starts from, and which ones this machine cannot run."""

import http.server
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# One thread, for the commands that tests start too: sums of several may round otherwise, and
# pytest-xdist has a process for each processor.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Whichever test forks a process first starts the server that all of them are forked from.
multiprocessing.set_forkserver_preload(
    ["abe.train", "abe.data.prepare", "lightning_fabric", "sklearn.cluster", "pyarrow.parquet"]
)

settings.register_profile("abe", deadline=None, derandomize=True)
settings.load_profile("abe")


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder, or their ends.

    Attributes:
        cut: after how many bytes connections are closed; None: when all is sent.
        ranges: whether it can send the end of a file.
        requested: Range headers of the requests so far.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cut: int | None = None
        self.ranges = True
        self.requested: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.requested.append(asked)
        path = self.server.folder / self.path[1:]
        if not path.exists():
            self.send_error(404)
            return
        content = path.read_bytes()
        if self.server.ranges and asked:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            content = content[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A server of this machine's own, of an empty folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(tmp_path_factory.mktemp("published")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def fast_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AMX, and as on one without it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": request.param})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For runs that must round alike: no library promises that of threads, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and there is none")
    if item.get_closest_marker("real_data"):
        root = os.environ.get("ABE_DATA_ROOT")
        if root is None:
            pytest.skip("needs real photographs: set ABE_DATA_ROOT to their folder")
        if not Path(root).is_dir():
            pytest.skip(f"needs real photographs: ABE_DATA_ROOT={root} is not a folder")
