"""Text to shards and back: what goes in comes out, in order, whatever the files are like."""
import json
import os

import numpy as np
import pytest
import zstandard

import prepare_pile
from leviathan import InputError
from prepare_pile import END_OF_TEXT, Windows, documents, permute, prepare, read_meta, tokenizer_from_json, train_tokenizer

TEXTS = ["one\u2028line\u0085still", "", "a literal <|endoftext|> inside", "naïve — 北京 🙂\n" * 3, "x" * 5_000,
         *(f"no. {i}" for i in range(60))]


@pytest.fixture(scope="module")
def encoding():
    return train_tokenizer(iter(TEXTS), 270, "tiny")


def json_lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.mark.parametrize("name, content", [
    ("plain.jsonl", json_lines(TEXTS)),
    ("no-newline-at-the-end.jsonl", json_lines(TEXTS)[:-1]),
    ("one-frame.jsonl.zst", zstandard.compress(json_lines(TEXTS))),
    ("frames.jsonl.zst", b"".join(zstandard.compress(json_lines(TEXTS[i:i + 7])) for i in range(0, len(TEXTS), 7))),
    ("frames-that-cut-lines.jsonl.zst", b"".join(zstandard.compress(json_lines(TEXTS)[i:i + 999]) for i in range(0, 9_999, 999))),
])
def test_documents_come_out_as_they_went_in(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(documents(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name, content, message", [
    ("cut.jsonl.zst", zstandard.compress(json_lines(TEXTS))[:-9], "is cut short"),
    ("other.jsonl.zst", b"not zstd at all", "is not valid zstd"),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": 3}\n', "bad.jsonl:2: not a JSON object"),
    ("bad.jsonl", b'{"text": "fine"}\n\n{"no": 3}\n', "bad.jsonl:3: not a JSON object"),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', "bad.jsonl:2: not a JSON object"),
    ("bad.jsonl", b'{"text": "\\ud800"}\n', "bad.jsonl:1: not a JSON object"),
    ("bad.txt", b"\xff", "bad.txt is not UTF-8"),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(documents(tmp_path / name))


def test_shards_hold_every_token_in_order(tmp_path, encoding, monkeypatch):
    """In shards of 100 tokens, with <|endoftext|> before each document; a literal one in a text is text."""
    monkeypatch.setattr(prepare_pile, "SHARD_TOKENS", 100)
    (tmp_path / "train.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "val.txt").write_text("validation " * 30)
    meta = prepare([tmp_path / "train.jsonl"], tmp_path / "out", encoding, [tmp_path / "val.txt"])
    shards = [np.fromfile(tmp_path / "out" / s["file"], dtype="<u4", offset=1024) for s in meta["train"]["shards"]]
    header = np.fromfile(tmp_path / "out/train-00001.bin", dtype="<i4", count=256)
    assert header[:3].tolist() == [20240801, 7, 100] and not header[3:].any()
    assert all(len(shard) == 100 for shard in shards[:-1]) and len(shards) > 2
    expected = [token for text in TEXTS for token in (encoding.n_vocab - 1, *encoding.encode_ordinary(text))]
    assert np.concatenate(shards).tolist() == expected
    assert meta["train"]["documents"] == len(TEXTS) and meta["end_of_text"] == encoding.encode_single_token(END_OF_TEXT)
    assert tokenizer_from_json(read_meta(tmp_path / "out")["tokenizer"]).decode(shards[0][1:9].tolist()) in TEXTS[0]


def test_preparing_twice_gives_the_same_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS * 3))
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        prepare([tmp_path / "a.jsonl"], folder, train_tokenizer(iter(TEXTS), 270, "tiny"), holdout=3)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two and {"train-00000.bin", "val-00000.bin", "meta.json"} == set(one)


def test_exact_duplicates_stay_on_one_side(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"document {i % 40}" for i in range(400)]))
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, holdout=3)
    texts = {}
    for split in ("train", "val"):
        tokens = np.fromfile(tmp_path / "out" / f"{split}-00000.bin", dtype="<u4", offset=1024).tolist()
        texts[split] = set(encoding.decode(tokens).split(END_OF_TEXT)) - {""}
        assert meta[split]["documents"] % 10 == 0
    assert len(texts["train"] | texts["val"]) == 40 and not texts["train"] & texts["val"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS) + b"not json\n")
    with pytest.raises(InputError, match="a.jsonl:66"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(InputError, match="exists already: remove it or choose another --out"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)
    assert (tmp_path / "out/mine").exists()


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1_000])
def test_permute_is_a_permutation(n):
    first, second = (permute(np.arange(n), n, seed) for seed in (0, 1))
    assert sorted(first) == list(range(n)) == sorted(second)
    assert n < 64 or first.tolist() != second.tolist() != list(range(n))


def test_windows_cover_an_epoch_once(tiny_data):
    """Window i starts at token i * seq_len and overlaps the next by one token, the target of its last position."""
    windows = Windows(tiny_data, "train", 32)
    tokens = np.fromfile(tiny_data / "train-00000.bin", dtype="<u4", offset=1024)
    assert len(windows) == (len(tokens) - 1) // 32
    assert (windows[3] == tokens[96:129]).all()
    n = len(windows)
    epochs = windows.shuffled(np.arange(2 * n), seed=0)
    assert epochs.shape == (2 * n, 33)
    for epoch in (epochs[:n], epochs[n:]):
        assert sorted(map(tuple, epoch)) == sorted(tuple(windows[i]) for i in range(n))
    assert (epochs[:n] != epochs[n:]).any()
    assert (windows.shuffled(np.arange(n - 3, n + 3), seed=0) == epochs[n - 3:n + 3]).all()      # any position, at once


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="no test downloads: TIKTOKEN_CACHE_DIR names no cache")
def test_o200k_base(tmp_path):
    """The vocabulary of the paper, as tiktoken has it."""
    encoding = prepare_pile.get_encoding("o200k_base")
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, holdout=3)
    assert meta["tokenizer"]["vocab_size"] == 200_019 and meta["end_of_text"] == 199_999
    assert "tokens" not in meta["tokenizer"]        # its name is enough
