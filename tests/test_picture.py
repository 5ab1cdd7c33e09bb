"""lab.picture, on models that have learned nothing."""
import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import lab.generators  # noqa: F401
import leviathan
from lab import evaluate, picture
from leviathan import Config
from prepare_pile import prepare, read_meta

TINY = dict(vocab_size=1_000, seq_len=32, d_model=32, n_layers=1, n_heads=2, d_seed=64, mode_width=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """This project's method, in tokens some of which are words."""
    folder = tmp_path_factory.mktemp("words")
    parts = Path(leviathan.__file__).read_text(encoding="utf-8").split("\n\n")
    for name, own in ("val.jsonl", parts[:3]), ("train.jsonl", parts[3:]):
        (folder / name).write_text("\n".join(json.dumps(dict(text=part)) for part in own))
    prepare([folder / "train.jsonl"], folder / "data", val_files=[folder / "val.jsonl"], vocab_size=1_000)
    return folder / "data"


@pytest.fixture
def run(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lab.picture", *map(str, arguments)])
        picture.main()
    return run


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_picture(run, saved, data, tmp_path, generator, monkeypatch):
    monkeypatch.setattr(picture, "SHOWN", 50)
    saved(Config(**TINY, generator=generator), tmp_path / "ours", data)
    saved(Config(**TINY, model="dense"), tmp_path / "twin", data)
    run(tmp_path / "ours", "--twin", tmp_path / "twin", "--out", tmp_path / "both.png")
    run(tmp_path / "ours", "--out", tmp_path / "alone.png")
    both, alone = (matplotlib.image.imread(tmp_path / name)[..., :3] for name in ("both.png", "alone.png"))
    assert both.shape == alone.shape == (1_170, 1_690, 3)
    upper, right = slice(0, 430), slice(900, None)
    assert (both[upper] == alone[upper]).all() and (both[500:, right] != alone[500:, right]).any()
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "twin", "both.png", "alone.png"}


def test_the_most_frequent_words():
    spelling = [b" the", b"the", b" of", b" a1b", b" \xc3\xa4hm", b" word", b" zig"]
    words = picture.frequent_words(spelling, np.array([1, 9, 9, 9, 9, 3, 2]))
    assert [*words.items()] == [(5, "word"), (6, "zig"), (0, "the")]


def test_bad_input(run, saved, data, tiny_data, tmp_path, monkeypatch):
    saved(Config(**TINY), tmp_path / "ours", data)
    saved(Config(**TINY, model="dense"), tmp_path / "twin", data)
    saved(Config(**TINY | dict(vocab_size=300)), tmp_path / "other")
    (tmp_path / "old.png").touch()
    for out in ("fig", "fig.jpeg2", "old.png", "gone/fig.png"):
        with pytest.raises(ValueError, match=f"{out} must be a new .png in a folder that exists"):
            run(tmp_path / "nowhere", "--out", tmp_path / out)          # refused before it looks for that
    for kind in "points", "bits":
        saved(Config(**TINY, generator=kind), tmp_path / kind, data)
    for name in "twin", "points", "bits":
        with pytest.raises(ValueError, match=f"{name} has no generator with modes"):
            run(tmp_path / name, "--out", tmp_path / "a.png")
    with pytest.raises(ValueError, match="has another tokenizer than .*other: use the data"):
        run(tmp_path / "ours", "--twin", tmp_path / "other", "--out", tmp_path / "a.png")
    lines = [json.dumps(dict(text=line)) for line in Path(picture.__file__).read_text().splitlines()]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))                 # as many ids, but of another text
    prepare([tmp_path / "b.jsonl"], tmp_path / "others", vocab_size=1_000)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "read_meta", lambda _: read_meta(tmp_path / "others"))
        with pytest.raises(ValueError, match="another tokenizer than"):
            run(tmp_path / "ours", "--out", tmp_path / "a.png")
    monkeypatch.setattr(picture, "ANCHORS", 301)
    with pytest.raises(ValueError, match="has hardly any words"):
        run(tmp_path / "ours", "--out", tmp_path / "a.png")
    about = tmp_path / "ours/step-00000002/config.json"
    about.write_text(about.read_text().replace(str(data), str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="no prepared data in .*gone"):
        run(tmp_path / "ours", "--out", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
