"""Text to shards and back: what goes in comes out, whatever the files are like and wherever a run stops."""
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare_pile
from conftest import zstd
from kill_prepare import contents, kill_and_compare, small_parts
from prepare_pile import (
    END_OF_TEXT,
    SPLITS,
    Windows,
    cut_runs,
    documents,
    find_files,
    get_encoding,
    locked,
    prepare,
    read_counts,
    read_index,
    read_meta,
    sealed,
    tokenizer_from_json,
    tokenizer_to_json,
    train_tokenizer,
    verify,
    written_whole,
)

ROOT = Path(__file__).parent.parent
TEXTS = ["one\u2028line\u0085still", "", "a literal <|endoftext|> inside", "naïve — 北京 🙂\n" * 3,
         "x" * 5_000, *(f"no. {i}" for i in range(60))]


@pytest.fixture(scope="module")
def encoding():
    return train_tokenizer(iter(TEXTS), 270, "tiny")


def json_lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def texts_in(path, **how) -> list[str]:
    return [text for text, _ in documents(path, **how)]


def tokens_of(folder, split) -> np.ndarray:
    return np.concatenate([np.fromfile(folder / shard["file"], dtype="<u4", offset=1024)
                           for shard in read_meta(folder)[split]["shards"]])


# ----------------------------------------------------------------------------------------------------------
# Sources.

LINES, FRAME = json_lines(TEXTS), zstd.compress


@pytest.mark.parametrize("name, content", [
    ("plain.jsonl", LINES), ("Upper.JSONL", LINES), ("a.ndjson", LINES), ("a.jsonlines", LINES),
    ("a.jl", LINES),
    ("a.json", LINES), ("no-newline-at-the-end.jsonl", LINES[:-1]), ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
    ("windows.jsonl", LINES.replace(b"\n", b"\r\n")), ("a.jsonl.gz", gzip.compress(LINES)),
    ("members.NDJSON.GZ", gzip.compress(LINES[:999]) + gzip.compress(LINES[999:])),
    ("a.jsonl.zst", FRAME(LINES)),
    ("frames.jsonl.zst", b"".join(FRAME(json_lines(TEXTS[i:i + 7])) for i in range(0, len(TEXTS), 7))),
    ("frames-that-cut-lines.jsonl.zst", b"".join(FRAME(LINES[i:i + 999]) for i in range(0, 9_999, 999))),
])
def test_documents_come_out_as_they_went_in(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts_in(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name, content", [
    ("a.txt", b"one\ntwo\r\n"), ("A.TXT", b"one\ntwo\r\n"), ("bom.md", b"\xef\xbb\xbfone\ntwo\r\n"),
    ("a.py.gz", gzip.compress(b"one\ntwo\r\n", mtime=0)), ("a.rst.zst", FRAME(b"one\n") + FRAME(b"two\r\n"))])
def test_a_text_file_is_one_document(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(documents(tmp_path / name)) == [("one\ntwo\r\n", "(none)")]


def test_a_window_of_two_gigabytes(tmp_path):
    """As of `zstd --ultra --long=31`: the header asks for it, whatever the content."""
    streamed = zstd.ZstdCompressor(level=1)
    frame = bytearray(streamed.compress(LINES) + streamed.flush())
    assert not frame[4] & 0x20      # so the next byte is the window's: 2^(10 + its upper 5 bits)
    frame[5] = 21 << 3
    (tmp_path / "long.jsonl.zst").write_bytes(frame)
    assert texts_in(tmp_path / "long.jsonl.zst") == TEXTS


@pytest.mark.parametrize("name, content, message", [
    ("cut.jsonl.zst", FRAME(LINES)[:-9], "cut.jsonl.zst cannot be read .*: fetch it again"),
    ("cut.jsonl.gz", gzip.compress(LINES)[:-9], "cut.jsonl.gz cannot be read .*: fetch it again"),
    ("other.jsonl.zst", b"not zstd at all", "other.jsonl.zst cannot be read .*: fetch it again"),
    ("other.txt.gz", b"not gzip at all", "other.txt.gz cannot be read .*: fetch it again"),
    ("nothing.jsonl.zst", b"", "nothing.jsonl.zst is empty: fetch it again"),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": 3}\n',
     'bad.jsonl:2: not a JSON object with a string "text": leave .*--skip-bad, or mend it'),
    ("bad.jsonl", b'{"text": "fine"}\n\n{"no": 3}\n', 'bad.jsonl:3: not a JSON object with a string "text"'),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', "bad.jsonl:2: .*can't decode byte 0xff"),
    ("bad.jsonl", b'{"text": "\\ud800"}\n', "bad.jsonl:1: .*surrogates not allowed"),
    ("bad.jsonl", b'{"text": "fine"}\n{"text": "half a li', "bad.jsonl:2: Unterminated string"),
    ("bad.jsonl", b"[" * 100_000, "bad.jsonl:1: .*recursion"),
    ("array.json", b'[{"text": "one"},\n{"text": "two"}]', "array.json:1: "),
    ("pretty.json", b'{\n  "text": "one"\n}', "pretty.json:1: "),
    ("bad.txt", b"\xff", "bad.txt:1: .*can't decode byte 0xff"),
    ("long.jsonl", b'{"text": "fine"}\n{"text": "' + b"x" * 4_000_000,
     "long.jsonl:2: more than 3 MB: leave out such lines"),
    ("long.txt", b"x" * 4_000_000, "long.txt:1: more than 3 MB: leave out such lines"),
    ("bomb.jsonl.zst", FRAME(b"0" * 200_000_000), "bomb.jsonl.zst:1: more than 3 MB"),
    ("data.csv", b"text\none\n", "data.csv is of an unknown format: say --format jsonl or --format text"),
    ("data.zst", FRAME(LINES), "data.zst is of an unknown format"),
])
def test_bad_files_are_named(tmp_path, name, content, message, monkeypatch):
    monkeypatch.setattr(prepare_pile, "LONGEST_DOCUMENT", 3 * 2**20)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts_in(tmp_path / name)


@pytest.mark.parametrize("size", [3 * 2**20, 3 * 2**20 + 1, 9 * 2**20 + 3, 2 * (3 * 2**20 + 1)])
def test_a_line_that_is_too_long_is_left_out_whole(tmp_path, size, monkeypatch):
    """Also where its end is that of a piece that is read, or of the file."""
    monkeypatch.setattr(prepare_pile, "LONGEST_DOCUMENT", 3 * 2**20)
    long = b"x" * size
    for lines, texts in (long + b"\n" + LINES, [None, *TEXTS]), (LINES + long, [*TEXTS, None]):
        (tmp_path / "a.jsonl").write_bytes(lines)
        assert [text for text, _ in prepare_pile.documents(tmp_path / "a.jsonl", skip_bad=True)] == texts


def test_a_format_can_be_named(tmp_path):
    (tmp_path / "data.csv").write_bytes(LINES)
    assert texts_in(tmp_path / "data.csv", format="jsonl") == TEXTS
    assert texts_in(tmp_path / "data.csv", format="text") == [LINES.decode()]


def test_folders_leave_out_what_is_hidden_or_unknown(tmp_path, capsys, monkeypatch):
    for name in ("b.txt", "a.NDJSON", "in/c.jsonl.zst", "notes.pdf", "._b.txt", ".ipynb_checkpoints/b.txt",
                 "in/meta.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    names = lambda found: [path.name for path in found]      # noqa: E731
    assert names(find_files([str(tmp_path)])) == ["a.NDJSON", "b.txt", "c.jsonl.zst"]
    assert "5 left out, hidden, a link or of unknown format, as " in capsys.readouterr().out
    assert names(find_files([str(tmp_path)], "text")) == ["a.NDJSON", "b.txt", "c.jsonl.zst", "notes.pdf"]
    assert names(find_files([str(tmp_path / "._b.txt")])) == ["._b.txt"]         # named by the user
    for wrong in ("nowhere", ".ipynb_checkpoints/nothing"):
        with pytest.raises(ValueError, match="is no file, nor a folder with text in it"):
            find_files([str(tmp_path / wrong)])

    def refused(path, scandir=os.scandir):
        if Path(path).name == "in":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError):        # not fewer files in silence
        find_files([str(tmp_path)])


# ----------------------------------------------------------------------------------------------------------
# Tokenizers.

def test_tokenizers_travel_in_json(encoding):
    known = json.loads(json.dumps(tokenizer_to_json(encoding)))
    assert tokenizer_from_json(known).encode_ordinary("no. 7") == encoding.encode_ordinary("no. 7")
    with pytest.raises(ValueError, match="unknown encoding 'gpt9': choose from .*o200k_base"):
        get_encoding("gpt9")


@pytest.mark.parametrize("change", [
    lambda known: known["tokens"].__setitem__(260, "not base64!"),
    lambda known: known.update(pattern="(a+)+$"),
    lambda known: known["tokens"].__setitem__(0, known["tokens"][1]), lambda known: known.update(tokens=3),
    lambda known: known.pop("name"), lambda known: known["tokens"].pop(),
    lambda known: known.update(vocab_size="270")])
def test_a_tokenizer_from_a_stranger(encoding, change):
    """Damaged, or made to do harm, with a checksum that fits."""
    change(known := tokenizer_to_json(encoding))
    for found in (known, sealed(known), sealed(known) | dict(sha256="0")):
        with pytest.raises(ValueError, match="the tokenizer's description is missing, damaged or other data"):
            tokenizer_from_json(found)


def test_long_runs_are_cut_and_nothing_else(monkeypatch):
    monkeypatch.setattr(prepare_pile, "LONGEST_RUN", 10)
    for text in ("", "a b c " * 20, "x" * 9, "one " + "y" * 19 + " end", " " * 15 + "z"):
        assert "".join(cut_runs(text)) == text and len(cut_runs(text)) <= 2
    assert cut_runs("a b c " * 20) == ["a b c " * 20]
    for text in ("x" * 1_000, " " * 1_000, "ab " * 5 + "-" * 99 + "\n" * 77 + " words again"):
        parts = cut_runs(text)
        assert "".join(parts) == text and len(parts) > 5
        assert all(len(run) < 20 for part in parts for run in [
            *part.split(), *"".join(" " if c.isspace() else "x" for c in part).split("x")])


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                    reason="no test downloads: TIKTOKEN_CACHE_DIR names no cache")
def test_o200k_base(tmp_path):
    """The vocabulary of the paper, as tiktoken has it; a million spaces at once make it panic."""
    encoding, texts = get_encoding("o200k_base"), [*TEXTS, " " * 2_000_000, "x" * 500_000]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, holdout=3, threads=2)
    assert meta["tokenizer"]["vocab_size"] == 200_019 and meta["end_of_text"] == 199_999
    assert "tokens" not in meta["tokenizer"]        # its name is enough
    found = [encoding.decode(part[1:].tolist()) for split in SPLITS
             for tokens in [tokens_of(tmp_path / "out", split)]
             for part in np.split(tokens, np.flatnonzero(tokens == 199_999))[1:]]
    assert sorted(found) == sorted(texts)


# ----------------------------------------------------------------------------------------------------------
# The writer.

@pytest.fixture
def corpus(tmp_path, encoding, monkeypatch):
    """Two files of documents from three domains, in parts of 300 tokens."""
    monkeypatch.setattr(prepare_pile, "PART_TOKENS", 300)
    rng = random.Random(0)
    texts = [text for text in TEXTS if len(text) < 5_000]
    lines = [json.dumps({"text": rng.choice(texts) + str(i), "meta": {"pile_set_name": rng.choice("ABC")}})
             for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:200]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd.compress("\n".join(lines[200:]).encode()))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"]


def test_every_token_in_order(tmp_path, encoding, monkeypatch):
    """<|endoftext|> before each document; a literal one is text. What is too long is a shard of its own."""
    monkeypatch.setattr(prepare_pile, "PART_TOKENS", 100)
    texts = [*TEXTS, " ".join(map(str, range(100, 200))), "the end"]
    (tmp_path / "train.jsonl").write_bytes(json_lines(texts))
    (tmp_path / "val.txt").write_text("validation " * 30)
    meta = prepare([tmp_path / "train.jsonl"], tmp_path / "out", encoding, [tmp_path / "val.txt"], threads=2)
    assert tokens_of(tmp_path / "out", "train").tolist() == [
        token for text in texts for token in (encoding.n_vocab - 1, *encoding.encode_ordinary(text))]
    header = np.fromfile(tmp_path / "out/train-00001.bin", dtype="<i4", count=256)
    sizes = [shard["tokens"] for shard in meta["train"]["shards"]]
    assert header[:3].tolist() == [20240801, 7, sizes[1]] and not header[3:].any()
    assert max(sizes) == 1 + len(encoding.encode_ordinary(texts[-2]))
    assert sum(size > 100 for size in sizes) == 1 and meta["train"]["documents"] == len(texts)
    assert meta["end_of_text"] == encoding.encode_single_token(END_OF_TEXT)
    verify(tmp_path / "out")


def test_the_same_bytes_whatever_the_threads_and_the_reading(tmp_path, corpus, encoding, monkeypatch):
    for name, threads, ahead in (("one", 1, 10), ("two", 2, 9_000), ("five", 5, 2**23)):
        monkeypatch.setattr(prepare_pile, "AHEAD", ahead)
        prepare(corpus, tmp_path / name, encoding, holdout=5, threads=threads)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "five")
    written = {"train-00009.bin", "train-00009.idx", "val-00000.bin", "meta.json", "counts.npy"}
    assert written <= contents(tmp_path / "one").keys()


def test_documents_and_domains_are_where_the_index_says(tmp_path, corpus, encoding):
    """Recounted from the lines themselves; no document crosses shards."""
    meta = prepare(corpus, tmp_path / "out", encoding, holdout=5, threads=2)
    contents = corpus[0].read_bytes(), zstd.decompress(corpus[1].read_bytes())
    lines = [json.loads(line) for content in contents for line in content.splitlines()]
    for split, inside in (("train", False), ("val", True)):
        held_out = [int(hashlib.sha256(d["text"].encode()).hexdigest()[:16], 16) % 5 == 0 for d in lines]
        expected = [(d["meta"]["pile_set_name"], d["text"]) for d, own in zip(lines, held_out)
                    if own == inside]
        found = []
        for shard in meta[split]["shards"]:
            path = tmp_path / "out" / shard["file"]
            tokens = np.fromfile(path, dtype="<u4", offset=1024)
            index = read_index(tmp_path / "out", shard)
            stops = [*index["start"][1:], len(tokens)]
            for start, stop, domain in zip(index["start"], stops, index["domain"]):
                assert tokens[start] == meta["end_of_text"]
                found.append((meta["domains"][domain], encoding.decode(tokens[start + 1:stop].tolist())))
        assert found == expected
        for name, n in meta[split]["domains"].items():
            texts = [text for domain, text in expected if domain == name]
            assert (n["documents"], n["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
            assert n["tokens"] == len(texts) + sum(len(encoding.encode_ordinary(text)) for text in texts)
        assert meta[split]["tokens"] == sum(n["tokens"] for n in meta[split]["domains"].values())
    counts = np.bincount(tokens_of(tmp_path / "out", "train"), minlength=270)
    assert np.array_equal(read_counts(tmp_path / "out"), counts)


def test_exact_duplicates_stay_on_one_side(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"document {i % 40}" for i in range(400)]))
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, holdout=3)
    sides = [{*encoding.decode(tokens_of(tmp_path / "out", split).tolist()).split(END_OF_TEXT)} - {""}
             for split in SPLITS]
    assert len(sides[0] | sides[1]) == 40 and not sides[0] & sides[1] and meta["val"]["documents"] % 10 == 0


class Stop(Exception):
    pass


def interrupt(monkeypatch, n: int, *how, **more):
    """prepare() that ends instead of adding a document, after n of them."""
    add, calls = prepare_pile.Unfinished.add, iter(range(n))

    def stop(*how):
        if next(calls, None) is None:
            raise Stop
        add(*how)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_pile.Unfinished, "add", stop)
        with pytest.raises(Stop):
            prepare(*how, **more)


@pytest.mark.parametrize("n", [0, 1, 60, 199, 200, 201, 399])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, corpus, encoding, monkeypatch, n):
    """With lines that are left out, wherever it stops and with other threads."""
    corpus[0].write_text("not json\n" + corpus[0].read_text() + "\nnor this\n")
    how = dict(holdout=5, skip_bad=True)
    interrupt(monkeypatch, n, corpus, tmp_path / "out", encoding, **how)
    with pytest.raises(ValueError, match="out is unfinished: the same command goes on"):
        Windows(tmp_path / "out", "train", 8)
    meta = prepare(corpus, tmp_path / "out", encoding, **how, threads=3)
    prepare(corpus, tmp_path / "undisturbed", encoding, **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert meta["skipped"]["lines"] == 2 and "a.jsonl:1: " in meta["skipped"]["first"]


def test_only_the_same_command_goes_on(tmp_path, corpus, encoding, monkeypatch):
    interrupt(monkeypatch, 210, corpus, tmp_path / "out", encoding, holdout=5)
    before = contents(tmp_path / "out")
    text = corpus[0].read_text()
    for message, how in (("validation differ", dict(holdout=6)), ("sources differ", dict(files=corpus[:1])),
                         ("tokenizer differ", dict(encoding=train_tokenizer(iter(TEXTS), 271, "other"))),
                         ("sources differ", dict(changed=text + text.splitlines()[-1]))):
        corpus[0].write_text(how.pop("changed", text))
        with pytest.raises(ValueError, match=rf"out was begun by another command .*\({message}\): repeat"):
            prepare(**dict(files=corpus, out=tmp_path / "out", encoding=encoding, holdout=5) | how)
    corpus[0].write_text(text)
    assert contents(tmp_path / "out") == before
    meta = prepare(corpus, tmp_path / "out", encoding, holdout=5)
    assert prepare(corpus, tmp_path / "out", encoding, holdout=5) == meta       # finished: nothing to do
    with pytest.raises(ValueError, match="was begun by another command"):
        prepare(corpus, tmp_path / "out", encoding, holdout=6)


def test_what_has_written_no_part_yet_stands_in_nobodys_way(tmp_path, encoding, capsys):
    """No document for validation, or a bad line: another command may begin anew."""
    bad = b"not json\n" + json_lines(["the end"]) + b'{"text": 3}\n'
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS) + bad)
    with pytest.raises(ValueError, match="a.jsonl:66: Expecting value.*: leave out .*--skip-bad, or mend it"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)
    with pytest.raises(ValueError, match="no documents for val: give more, or a validation file with --val"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, holdout=10**7, skip_bad=True)
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding, skip_bad=True)
    assert meta["skipped"]["lines"] == 2
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(TEXTS) + 1
    assert "left out, as they could not be read: 2, first" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["new/deep", "empty", "with spaces", "link", "dangling", "."])
def test_any_empty_place_will_do(tmp_path, encoding, place, monkeypatch):
    """OUT itself is written, and stays what it was."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    for name in ("empty", "with spaces", "target", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "not/yet")
    (tmp_path / "empty/lost+found").mkdir()                     # as in a mount point
    monkeypatch.chdir(tmp_path / "here")
    out = Path(".") if place == "." else tmp_path / place
    prepare([tmp_path / "a.jsonl"], out, encoding)
    verify(out)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    where = dict(link="target", dangling="not/yet").get(place, "here" if place == "." else place)
    assert (tmp_path / where / "train-00000.bin").is_file()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root mounts")
def test_a_mount_point(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        prepare([tmp_path / "a.jsonl"], tmp_path / "disk", encoding)
        verify(tmp_path / "disk")
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_nothing_of_the_users_is_touched(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.tmp").touch()
    with pytest.raises(ValueError, match=r"out holds something else \(notes.tmp\): choose another --out"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)
    assert (tmp_path / "out/notes.tmp").exists()
    with pytest.raises(OSError, match="File exists"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "a.jsonl", encoding)
    assert (tmp_path / "a.jsonl").read_bytes() == LINES
    with pytest.raises(RuntimeError), written_whole(tmp_path / "a.jsonl") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.jsonl").read_bytes() == LINES and not partial.exists()
    assert partial.name == ".a.jsonl.tmp"                       # no name of a user's
    (tmp_path / "link").symlink_to("target")
    with written_whole(tmp_path / "link") as partial:
        partial.write_text("whole")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "whole"


def test_two_runs_into_one_folder(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        with pytest.raises(ValueError, match="another run is writing .*out just now: wait"):
            prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", encoding)


@pytest.mark.parametrize("message, how", [
    ("--holdout 0: it must be", dict(holdout=0)), ("--holdout -3: it must be", dict(holdout=-3)),
    ("--threads 0: it must be", dict(threads=0)), ("--vocab-size 256: it must be", dict(vocab_size=256)),
    ("a.jsonl is named twice", dict(val_files=["a.jsonl"])),
    ("same.jsonl is named twice", dict(files=["same.jsonl"], val_files=["a.jsonl"])),
    ("a.csv is of an unknown format", dict(files=["a.csv"])),
    ("b.jsonl.zst cannot be read", dict(files=["a.jsonl", "b.jsonl.zst"])),
    ("latin1.txt:1: .* can't decode", dict(files=["a.jsonl", "latin1.txt"])),
    ("no documents for val: name another file", dict(val_files=["blank.jsonl"]))])
def test_wrong_requests_are_refused_before_any_work(tmp_path, encoding, monkeypatch, message, how):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "a.csv", "b.jsonl.zst", "same.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    Path("latin1.txt").write_bytes(b"caf\xe9")
    Path("blank.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match=message):
        prepare(**dict(files=["a.jsonl"], out="out", encoding=encoding) | how)
    assert not Path("out").exists()


def test_files_that_are_empty_are_not_one_file(tmp_path, encoding):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "a.py").write_text(name)
    files, val_files = (find_files([str(tmp_path / name)]) for name in ("train", "val"))
    assert prepare(files, tmp_path / "out", encoding, val_files)["train"]["documents"] == 2


def test_its_own_files_are_no_sources(tmp_path, encoding):
    """Of any format, by --format: else the same command would not go on."""
    for i in range(9):
        (tmp_path / f"{i}.x").write_text(f"text {i}")
    for _ in range(2):
        files = find_files([str(tmp_path)], "text")
        assert prepare(files, tmp_path / "out", encoding, holdout=2, format="text")["finished"]
    assert len(files) > 9


def test_a_tokenizer_is_trained_on_any_text(tmp_path, corpus):
    """rustbpe panics at long runs of spaces, as tiktoken does."""
    (tmp_path / "spaces.jsonl").write_bytes(json_lines([" " * 1_500_000, "a"]))
    prepare([*corpus, tmp_path / "spaces.jsonl"], tmp_path / "out", holdout=5, vocab_size=300)


# ----------------------------------------------------------------------------------------------------------
# The script.

def run(*arguments, before: str = "", **how):
    """prepare_pile.py as a user runs it, after the statement `before`."""
    code = (f"{before}\nimport runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"runpy.run_path({str(ROOT / 'prepare_pile.py')!r}, run_name='__main__')")
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **how)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_any_moment_it_goes_on(tmp_path, corpus):
    """Five times. For the real size: python -m tests.kill_prepare."""
    (tmp_path / "runs").mkdir()
    command = [*small_parts(tmp_path, 300), "--threads", 2, "--vocab-size", 300, "--input", *corpus]
    assert len(kill_and_compare(tmp_path / "runs", command, times=5)) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_at_once(tmp_path, stop):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a few words of text " * 20_000] * 100))
    arguments = ["--vocab-size", "300", "--input", tmp_path / "a.jsonl", "--out", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, ROOT / "prepare_pile.py", *arguments],
                               stdout=subprocess.DEVNULL)
    while not (tmp_path / "out").exists():
        time.sleep(0.02)
    process.send_signal(getattr(signal, stop))
    assert process.wait(timeout=5) == -getattr(signal, stop)


def test_a_flag_given_twice_names_more(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(f"{name} {text}" for text in TEXTS))
    a, b, c = sorted(tmp_path.iterdir())
    done = run("--input", a, "--input", b, "--val", c, "--out", tmp_path / "out", "--vocab-size", 270)
    assert done.returncode == 0, done.stderr
    assert read_meta(tmp_path / "out")["train"]["documents"] == 2 * len(TEXTS)
    assert "\n270 ids; a unigram model's validation loss: " in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_full_disk(tmp_path):
    """No file may grow beyond a size: to a program this looks like a full disk."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(f"{i} {text}" for i, text in enumerate(TEXTS * 200)))
    arguments = ["--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--vocab-size", "300"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    done = run(*arguments, before=limit)
    assert done.returncode == 1 and done.stderr.startswith("prepare_pile.py: ")
    assert done.stderr.endswith("too large: once that is mended, the same command goes on\n")
    assert len(done.stderr.splitlines()) == 1
    done = run(*arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    verify(tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0,
                    reason="permissions do not bind root, nor look so on Windows")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "locked").mkdir(mode=0o500)
    done = run("--input", tmp_path / "a.jsonl", "--out", tmp_path / "locked/out")
    assert done.returncode == 1 and done.stderr.startswith("prepare_pile.py: [Errno 13] Permission denied: ")


@pytest.mark.parametrize("arguments, message", [
    (["--encoding", "gpt9"], "unknown encoding 'gpt9'"),
    (["--vocab-size", "0"], "--vocab-size 0: it must be"),
    (["--input", "a.jsonl"], "--input needs --out"),
    (["--input", "nowhere", "--out", "out"], "nowhere is no file"),
    (["--verify", "nowhere"], "no prepared data in nowhere")])
def test_what_the_user_sees(arguments, message, tmp_path):
    """One line, no traceback, exit status 1, and nothing begun."""
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and not [*tmp_path.iterdir()]
    assert done.stderr.startswith(f"prepare_pile.py: {message}") and len(done.stderr.splitlines()) == 1


def test_a_vocabulary_is_named_or_trained(tmp_path):
    done = run(*"--vocab-size 300 --encoding gpt2".split(), cwd=tmp_path)
    assert done.returncode == 2 and "--encoding: not allowed with argument --vocab-size" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_the_name_of_a_domain_is_text_of_a_line(tmp_path):
    """Whatever JSON holds: half a surrogate pair, which no file takes, or a book."""
    domains = ["\ud800", "x" * 10_000, 3]
    lines = [json.dumps(dict(text="a", meta=dict(pile_set_name=domain))) for domain in domains]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [domain for _, domain in documents(tmp_path / "a.jsonl")] == ["?", "x" * 100, "(none)"]


def test_a_report_where_characters_are_lacking(tmp_path):
    """As of Windows' consoles, or LC_ALL=C: the work is done all the same."""
    lines = [json.dumps(dict(text=f"word {i} " * 50, meta=dict(pile_set_name="Märchen"))) for i in range(99)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    done = run(*"--vocab-size 260 --input a.jsonl --out out".split(), cwd=tmp_path,
               env=os.environ | dict(PYTHONIOENCODING="ascii:strict"))
    assert done.returncode == 0 and "M?rchen " in done.stdout, done.stderr


def test_help_starts_without_torch():
    """Nor with what only the writer needs."""
    done = run("--help", before="import atexit, sys; atexit.register(lambda: print(*sys.modules))")
    assert done.returncode == 0 and not {"torch", "backports.zstd", "rustbpe"} & {*done.stdout.split()}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux says which cores a process may use")
def test_its_threads_are_the_cores_it_may_use():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert "that tokenise [1]" in run("--help", before=one).stdout


def test_the_standard_library(tmp_path, monkeypatch):
    """Or what stands in its place: no tests, no installed packages."""
    for name in (*(f"module{i}.py" for i in range(60)), "test/a.py", "site-packages/b.py", "package/c.py",
                 "data.txt"):
        (tmp_path / "lib" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "lib" / name).write_text(f"def function():\n    return '{name}'\n", encoding="utf-8")
    monkeypatch.setattr(prepare_pile.sysconfig, "get_paths", lambda: dict(stdlib=str(tmp_path / "lib")))
    meta = prepare_pile.prepare_stdlib(tmp_path / "out", 280)
    assert meta["tokenizer"]["vocab_size"] == 280 and meta["tokenizer"]["name"] == "bpe280"
    assert meta["train"]["documents"] + meta["val"]["documents"] == 61
    (tmp_path / "lib").rename(tmp_path / "elsewhere")           # a Python without its sources
    with pytest.raises(ValueError, match="no documents for train: give more"):
        prepare_pile.prepare_stdlib(tmp_path / "other", 280)


# ----------------------------------------------------------------------------------------------------------
# The reader.

def flip(path: Path, at: int):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(folder: Path, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def read_all(folder):
    for split in SPLITS:
        for shard in Windows(folder, split, 2).shards:
            read_index(folder, shard)
    read_counts(folder)


@pytest.mark.parametrize("damage, message", [
    (lambda f: flip(f / "train-00000.bin", 2000), None),
    (lambda f: flip(f / "train-00000.idx", 12), r"train-00000.idx .*\(its SHA-256 differs"),
    (lambda f: flip(f / "counts.npy", -8), "counts.npy"),
    (lambda f: flip(f / "train-00000.bin", 0), r"train-00000.bin .*\(not a shard of"),
    (lambda f: (f / "val-00001.bin").write_bytes((f / "val-00001.bin").read_bytes()[:-4]),
     "val-00001.bin .*not a shard of"),
    (lambda f: (f / "train-00001.bin").write_bytes(b""), "train-00001.bin"),
    (lambda f: (f / "train-00001.bin").write_bytes(b"123"), "train-00001.bin"),
    (lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin .*No such file"),
    (lambda f: (f / "train-00001.idx").unlink(), "train-00001.idx .*No such file"),
    (lambda f: (f / "val-00000.idx").write_bytes(b"123"), "val-00000.idx"),
    (lambda f: (f / "val-00000.idx").write_bytes(b""), "val-00000.idx"),
    (lambda f: (f / "counts.npy").write_bytes(b"not numpy"), "counts.npy"),
    (lambda f: (f / "counts.npy").unlink(), "counts.npy .*No such file"),
    (lambda f: edit(f, lambda meta: meta["train"]["shards"][0].update(file="../x.bin")), "meta.json"),
    (lambda f: edit(f, lambda meta: meta["train"].update(tokens=-1)), "meta.json"),
    (lambda f: edit(f, lambda meta: meta["tokenizer"].update(vocab_size="270")), "meta.json"),
    (lambda f: edit(f, lambda meta: meta.pop("val")), "meta.json"),
    (lambda f: (f / "meta.json").write_text("[]"), "meta.json"),
])
def test_what_is_damaged_is_named(tmp_path, corpus, encoding, damage, message):
    """By the readers, where they can see it without reading everything (a message); by --verify always."""
    prepare(corpus, tmp_path / "out", encoding, holdout=5)
    verify(tmp_path / "out")
    read_all(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match="missing, damaged or other data .*: remove its folder and prepare"):
        verify(tmp_path / "out")
    if message:
        with pytest.raises(ValueError, match=message):
            read_all(tmp_path / "out")


def test_verify_without_asserts(tmp_path, corpus, encoding):
    """python -O leaves them out."""
    meta = prepare(corpus, tmp_path / "out", encoding, holdout=5)
    how = dict(env=os.environ | dict(PYTHONOPTIMIZE="1"))
    n = meta["train"]["tokens"] + meta["val"]["tokens"]
    assert run("--verify", tmp_path / "out", **how).stdout == f"{tmp_path / 'out'} is whole: {n:,} tokens\n"
    edit(tmp_path / "out", lambda meta: meta["train"]["shards"][0].update(file="../x.bin"))
    (tmp_path / "x.bin").write_bytes((tmp_path / "out/train-00000.bin").read_bytes())
    done = run("--verify", tmp_path / "out", **how)
    assert done.returncode == 1 and "meta.json is missing, damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def write_folder(folder: Path, sizes: list[int], vocab_size: int = 2**20) -> Path:
    """A training split of shards of these sizes, whose tokens are 0, 1, 2 ... throughout."""
    first = 0
    for i, size in enumerate(sizes):
        with open(folder / f"train-{i:05d}.bin", "wb") as file:
            file.write(np.array([20240801, 7, size] + [0] * 253, dtype="<i4").tobytes())
            file.write(np.arange(first, first + size, dtype="<u4").tobytes())
        first += size
    listed = [dict(file=f"train-{i:05d}.bin", tokens=size) for i, size in enumerate(sizes)]

    def split(shards):
        return dict(shards=shards, tokens=sum(shard["tokens"] for shard in shards), documents=0)
    (folder / "meta.json").write_text(json.dumps(sealed(dict(
        finished=True, tokenizer=dict(vocab_size=vocab_size), train=split(listed), val=split([])))))
    return folder


def test_two_shards_by_hand(tmp_path):
    """Shards of 8 and 5 tokens, windows of 2 + 1: three in the first, less a token, then two."""
    windows = Windows(write_folder(tmp_path, [8, 5]), "train", 2)
    found = [windows[i].tolist() for i in range(len(windows))]
    assert found == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [8, 9, 10], [10, 11, 12]]
    assert windows.tokens(1, 1, 3).tolist() == [9, 10] and [*windows[-1]] == found[-1]
    with pytest.raises(IndexError):
        windows[5]
    with pytest.raises(ValueError,
                       match="the train split of .* is shorter than one window of 9 tokens: prepare"):
        Windows(tmp_path, "train", 8)
    with pytest.raises(ValueError, match="the val split of .* is shorter than one window"):
        Windows(tmp_path, "val", 2)


def test_ids_beyond_the_vocabulary(tmp_path):
    windows = Windows(write_folder(tmp_path, [100], vocab_size=99), "train", 9)
    with pytest.raises(ValueError, match="train-00000.bin holds the id 99, but the vocabulary has 99"):
        windows[10]


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_more_shards_than_a_process_may_open_at_first(tmp_path):
    write_folder(tmp_path, [8] * 300)
    code = ("import resource, sys, prepare_pile\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 1_000))\n"
            "print(len(prepare_pile.Windows(sys.argv[1], 'train', 2)))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "900\n", done.stderr


def test_identity_is_of_the_content(tmp_path, encoding):
    """Other texts of equal counts are other data; the same ones elsewhere are not."""
    for name, last in (("one", "no. 7"), ("two", "no. 8"), ("again", "no. 7")):
        (tmp_path / "a.jsonl").write_bytes(json_lines([*TEXTS, last]))
        prepare([tmp_path / "a.jsonl"], tmp_path / name, encoding, holdout=3)
    one, two, again = (read_meta(tmp_path / name) for name in ("one", "two", "again"))
    assert one["train"]["tokens"] + one["val"]["tokens"] == two["train"]["tokens"] + two["val"]["tokens"]
    assert one["identity"] == again["identity"] != two["identity"]
