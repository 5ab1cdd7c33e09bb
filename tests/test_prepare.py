"""Text to shards and back: what goes in comes out, in order, whatever the files are like."""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

import documents as reading
import prepare_pile
import shards
import tokenizer
from common import InputError
from documents import documents, find_files, pile_shards
from kill_prepare import contents, kill_and_compare
from prepare_pile import hash_of, prepare
from shards import read_index, read_meta, verify
from tokenizer import END_OF_TEXT, cut_runs, get_encoding, tokenizer_from_json, train_tokenizer

HERE = Path(__file__).parent.parent

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
    ("cut.jsonl.zst", zstandard.compress(json_lines(TEXTS))[:-9], r"cut.jsonl.zst is cut short .*: fetch it again"),
    ("other.jsonl.zst", b"not zstd at all", "other.jsonl.zst is not valid zstd .*: fetch it again"),
    ("nothing.jsonl.zst", b"", "nothing.jsonl.zst is empty: fetch it again"),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": 3}\n', 'bad.jsonl:2: not a JSON object with a string "text": mend it, .*--skip-bad'),
    ("bad.jsonl", b'{"text": "fine"}\n\n{"no": 3}\n', 'bad.jsonl:3: not a JSON object with a string "text"'),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', "bad.jsonl:2: not valid JSON .*can't decode byte 0xff"),
    ("bad.jsonl", b'{"text": "\\ud800"}\n', "bad.jsonl:1: text that is not valid Unicode .*surrogates"),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": "half a li', "bad.jsonl:2: not valid JSON"),
    ("bad.jsonl", b"[" * 100_000, "bad.jsonl:1: not valid JSON .*recursion"),
    ("bad.txt", b"\xff", r"bad.txt: not UTF-8 \(byte 0\)"),
    ("long.jsonl", b'{"text": "fine"}\n{"text": "' + b"x" * 4_000_000, "long.jsonl:2: a line of more than 3 MB: cut it"),
    ("long.txt", b"x" * 4_000_000, "long.txt is one document of more than 3 MB: cut it"),
    ("bomb.jsonl.zst", zstandard.compress(b"0" * 200_000_000), "bomb.jsonl.zst:1: a line of more than 3 MB"),
])
def test_bad_files_are_named(tmp_path, name, content, message, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_DOCUMENT", 3 * 2**20)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(documents(tmp_path / name))


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_hold_every_token_in_order(tmp_path, encoding, monkeypatch, workers):
    """In shards of 100 tokens, with <|endoftext|> before each document; a literal one in a text is text."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    (tmp_path / "train.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "val.txt").write_text("validation " * 30)
    meta = prepare([tmp_path / "train.jsonl"], tmp_path / "out", encoding, [tmp_path / "val.txt"], workers=workers)
    found = [np.fromfile(tmp_path / "out" / s["file"], dtype="<u4", offset=1024) for s in meta["train"]["shards"]]
    header = np.fromfile(tmp_path / "out/train-00001.bin", dtype="<i4", count=256)
    assert header[:3].tolist() == [20240801, 7, 100] and not header[3:].any()
    assert all(len(shard) == 100 for shard in found[:-1]) and len(found) > 2
    expected = [token for text in TEXTS for token in (encoding.n_vocab - 1, *encoding.encode_ordinary(text))]
    assert np.concatenate(found).tolist() == expected
    assert meta["train"]["documents"] == len(TEXTS) and meta["end_of_text"] == encoding.encode_single_token(END_OF_TEXT)
    assert tokenizer_from_json(read_meta(tmp_path / "out")["tokenizer"]).decode(found[0][1:9].tolist()) in TEXTS[0]
    verify(tmp_path / "out")


def test_exact_duplicates_stay_on_one_side(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"document {i % 40}" for i in range(400)]))
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, holdout=3)
    texts = {}
    for split in ("train", "val"):
        tokens = np.fromfile(tmp_path / "out" / f"{split}-00000.bin", dtype="<u4", offset=1024).tolist()
        texts[split] = set(encoding.decode(tokens).split(END_OF_TEXT)) - {""}
        assert meta[split]["documents"] % 10 == 0
    assert len(texts["train"] | texts["val"]) == 40 and not texts["train"] & texts["val"]


@pytest.fixture
def corpus(tmp_path, encoding, monkeypatch):
    """Two files of documents from three domains, in chunks of 500 bytes and shards of 300 tokens."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    for name, size in (("CHUNK", 500), ("BLOCK", 200), ("COMPRESSED", 64)):
        monkeypatch.setattr(reading, name, size)
    rng = random.Random(0)
    lines = [json.dumps({"text": rng.choice(TEXTS) + str(i), "meta": {"pile_set_name": rng.choice("ABC")}}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:200]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[200:]).encode()))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"]


def test_the_same_bytes_whatever_the_workers_and_the_chunks(tmp_path, corpus, encoding, monkeypatch):
    for name, workers, size in (("one", 1, 500), ("two", 2, 500), ("three", 3, 2**20)):
        monkeypatch.setattr(reading, "CHUNK", size)
        prepare(corpus, tmp_path / name, encoding, holdout=5, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    assert {"train-00009.bin", "train-00009.idx", "val-00000.bin", "meta.json", "counts.npy"} <= set(contents(tmp_path / "one"))


def test_documents_and_domains_are_where_the_index_says(tmp_path, corpus, encoding):
    """Recounted from the lines themselves."""
    meta = prepare(corpus, tmp_path / "out", encoding, holdout=5)
    lines = [json.loads(line) for path in corpus for line in
             (path.read_bytes() if path.suffix == ".jsonl" else zstandard.decompress(path.read_bytes())).splitlines()]
    for split, inside in (("train", False), ("val", True)):
        expected = [(d["meta"]["pile_set_name"], d["text"]) for d in lines if (hash_of(d["text"]) % 5 == 0) == inside]
        found = []
        for shard in meta[split]["shards"]:
            tokens = shards.open_shard(tmp_path / "out" / shard["file"], shard["tokens"])
            index = read_index((tmp_path / "out" / shard["file"]).with_suffix(".idx"), len(tokens), 3)
            for start, stop, domain in zip(index["start"], [*index["start"][1:], len(tokens)], index["domain"]):
                part = tokens[start:stop].tolist()
                if part[0] == meta["end_of_text"]:
                    found.append((meta["domains"][domain], part[1:]))
                else:                                       # it began in the shard before
                    assert found[-1][0] == meta["domains"][domain]
                    found[-1][1].extend(part)
        assert [(domain, encoding.decode(tokens)) for domain, tokens in found] == expected
        for name, n in meta[split]["domains"].items():
            texts = [text for domain, text in expected if domain == name]
            tokens = [encoding.encode_ordinary(text) for text in texts]
            assert (n["documents"], n["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
            assert n["tokens"] == len(texts) + sum(map(len, tokens)) and n["distinct_ids"] == 1 + len(set().union(*tokens))
    assert np.load(tmp_path / "out/counts.npy").sum() == meta["train"]["tokens"]


SAVING_OFTEN = """
import sys, prepare_pile, shards, documents, common
shards.SHARD_TOKENS, documents.CHUNK, documents.BLOCK, documents.COMPRESSED = 300, 500, 200, 64
prepare_pile.SAVE_SECONDS, prepare_pile.STDLIB_VOCABULARY = 0, 300
if __name__ == "__main__":
    common.command_line(prepare_pile.main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_any_moment_it_goes_on(tmp_path, corpus):
    """Six times, and no worker outlives its parent. For the real size: python -m tests.kill_prepare."""
    (tmp_path / "often.py").write_text(SAVING_OFTEN)
    (tmp_path / "runs").mkdir()
    command = ["env", f"PYTHONPATH={HERE}", sys.executable, tmp_path / "often.py", "--workers", 2, "--input", *corpus]
    assert len(kill_and_compare(tmp_path / "runs", command, times=6)) == 6
    workers = lambda: subprocess.run(["pgrep", "-f", tmp_path], capture_output=True).stdout      # noqa: E731
    deadline = time.time() + 20
    while workers() and time.time() < deadline:
        time.sleep(0.1)
    assert not workers()


class Stop(Exception):
    pass


def interrupt(monkeypatch, n_chunks: int, *how, **more):
    """prepare() that stops after so many chunks, saving after each."""
    add, calls = prepare_pile.Unfinished.add, iter(range(n_chunks))

    def stop(*how, **more):
        if next(calls, None) is None:
            raise Stop
        add(*how, **more)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_pile, "SAVE_SECONDS", -1)
        patch.setattr(prepare_pile.Unfinished, "add", stop)
        with pytest.raises(Stop):
            prepare(*how, **more)


@pytest.fixture
def interrupted(tmp_path, corpus, encoding, monkeypatch):
    interrupt(monkeypatch, 20, corpus, tmp_path / "out", encoding, holdout=5)
    return tmp_path / "out.partial"


@pytest.mark.parametrize("n_chunks", range(5))
def test_every_text_file_is_one_document_wherever_a_run_stops(tmp_path, encoding, monkeypatch, n_chunks):
    files = [tmp_path / f"{name}.txt" for name in "abcde"]
    for file, text in zip(files, ("one", "", "two\nlines\n", "", "three")):
        file.write_text(text)
    interrupt(monkeypatch, n_chunks, files, tmp_path / "out", encoding, files[:1])
    meta = prepare(files, tmp_path / "out", encoding, files[:1])
    assert meta["train"]["documents"] == 5 and meta["val"]["documents"] == 1
    prepare(files, tmp_path / "undisturbed", encoding, files[:1])
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_an_interrupted_run_goes_on_only_with_what_it_had(tmp_path, corpus, encoding, interrupted):
    before = contents(interrupted)
    with pytest.raises(InputError, match=r"out.partial was begun by another command \(its validation differed\): repeat that"):
        prepare(corpus, tmp_path / "out", encoding, holdout=6)
    with pytest.raises(InputError, match=r"its sources differed"):
        prepare(corpus[:1], tmp_path / "out", encoding, holdout=5)
    text = corpus[0].read_text()
    for changed in ("A" + text[1:], text[:99]):
        corpus[0].write_text(changed)
        with pytest.raises(InputError, match=r"a.jsonl has changed since it was read: put it back, or remove"):
            prepare(corpus, tmp_path / "out", encoding, holdout=5)
    assert contents(interrupted) == before and not (tmp_path / "out").exists()
    corpus[0].write_text(text)
    prepare(corpus, tmp_path / "out", encoding, holdout=5)
    prepare(corpus, tmp_path / "undisturbed", encoding, holdout=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "progress.npz").write_bytes(b"PK"), "progress.npz is damaged .*: remove .*out.partial to start"),
    (lambda folder: (folder / "progress.npz").unlink(), "out.partial holds files but no progress.npz: remove it"),
    (lambda folder: max(folder.glob("train-*.bin")).write_bytes(b""), "is shorter than .* bytes: remove .*out.partial to start"),
])
def test_a_damaged_partial_folder(tmp_path, corpus, encoding, interrupted, damage, message):
    damage(interrupted)
    with pytest.raises(InputError, match=message):
        prepare(corpus, tmp_path / "out", encoding, holdout=5)


def test_bad_lines_stop_the_run_or_are_listed(tmp_path, encoding):
    """The same command, with --skip-bad, goes on."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS) + b"not json\n" + json_lines(["the end"]) + b'{"text": 3}\n')
    with pytest.raises(InputError, match="a.jsonl:66: not valid JSON .*--skip-bad"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)
    assert not (tmp_path / "out").exists()
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, skip_bad=True)
    assert meta["skipped"]["lines"] == 2 and [place for place, _ in meta["skipped"]["first"]] == ["a.jsonl:66", "a.jsonl:68"]
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(TEXTS) + 1


def test_nothing_is_overwritten(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(InputError, match="out exists already: remove it or choose another --out"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"] and (tmp_path / "out/mine").exists()
    with pytest.raises(InputError, match="no documents for val among 65 in all: give more documents"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "new", encoding, holdout=10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_two_runs_into_one_folder(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    with prepare_pile.sole_writer(tmp_path / "out"), pytest.raises(InputError, match="another run is writing .*out just now: wait"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)


def limited(script: str, *arguments, fsize: int):
    """Run it where no file may grow beyond fsize bytes: to a program this looks like a full disk."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({fsize}, {fsize}))\n{script}"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_full_disk(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS * 200))
    script = "import sys, prepare_pile, common\nsys.argv[0] = 'prepare_pile.py'\ncommon.command_line(prepare_pile.main)"
    arguments = ["--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--workers", "1"]
    done = limited(script, *arguments, fsize=100_000)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("prepare_pile.py: ")
    assert "too large: " in done.stderr and "the same command goes on" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = limited(script, *arguments, fsize=10**9)
    assert done.returncode == 0, done.stderr
    verify(tmp_path / "out")


@pytest.mark.parametrize("damage, message", [
    (lambda f: flip(f / "train-00000.bin", 2000), r"train-00000.bin is not what was written \(its SHA-256 differs\)"),
    (lambda f: flip(f / "train-00000.idx", 12), "train-00000.idx (is not what was written|does not belong)"),
    (lambda f: (f / "train-00001.idx").unlink(), "train-00001.idx is missing"),
    (lambda f: (f / "val-00000.idx").write_bytes(b"123"), "val-00000.idx is no index of documents"),
    (lambda f: flip(f / "counts.npy", -8), "counts.npy is wrong"),
    (lambda f: (f / "counts.npy").unlink(), "counts.npy is missing, damaged or of another vocabulary"),
    (lambda f: edit(f, "documents"), r"holds .* documents of train, but its meta.json says 1"),
    (lambda f: edit(f, "domains"), r"cannot be verified"),
    (lambda f: forge(f / "val-00000.idx", np.array([[0, 0], [1, 0]], dtype="<u4")), "has no document where its index says so"),
    (lambda f: forge(f / "val-00000.bin", np.array([270], dtype="<u4"), 1024 + 8), "holds an id beyond the vocabulary"),
])
def test_verify_finds_what_is_damaged(tmp_path, corpus, encoding, damage, message):
    prepare(corpus, tmp_path / "out", encoding, holdout=5)
    verify(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(InputError, match=message):
        verify(tmp_path / "out")


def forge(path: Path, values: np.ndarray, at: int = 0):
    """Other content, with its checksum in meta.json."""
    content = path.read_bytes()
    path.write_bytes(content[:at] + values.tobytes() + (content[at + values.nbytes:] if at else b""))
    meta = json.loads((path.parent / "meta.json").read_text())
    meta["val"]["shards"][0]["sha256" if path.suffix == ".bin" else "index_sha256"] = shards.sha256(path)
    (path.parent / "meta.json").write_text(json.dumps(meta))


def flip(path: Path, at: int):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(folder: Path, key: str):
    meta = json.loads((folder / "meta.json").read_text())
    meta["train"][key] = 1
    (folder / "meta.json").write_text(json.dumps(meta))


def test_folders_and_patterns_are_read_whole(tmp_path, capsys):
    for name in ("b.txt", "a.jsonl", "inside/c.jsonl.zst", "notes.pdf", "d.txt.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = lambda found: [path.name for path in found]      # noqa: E731
    assert names(find_files([str(tmp_path)])) == ["a.jsonl", "b.txt", "d.txt.zst", "c.jsonl.zst"]
    assert "1 files are left out, as their names do not end in one of .jsonl" in capsys.readouterr().out
    assert names(find_files([str(tmp_path / "*.txt"), str(tmp_path / "notes.pdf")])) == ["b.txt", "notes.pdf"]
    for wrong, message in (("*.csv", "is not a file that can be read"), ("nowhere", "is not a file that can be read")):
        with pytest.raises(InputError, match=message):
            find_files([str(tmp_path / wrong)])
    with pytest.raises(InputError, match="b.txt is named twice"):
        find_files([str(tmp_path / "b.txt"), str(tmp_path)])


def test_names_of_pile_shards():
    assert pile_shards("0") == [0] and pile_shards("1,4-6") == [1, 4, 5, 6] and pile_shards("all") == list(range(30))
    for wrong in ("30", "x", "3-1", "0,0", "1-2-3", "-1", ""):
        with pytest.raises(InputError, match=f"--pile {wrong}: name shards of 0 to 29, such as 0, 0-3, 1,5 or all"):
            pile_shards(wrong)


def test_long_runs_are_cut_and_nothing_else(monkeypatch):
    monkeypatch.setattr(tokenizer, "LONGEST_RUN", 10)
    for text in ("", "a b c " * 20, "x" * 9, "one " + "y" * 19 + " end", " " * 15 + "z"):
        assert "".join(cut_runs(text)) == text and len(cut_runs(text)) <= 2
    assert cut_runs("a b c " * 20) == ["a b c " * 20]
    for text in ("x" * 1_000, " " * 1_000, "ab " * 5 + "-" * 99 + "\n" * 77 + " words again"):
        parts = cut_runs(text)
        assert "".join(parts) == text and len(parts) > 5
        assert all(len(run) < 20 for part in parts for run in [*part.split(), *"".join(" " if c.isspace() else "x" for c in part)
                                                                 .split("x")])


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="no test downloads: TIKTOKEN_CACHE_DIR names no cache")
def test_o200k_base(tmp_path):
    """The vocabulary of the paper, as tiktoken has it."""
    encoding = get_encoding("o200k_base")
    assert len(encoding.encode_ordinary(" " * 150_000)) < 20_000       # a million at once makes tiktoken panic
    texts = [*TEXTS, " " * 2_000_000, "x" * 500_000]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, holdout=3)
    assert meta["tokenizer"]["vocab_size"] == 200_019 and meta["end_of_text"] == 199_999
    assert "tokens" not in meta["tokenizer"]        # its name is enough
    found = []
    for split in ("train", "val"):
        tokens = np.fromfile(tmp_path / "out" / f"{split}-00000.bin", dtype="<u4", offset=1024)
        found += [encoding.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 199_999))[1:]]
    assert sorted(found) == sorted(texts)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind root, nor look so on Windows")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "locked").mkdir(mode=0o500)
    command = [sys.executable, HERE / "prepare_pile.py", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "locked/out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("prepare_pile.py: [Errno 13] Permission denied: ")


def test_validation_that_overlaps_training_is_told(tmp_path, capsys):
    """Two of three documents of --val stand in training, one of them twice; an empty one says nothing."""
    lines = lambda texts: "".join(json.dumps(dict(text=text)) + "\n" for text in texts)          # noqa: E731
    (tmp_path / "train.jsonl").write_text(lines(["a b", "c d", "", "a b", "e f", "g"]))
    (tmp_path / "val.jsonl").write_text(lines(["a b", "", "e f", "new"]))
    encoding = train_tokenizer(iter(TEXTS), 270, "tiny")
    for workers in (1, 2):
        meta = prepare([tmp_path / "train.jsonl"], tmp_path / f"{workers}", encoding, [tmp_path / "val.jsonl"], workers=workers)
        assert meta["overlap"] == 3 and meta["train"]["documents"] == 6 and meta["val"]["documents"] == 4
        assert "3 of 6 training documents stand in the validation file too, word for word" in capsys.readouterr().out
    assert prepare([tmp_path / "train.jsonl"], tmp_path / "held", encoding, holdout=2)["overlap"] == 0
    assert "stand in the validation" not in capsys.readouterr().out


def test_a_python_without_its_library(monkeypatch, tmp_path):
    monkeypatch.setattr(reading.sysconfig, "get_paths", lambda: dict(stdlib=str(tmp_path)))
    with pytest.raises(InputError, match="no sources of the standard library in .*: name your own text with --input"):
        reading.stdlib_files()
