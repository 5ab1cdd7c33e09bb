"""Shared by all tests: a small prepared folder, made of the project's own code, and small checkpoints."""
import json
import os
import re
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:         # several at once: a thread each, or they wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from budgets import ROOT, pytest_terminal_summary  # noqa: E402, F401
from leviathan import Config, LanguageModel  # noqa: E402
from prepare_pile import prepare, read_meta  # noqa: E402

if sys.version_info >= (3, 14):
    from compression import zstd  # noqa: F401
else:
    from backports import zstd  # noqa: F401



@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Tests reach this machine alone."""
    connect = socket.socket.connect

    def local(self, address):
        inet = self.family in (socket.AF_INET, socket.AF_INET6)
        assert not inet or address[0] in ("127.0.0.1", "::1", "localhost"), address
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Prepared shards of about 20,000 tokens, vocabulary 300, in two domains named after their files."""
    folder = tmp_path_factory.mktemp("data")
    with open(folder / "code.jsonl", "w", encoding="utf-8") as file:
        for name in ("leviathan.py", "sample.py"):
            text = (ROOT / name).read_text(encoding="utf-8")
            for part in re.split(r"(?<=\n)(?=def |class |    def )", text):
                print(json.dumps(dict(text=part, meta=dict(pile_set_name=name))), file=file)
    prepare([folder / "code.jsonl"], folder / "shards", vocab_size=300, holdout=5)
    return folder / "shards"


@pytest.fixture(scope="session")
def saved(tiny_data):
    """saved(config, folder): a model's start, as train.py writes it, in folder/step-00000002. -> the model"""
    def saved(config: Config, folder, data=tiny_data, step: int = 2, seed: int = 0) -> LanguageModel:
        model, path = LanguageModel(config, seed), Path(folder) / f"step-{step:08d}"
        path.mkdir(parents=True)
        about = dict(step=step, config=asdict(config), training=dict(data=str(data), seed=seed))
        (path / "config.json").write_text(json.dumps(about), encoding="utf-8")
        (path / "tokenizer.json").write_text(json.dumps(read_meta(data)["tokenizer"]), encoding="utf-8")
        torch.save(model.state_dict(), path / "model.pt")
        return model
    return saved
