"""Downloads of data sets, from a server here: broken off, gone on with, and verified.

python -m pytest tests/test_download.py
"""

import contextlib
import functools
import hashlib
import http.server
import subprocess
import sys
import threading
from pathlib import Path

from tests.preparing import environment


class Server(http.server.BaseHTTPRequestHandler):
    """Serves self.content, from the byte asked for if ranges is set, and breaks off after limit bytes."""

    content = bytes(range(256)) * 4000
    ranges = True
    limit = 10**9
    asked: list[str]

    def do_GET(self):
        wanted = self.headers.get("Range", "")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start : start + self.limit])

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(**attributes):
    asked: list[str] = []
    handler = type("Handler", (Server,), {"asked": asked, **attributes})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file", asked
        server.shutdown()


def download(repo: Path, url: str, path: Path, content: bytes = Server.content) -> subprocess.CompletedProcess:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'data'); import prepare_tools as tools;"
        "tools.run(lambda: tools.download(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, url, str(path), hashlib.sha256(content).hexdigest()]
    env = environment(repo, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    return subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=60)


def test_download_goes_on_where_it_broke_off(repo, tmp_path):
    path, part = tmp_path / "file", tmp_path / "file.part"
    with serving(limit=300_000) as (url, asked):
        assert download(repo, url, path).returncode == 2
        have = part.stat().st_size
        assert 0 < have <= 300_000
        assert not path.exists()
    with serving() as (url, asked):
        assert download(repo, url, path).returncode == 0
        assert asked == [f"bytes={have}-"]
    assert path.read_bytes() == Server.content
    assert not part.exists()


def test_download_starts_again_where_the_server_cannot_go_on(repo, tmp_path):
    (tmp_path / "file.part").write_bytes(b"begun")
    with serving(ranges=False) as (url, _):
        assert download(repo, url, tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == Server.content


def test_download_killed_after_its_last_byte_is_only_verified(repo, tmp_path):
    (tmp_path / "file.part").write_bytes(Server.content)
    with serving() as (url, _):
        assert download(repo, url, tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == Server.content


def test_download_of_another_file_is_refused(repo, tmp_path):
    with serving() as (url, _):
        done = download(repo, url, tmp_path / "file", content=b"what we expect")
    assert done.returncode == 2
    assert "sha256 differs" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("file*"))
