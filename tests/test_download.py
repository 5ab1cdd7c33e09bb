"""--pile against a server on loopback that speaks the Hugging Face Hub's protocol, with faults in between."""
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from budgets import ROOT
from conftest import zstd
from prepare_pile import PILE, read_meta, verify

pytest.importorskip("huggingface_hub")


def shard(seed: int) -> bytes:
    rng = random.Random(seed)
    lines = [json.dumps({"text": rng.randbytes(2_000).hex(), "meta": {"pile_set_name": rng.choice("AB")}})
             for _ in range(600)]
    filling = rng.randbytes(12_000_000)     # a frame that zstd skips: huggingface_hub writes parts of 10 MB
    return (zstd.compress("\n".join(lines[:300]).encode())
            + struct.pack("<II", 0x184D2A50, len(filling)) + filling
            + zstd.compress(("\n" + "\n".join(lines[300:])).encode()))


class Hub(BaseHTTPRequestHandler):
    """What `hf_hub_download` asks of the Hub: metadata in a HEAD's headers, bytes by GET, a part by Range."""
    protocol_version = "HTTP/1.1"
    files = {"train/00.jsonl.zst": shard(0), "val.jsonl.zst": shard(1)}

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        name = self.path.partition(f"/datasets/{PILE['repo_id']}/resolve/{PILE['revision']}/")[2]
        content, server = self.files.get(name), self.server
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        server.asked.append((self.command, name, first))
        status = 404 if content is None else server.broken or (206 if first else 200)
        content = (content or b"") if status < 400 else b""
        self.send_response(status)
        for key, value in (("ETag", f'"{hashlib.sha256(content).hexdigest()}"'),
                           ("X-Repo-Commit", PILE["revision"]),
                           ("Content-Length", len(content) - first), ("Accept-Ranges", "bytes"),
                           *([("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")]
                             if first else [])):
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            cut = server.faults.pop(name, None)         # once: the connection ends in the middle
            self.wfile.write(content[first:cut])
            if cut:
                self.close_connection = True
                self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.faults, server.broken = [], {}, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def prepare_pile(hub, folder: Path, *arguments):
    """The script, with a tokenizer that needs no download."""
    environment = os.environ | dict(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
                                    HF_HOME=str(folder / "cache"), NO_PROXY="*",
                                    HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
                                    PYTHONPATH=str(ROOT))
    code = ("import sys, prepare_pile as p\n"
            "p.get_encoding = lambda name: p.train_tokenizer(iter([name]), 257, 'bytes')\n"
            "try:\n    p.main()\nexcept ValueError as error:\n    sys.exit(f'prepare_pile.py: {error}')")
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True,
                          timeout=120)


def test_a_download_goes_on_where_the_connection_broke(tmp_path, hub):
    name, half = "train/00.jsonl.zst", 11_000_000
    hub.faults[name] = half
    done = prepare_pile(hub, tmp_path, "--pile", "0", "--threads", "1")
    assert done.returncode == 0, done.stderr
    resumed = [first for command, asked, first in hub.asked if (command, asked) == ("GET", name)]
    assert resumed[0] == 0 and 0 < resumed[1] <= half
    meta = verify(tmp_path / "data/pile")
    assert meta["request"]["sources"] == [
        [Path(name).name, hashlib.sha256(Hub.files[name]).hexdigest()]
        for name in ("val.jsonl.zst", "train/00.jsonl.zst")]
    assert meta["train"]["documents"] == meta["val"]["documents"] == 600
    assert set(meta["train"]["domains"]) == {"A", "B"}

    hub.asked.clear()           # what is in the cache is not asked for again
    assert prepare_pile(hub, tmp_path, "--pile", "0", "--threads", "2", "--out", "again").returncode == 0
    assert not [command for command, *_ in hub.asked
                if command == "GET"] and read_meta(tmp_path / "again") == meta


@pytest.mark.parametrize("pile, broken", [("0", 403), ("1", 0)])        # no access; no such file there
def test_what_cannot_be_downloaded(tmp_path, hub, pile, broken):
    hub.broken = broken
    done = prepare_pile(hub, tmp_path, "--pile", pile)
    name, last = "val" if broken else f"train/0{pile}", done.stderr.splitlines()[-1]
    assert last.startswith(f"prepare_pile.py: could not download {name}.jsonl.zst of monology/pile-")
    assert last.endswith("try again, what has come is kept") and "Traceback" not in done.stderr
    assert done.returncode == 1 and not (tmp_path / "data").exists()


def test_without_huggingface_hub(tmp_path, hub):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError")
    done = prepare_pile(hub, tmp_path, "--pile", "0")
    expected = "prepare_pile.py: --pile needs huggingface_hub: pip install huggingface_hub"
    assert done.returncode == 1 and done.stderr.splitlines() == [expected]


@pytest.mark.parametrize("pile", ["30", "x", "-1"])
def test_names_of_pile_shards(tmp_path, hub, pile):
    done = prepare_pile(hub, tmp_path, f"--pile={pile}")
    assert done.returncode == 2 and "argument --pile: invalid" in done.stderr and not hub.asked
