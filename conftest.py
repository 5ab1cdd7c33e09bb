"""Shared by all tests: a small prepared folder, whose text is this project's own code."""
import json
import os
import re
import socket
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:         # several at once: a thread each, or they wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from prepare_pile import prepare  # noqa: E402
from tokenizer import train_tokenizer  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Tests reach this machine alone."""
    connect = socket.socket.connect

    def local(self, address):
        assert self.family not in (socket.AF_INET, socket.AF_INET6) or address[0] in ("127.0.0.1", "::1", "localhost"), address
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Prepared shards of about 20,000 tokens with a vocabulary of 300."""
    folder = tmp_path_factory.mktemp("data")
    code = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("leviathan.py", "prepare_pile.py"))
    texts = re.split(r"(?<=\n)(?=def |class |    def )", code)
    (folder / "code.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    prepare([folder / "code.jsonl"], folder / "shards", train_tokenizer(iter(texts), 300, "tiny"), holdout=5)
    return folder / "shards"
