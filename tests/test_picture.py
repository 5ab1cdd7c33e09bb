"""picture.py, on models that have learned nothing."""
import json
import sys
from pathlib import Path

import pytest
import torch

import leviathan
import picture
from checkpoints import save_checkpoint
from common import InputError, read_json
from leviathan import Config, LanguageModel
from prepare_pile import prepare
from tokenizer import train_tokenizer

SHAPE = dict(vocab_size=1_000, seq_len=32, d_model=32, n_layers=1, n_heads=2, d_seed=64, mode_width=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """This project's method, in tokens some of which are words."""
    folder = tmp_path_factory.mktemp("data")
    text = Path(leviathan.__file__).read_text(encoding="utf-8")
    (folder / "code.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in text.split("\n\n")), encoding="utf-8")
    prepare([folder / "code.jsonl"], folder / "shards", train_tokenizer(iter([text]), 1_000, "code"))
    return folder / "shards"


@pytest.fixture
def run(data, tmp_path):
    """A checkpoint of a model with these fields. -> its folder"""
    def run(name, **fields):
        (tmp_path / name).mkdir()
        model, tokenizer = LanguageModel(Config(**SHAPE | fields)), read_json(data / "meta.json")["tokenizer"]
        save_checkpoint(tmp_path / name, 1, model, torch.optim.AdamW(model.parameters()),
                        dict(config=vars(model.config), training=dict(data=str(data))), tokenizer, 1)
        return str(tmp_path / name)
    return run


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["picture.py", *map(str, arguments)])
    picture.main()


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_picture(run, tmp_path, monkeypatch, generator):
    call(monkeypatch, run("ours", generator=generator), "--twin", run("twin", model="dense"), "--out", tmp_path / "both.png")
    call(monkeypatch, tmp_path / "ours", "--out", tmp_path / "alone.png")
    assert (tmp_path / "both.png").stat().st_size > (tmp_path / "alone.png").stat().st_size > 50_000
    with pytest.raises(InputError, match="both.png exists: name a new file with --out"):
        call(monkeypatch, tmp_path / "ours", "--out", tmp_path / "both.png")


def test_bad_input(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is dense, which has no generator: name it with --twin"):
        call(monkeypatch, run("twin", model="dense"), "--out", tmp_path / "a.png")
    monkeypatch.setattr(picture, "ANCHORS", 301)
    with pytest.raises(InputError, match="the tokenizer has only .* words among its tokens"):
        call(monkeypatch, run("ours"), "--out", tmp_path / "a.png")
    about = read_json(tmp_path / "ours/step-00000001/config.json")
    about["training"]["data"] = str(tmp_path / "gone")
    (tmp_path / "ours/step-00000001/config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="counts.npy is missing, damaged"):
        call(monkeypatch, tmp_path / "ours", "--out", tmp_path / "a.png")
