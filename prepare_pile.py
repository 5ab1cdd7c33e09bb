"""Text to shards of tokens, and back.

    python prepare_pile.py                                # this Python's standard library -> data/stdlib
    python prepare_pile.py --pile 0                       # one shard of the Pile, 11 GB -> data/pile
    python prepare_pile.py --input texts/ more.jsonl.zst --encoding o200k_base --out data/mine
    python prepare_pile.py --verify data/mine             # is every byte what it was?

A prepared folder holds `meta.json` (tokenizer, totals, checksums), `counts.npy` (how often each id stands in
the training split) and for each split shards, cut between documents:

    train-00000.bin   llm.c's format: 256 little-endian int32 (20240801, 7, number of tokens, zeros), then the
                      tokens as uint32; `<|endoftext|>` stands before each document
    train-00000.idx   pairs of uint32: where a document starts, and its domain, a place in meta.json's list

One thread reads and parses, the others tokenise: it keeps about ten cores busy. A part of 100 M tokens stays
in memory until it is whole; then it is written, and meta.json says how far the sources are read. So a run may
end at any moment: the same command goes on.
"""
import argparse
import base64
import errno
import gzip
import hashlib
import io
import json
import os
import re
import signal
import sys
import sysconfig
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "val")
PART_TOKENS = 100_000_000       # of a split, in memory and in a shard; a longer document has its own
HEADER = [20240801, 7]          # magic number and version, before the number of tokens
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet() -> bool | None:
    """For tqdm: no bar where TQDM_DISABLE says so, nor in a log."""
    return bool(os.environ.get("TQDM_DISABLE") or not sys.stderr) or None       # None in `2>&-`


@contextmanager
def naming(what, cure="remove its folder and prepare it again"):
    """Whatever goes wrong within, as a ValueError that says with what."""
    try:
        yield
    except (PermissionError, ConnectionError, MemoryError):     # which say what is wrong
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):     # of memory, of a disk
            raise ValueError(f"{what} cannot be read ({error}): once that is mended, try again") from error
        raise ValueError(f"{what} is missing, damaged or other data ({error}): {cure}") from error


def sealed(content: dict) -> dict:
    """The content with a SHA-256 of its own, for JSON that travels."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    return content | dict(sha256=hashlib.sha256(json.dumps(content).encode()).hexdigest())


# ---- Tokenizers: any of tiktoken's by name, or one trained here, whose tokens travel in JSON. --------------

LONGEST_RUN = 100_000           # characters; tiktoken panics at a million spaces
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
           r"\s+(?!\S)|\s+")    # rustbpe's own, after GPT-4's


def own_encoding(name: str, tokens: list[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) < len(tokens) or not {bytes([i]) for i in range(256)} <= ranks.keys():
        raise ValueError("tokens twice, or bytes without one")      # tiktoken would panic
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def train_tokenizer(texts, vocab_size: int, name: str) -> tiktoken.Encoding:
    """A byte-pair encoding of `vocab_size` ids, the last <|endoftext|>, trained on an iterator of texts."""
    import rustbpe  # here, since only preparation needs it
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size=vocab_size - 1)
    return own_encoding(name, [bytes(token) for token, _ in trainer.get_mergeable_ranks()])


def get_encoding(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding of that name. Raises ValueError, or ConnectionError."""
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(f"unknown encoding {name!r}: choose from {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:      # requests' errors, whose package we do not import
        raise ConnectionError(f"tiktoken could not load {name} ({type(error).__name__}): it downloads it "
                              "once; offline, point TIKTOKEN_CACHE_DIR at a folder that has it") from error


def tokenizer_to_json(encoding: tiktoken.Encoding) -> dict:
    """Name and size, sealed; with pattern and tokens in order where tiktoken does not know the name."""
    known = dict(name=encoding.name, vocab_size=encoding.n_vocab)
    if encoding.name not in tiktoken.list_encoding_names():
        ordered = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
        tokens = [base64.b64encode(token).decode() for token in ordered]
        known |= dict(pattern=encoding._pat_str, tokens=tokens)
    return sealed(known)


def tokenizer_from_json(known: dict) -> tiktoken.Encoding:
    """The encoding that tokenizer_to_json described. Raises ValueError if it is not the same any more."""
    encoding = None if "tokens" in known else get_encoding(known.get("name"))
    with naming("the tokenizer's description"):
        if known != sealed(known):
            raise ValueError("its SHA-256 differs")
        if not encoding:
            if known["pattern"] != PATTERN:         # one that is made to, can take for ever
                raise ValueError("an unknown pattern")
            tokens = [base64.b64decode(token, validate=True) for token in known["tokens"]]
            encoding = own_encoding(known["name"], tokens)
        if encoding.n_vocab != known["vocab_size"]:
            raise ValueError(f"{encoding.n_vocab:,} ids, not {known['vocab_size']}")
    return encoding


def cut_runs(text: str) -> list[str]:
    """The text, cut so that no run of whitespace, nor without it, is longer than twice LONGEST_RUN.

    tiktoken takes ever more memory for such a run, or panics. Other texts stay whole, with its exact tokens.
    """
    def is_run(part):
        return len(part) == LONGEST_RUN and (part.isspace() or part.split(None, 1) == [part])
    cuts = [i for i in range(LONGEST_RUN, len(text), LONGEST_RUN) if is_run(text[i:i + LONGEST_RUN])]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, None])]


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Its tokens; a literal <|endoftext|> is text."""
    return [token for part in cut_runs(text) for token in encoding.encode_ordinary(part)]


def token_bytes(encoding: tiktoken.Encoding) -> list[bytes]:
    """What each id spells: nothing for special tokens, and for ids that no token has."""
    spelling = {rank: token for token, rank in encoding._mergeable_ranks.items()}
    return [spelling.get(i, b"") for i in range(encoding.n_vocab)]


# ---- Sources: which files there are, and the documents in them. Memory is bounded, whatever a file says. ---

PILE = dict(repo_id="monology/pile-uncopyrighted", repo_type="dataset",
            revision="3be90335b66f24456a5d6659d9c8d208c0357119")
LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl", ".json")     # of JSON, each with a "text"
TEXT = (".txt", ".md", ".rst", ".py")                           # one document a file
LONGEST_DOCUMENT = 2**27        # bytes of a line or a text file, which must be held in memory as a whole


def stdlib_files() -> list[Path]:
    """The sources of this Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [path for path in sorted(root.rglob("*.py")) if not skip & {*path.relative_to(root).parts}]


def download_pile(shards: list[int]) -> list[Path]:
    """The Pile's validation file and these shards, from Hugging Face or its cache."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ValueError("--pile needs huggingface_hub: pip install huggingface_hub") from error
    files = []
    for name in ("val.jsonl.zst", *(f"train/{n:02d}.jsonl.zst" for n in shards)):
        try:
            files.append(Path(hf_hub_download(filename=name, **PILE)))
        except Exception as error:      # of httpx, of huggingface_hub, OSError
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"could not download {name} of {PILE['repo_id']} ({reason}): try again, what "
                             "has come is kept") from error
    return files


def format_of(path: Path, format: str | None = None) -> str | None:
    """"jsonl" or "text", by the suffix before .gz or .zst, in any case; None: unknown."""
    suffix = Path(re.sub(r"\.(gz|zst)$", "", path.name.lower())).suffix
    return format or ("jsonl" if suffix in LINES else "text" if suffix in TEXT else None)


def find_files(names: list[str], format: str | None = None) -> list[Path]:
    """Files as they are, and of folders those that are not hidden, of a known format and no meta.json."""
    def refuse(error):
        raise error                     # rglob would leave out a folder that may not be read, and say nothing

    files = []
    for path in map(Path, names):
        walk = os.walk(path, onerror=refuse) if path.is_dir() else ()
        inside = (Path(folder, name) for folder, folders, own in walk for name in (*folders, *own))
        inside = sorted(p for p in inside if p.is_file() or p.is_symlink())             # also to a folder
        found = [p for p in inside if p.is_file() and format_of(p, format) and p.name != "meta.json"
                 and not any(part.startswith(".") for part in p.relative_to(path).parts)] or [path]
        if not found[0].is_file():
            raise ValueError(f"{path} is no file, nor a folder with text in it: check --input and --val")
        if left := sorted({*inside} - {*found}):
            print(f"{path}: {len(left):,} left out, hidden, a link or of unknown format, as {left[0].name}")
        files += found
    return files


def opened(path: Path, file):
    """The content of an open file, of all its members or frames if it is compressed."""
    if path.suffix.lower() == ".gz":
        content = gzip.GzipFile(fileobj=file)
    elif path.suffix.lower() == ".zst":
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        content = zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})
    else:
        return file
    return io.BufferedReader(content, 2**18)        # in large pieces: each waits for the interpreter's lock


def parse(line: bytes) -> tuple[str, str]:
    """Text and domain (`pile_set_name`) of a line of JSON. Raises ValueError."""
    document = json.loads(line)
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise ValueError('not a JSON object with a string "text"')
    document["text"].encode()       # raises for half a surrogate pair, which JSON may hold
    about = document.get("meta")
    domain = about.get("pile_set_name") if isinstance(about, dict) else None
    domain = domain[:100] if isinstance(domain, str) else "(none)"
    return document["text"], domain.encode(errors="replace").decode()


def documents(path, format: str | None = None, skip_bad: bool = False, on_read=lambda n: None):
    """Yields (text, domain) of each document. Raises ValueError with file and line of what cannot be read.

    skip_bad: yields (None, where and why) in its place. Lines end at \\n alone: text may hold U+2028, U+0085.
    """
    def read() -> bytes:
        try:
            return content.readline(limit) if format == "jsonl" else content.read(limit)
        except Exception as error:              # of gzip, zlib, zstd, the disk
            raise ValueError(f"{path} cannot be read ({error}): fetch it again") from error

    path, limit, seen = Path(path), LONGEST_DOCUMENT + 1, 0
    if not (format := format_of(path, format)):
        raise ValueError(f"{path} is of an unknown format: say --format jsonl or --format text")
    with open(path, "rb") as file, opened(path, file) as content:
        if content is not file and not path.stat().st_size:
            raise ValueError(f"{path} is empty: fetch it again")
        for number in count(1):
            piece = read()
            on_read(file.tell() - seen)
            seen = file.tell()
            try:
                if len(piece) == limit:
                    raise ValueError(f"more than {LONGEST_DOCUMENT >> 20} MB")
                if format == "text":
                    yield piece.decode("utf-8-sig"), "(none)"
                elif piece.strip():
                    yield parse(piece)
            except (ValueError, RecursionError) as error:
                bad = f"{path}:{number}: {error}"
                if not skip_bad:
                    raise ValueError(f"{bad}: leave out such lines with --skip-bad, or mend it and prepare "
                                     "all anew") from error
                yield None, bad
                while len(piece) == limit and piece[-1:] != b"\n":      # the rest of what is too long
                    piece = read()
            if format == "text" or not piece:
                return


# ---- The writer. -------------------------------------------------------------------------------------------

AHEAD = 2**23                   # characters for each thread, so that none waits while a part is written
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # by CIFS, NFS


@contextmanager
def written_whole(path: Path):
    """A temporary path to write to. It takes the name `path` once it is whole and on the disk."""
    path = Path(os.path.realpath(path))             # of a link, what it points to
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        with open(partial, "rb+") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path):
    """Raises ValueError while another process writes to the folder. The file .lock stays; it does no harm."""
    import filelock  # here, since readers do without it
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ValueError(f"another run is writing {folder} just now: wait, or use another --out") from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print(f"{folder} cannot be locked ({error.strerror}): let nothing else write there", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Unfinished:
    """A folder that is being written: meta.json, and the part of both splits that it does not count yet."""
    def __init__(self, folder: Path, request: dict):
        self.folder, self.file, self.meta = folder, folder / "meta.json", None
        self.tokens, self.index = ({split: array("I") for split in SPLITS} for _ in range(2))
        if self.file.exists():
            meta = read_meta(folder, finished=False)
            changed = [key for key in request if request[key] != meta["request"][key]]
            if changed and meta["position"] != [0, 0]:      # else nobody's work is lost by another command
                raise ValueError(f"{folder} was begun by another command or from other files ({changed[0]} "
                                 "differ): repeat that, remove the folder, or choose another --out")
            self.meta = None if changed else meta
            for shard in meta["train"]["shards"] + meta["val"]["shards"]:
                open_shard(folder, shard)               # for its checks, before any work
        elif others := {*os.listdir(folder)} - {".lock", ".meta.json.tmp", "lost+found"}:
            raise ValueError(f"{folder} holds something else ({min(others)}): choose another --out")

    def begin(self, request: dict, encoding: tiktoken.Encoding):
        self.meta = dict(finished=False, request=request, tokenizer=tokenizer_to_json(encoding),
                         end_of_text=encoding.encode_single_token(END_OF_TEXT), domains=[],
                         skipped=dict(lines=0, first=None),
                         **{split: dict(domains={}, shards=[]) for split in SPLITS})
        self.save([0, 0])

    def add(self, position: list[int], split: str | None, tokens: bytes, n_bytes: int, domain: str):
        """Count in the document at this position; split None: one that could not be read, `domain` says why.

        Where the part has no room for it, that is written before.
        """
        n, domains, skipped = len(tokens) // 4, self.meta["domains"], self.meta["skipped"]
        if not split:
            skipped.update(lines=skipped["lines"] + 1, first=skipped["first"] or domain)
            return
        if 0 < len(self.tokens[split]) > PART_TOKENS - n:
            self.save(position)
        if domain not in domains:
            domains.append(domain)
        self.index[split].extend((len(self.tokens[split]), domains.index(domain)))
        self.tokens[split].frombytes(tokens)
        totals = self.meta[split]["domains"].setdefault(domain, dict(documents=0, bytes=0, tokens=0))
        for key, more in (("documents", 1), ("bytes", n_bytes), ("tokens", n)):
            totals[key] += more

    def save(self, position: list[int]):
        """Write the part, then meta.json, which counts it: the sources are read up to (source, document)."""
        for split in SPLITS:
            about, n = self.meta[split], len(self.tokens[split])
            if n:
                path = self.folder / f"{split}-{len(about['shards']):05d}.bin"
                about["shards"].append(dict(
                    file=path.name, tokens=n,
                    sha256=self.write(path, array("i", [*HEADER, n, *[0] * 253]), self.tokens[split]),
                    index_sha256=self.write(path.with_suffix(".idx"), self.index[split])))
                self.tokens[split], self.index[split] = array("I"), array("I")
            about |= {key: sum(totals[key] for totals in about["domains"].values())
                      for key in ("documents", "bytes", "tokens")}
        self.meta["position"] = position
        self.write(self.file, json.dumps(sealed(self.meta), indent=1).encode())

    def write(self, path: Path, *contents) -> str:
        """-> its SHA-256"""
        with written_whole(path) as partial, open(partial, "wb") as file:
            for content in contents:
                file.write(content)
        return sha256(path)

    def finish(self, position: list[int]):
        """The last part, counts.npy, and the loss of an add-one unigram model, which is to be beaten."""
        for split in SPLITS:
            if not self.meta[split]["domains"]:
                raise ValueError(f"no documents for {split}: give more, or a validation file with --val")
        self.save(position)
        train, val = counts = np.zeros((2, self.meta["tokenizer"]["vocab_size"]), dtype=np.int64)
        for own, split in zip(counts, SPLITS):
            for shard in self.meta[split]["shards"]:
                for tokens in np.array_split(open_shard(self.folder, shard), 100):      # copied, to int64
                    own += np.bincount(tokens, minlength=len(own))
        np.save(content := io.BytesIO(), train)
        digest = self.write(self.folder / "counts.npy", content.getbuffer())
        loss = -(val * np.log((train + 1) / (train + 1).sum())).sum() / val.sum()
        content = {key: self.meta[key] for key in ("tokenizer", *SPLITS)}       # whatever its sources' names
        self.meta |= dict(finished=True, counts_sha256=digest, unigram_val_loss=float(loss),
                          identity=sealed(content)["sha256"])
        self.save(position)


def in_order(function, items, threads: int):
    """function(*item) of each, in order, by threads that are never far ahead."""
    ahead, waiting = deque(), 0
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            size = 2_000 + len(item[1] or "")       # of its text, and about what waiting takes
            ahead.append((size, pool.submit(function, *item)))
            waiting += size
            while waiting > AHEAD * threads:
                size, future = ahead.popleft()
                waiting -= size
                yield future.result()
        for _, future in ahead:
            yield future.result()


def check(holdout: int, threads: int, vocab_size: int):
    limits = ("holdout", holdout, 2), ("threads", threads, 1), ("vocab-size", vocab_size, 257)
    for name, value, least in limits:
        if not least <= value <= 2**24:
            raise ValueError(f"--{name} {value}: it must be {least} to {2**24:,}")


def prepare(files, out, encoding: tiktoken.Encoding | None = None, val_files=(), holdout: int = 20,
            threads: int = 1, skip_bad: bool = False, vocab_size: int = 32_768,
            format: str | None = None) -> dict:
    """Tokenise `files` into the folder `out`; go on where an interrupted run of the same was. -> meta.json

    Validation is `val_files`, or one document in `holdout`. encoding None: byte pairs, `vocab_size` of them,
    trained on the training documents. Raises ValueError, and OSError where a file or the disk refuses.
    """
    check(holdout, threads, vocab_size)
    folder = Path(out)
    files = [path for path in map(Path, files) if folder.resolve() not in path.resolve().parents]   # its own
    sources = [*map(Path, val_files), *files]
    # what cannot be read, or holds nothing to validate on, is refused before any work
    empty = [next(documents(path, format, skip_bad), None) is None for path in sources]
    if val_files and all(empty[:len(val_files)]):
        raise ValueError("no documents for val: name another file with --val")
    digests, first = [sha256(path) for path in sources], {}
    held_out = {*digests[:len(val_files)]} - {hashlib.sha256().hexdigest()}     # empty files are alike
    for i, path in enumerate(sources):
        if first.setdefault(path.resolve(), i) < i or i >= len(val_files) and digests[i] in held_out:
            raise ValueError(f"{path} is named twice, or holds what a file for validation holds: name each "
                             "file once, for training or for validation")
    request = dict(sources=[[path.name, digest] for path, digest in zip(sources, digests)], format=format,
                   validation=[len(val_files), None if val_files else holdout],
                   tokenizer=encoding.name if encoding else vocab_size)

    def split_of(source: int, text: str) -> str:                # by hash: exact duplicates stay on one side
        if val_files:
            return "val" if source < len(val_files) else "train"
        digest = hashlib.sha256(text.encode()).digest()
        return "train" if int.from_bytes(digest[:8], "big") % holdout else "val"

    def unread(begun: list[int], on_read):
        for source in range(begun[0], len(sources)):
            for number, item in enumerate(documents(sources[source], format, skip_bad, on_read)):
                if [source, number] >= begun:                   # others are read again, but not tokenised
                    yield [source, number], *item

    def tokenise(position, text, domain):
        if text is None:
            return position, None, b"", 0, domain
        parts = (tokenizer.encode_to_numpy(part, disallowed_special=()) for part in cut_runs(text))
        return position, split_of(position[0], text), b"".join([start, *parts]), len(text.encode()), domain

    Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)       # of a dangling link, its target
    with locked(folder):
        unfinished = Unfinished(folder, request)
        if not unfinished.meta:
            texts = (part for i, path in enumerate(sources) for text, _ in documents(path, format, skip_bad)
                     if text is not None and split_of(i, text) == "train" for part in cut_runs(text))
            encoding = encoding or train_tokenizer(texts, vocab_size, f"bpe{vocab_size}")
            unfinished.begin(request, encoding)
        meta, tokenizer = unfinished.meta, tokenizer_from_json(unfinished.meta["tokenizer"])
        start, sizes = np.uint32(meta["end_of_text"]).tobytes(), [path.stat().st_size for path in sources]
        if not meta["finished"]:
            done = sum(sizes[:meta["position"][0]])
            with tqdm(desc=f"tokenising into {folder}", total=sum(sizes), initial=done, unit="B",
                      unit_scale=True, disable=quiet()) as bar:
                for document in in_order(tokenise, unread(meta["position"], bar.update), threads):
                    unfinished.add(*document)
            unfinished.finish([len(sources), 0])
    report(meta := read_meta(folder))
    return meta


def report(meta: dict):
    """The table by domain, and what was left out."""
    print(f"\n{'':32}{'documents':>14}{'bytes':>20}{'tokens':>18}{'bytes/token':>13}")
    for split in SPLITS:
        for name, n in [*meta[split]["domains"].items(), (f"{split} in all", meta[split])]:
            print(f"{name:32.32}{n['documents']:>14,}{n['bytes']:>20,}{n['tokens']:>18,}"
                  f"{n['bytes'] / n['tokens']:>13.3f}")
    if n := meta["skipped"]["lines"]:
        print(f"\nleft out, as they could not be read: {n:,}, first {meta['skipped']['first']}")
    print(f"\n{meta['tokenizer']['vocab_size']:,} ids; "
          f"a unigram model's validation loss: {meta['unigram_val_loss']:.3f} nats per token")


def prepare_stdlib(out="data/stdlib", vocab_size: int = 32_768) -> dict:
    """The default data, which every machine has: Python's own standard library. What is finished stays."""
    with suppress(ValueError):
        return read_meta(out)
    return prepare(stdlib_files(), out, threads=THREADS, vocab_size=vocab_size)


# ---- The reader. -------------------------------------------------------------------------------------------

def read_meta(folder, finished: bool = True) -> dict:
    """meta.json of a prepared folder, checked; False: of an unfinished one too. Raises ValueError."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ValueError(f"no prepared data in {folder} (no meta.json): name a folder that prepare_pile.py "
                         "has written, or make one: prepare_pile.py --input FILE --out DIR")
    with naming(path):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta != sealed(meta):
            raise ValueError("its SHA-256 differs")
    if finished and not meta["finished"]:
        raise ValueError(f"{folder} is unfinished: the same command goes on")
    return meta


def checked(path: Path, digest: str) -> Path:
    """The path. Raises ValueError unless its content has this SHA-256."""
    with naming(path):
        if sha256(path) != digest:
            raise ValueError("its SHA-256 differs")
    return path


def read_counts(folder) -> np.ndarray:
    """How often each id stands in the training split. -> (V) int64. Raises ValueError."""
    return np.load(checked(Path(folder) / "counts.npy", read_meta(folder)["counts_sha256"]))


def read_index(folder, shard: dict) -> np.ndarray:
    """"start" and "domain" of each document in a shard, as meta.json lists it. Raises ValueError."""
    path = checked((Path(folder) / shard["file"]).with_suffix(".idx"), shard["index_sha256"])
    return np.fromfile(path, dtype=[("start", "<u4"), ("domain", "<u4")])


def open_shard(folder, shard: dict) -> np.ndarray:
    """The tokens of a shard, as meta.json lists it, memory-mapped. Raises ValueError if it is not whole."""
    with naming(path := Path(folder) / shard["file"]):
        words = np.memmap(path, dtype="<u4", mode="r").view(np.ndarray)
        if [*words[:3], len(words) - 256] != [*HEADER, shard["tokens"], shard["tokens"]]:
            raise ValueError(f"not a shard of {shard['tokens']:,} tokens")
        return words[256:]


def verify(folder) -> dict:
    """Read every byte of a prepared folder. -> meta.json. Raises ValueError where one is not what it was."""
    meta = read_meta(folder)
    read_counts(folder)
    for shard in meta["train"]["shards"] + meta["val"]["shards"]:
        checked(Path(folder) / shard["file"], shard["sha256"])
        read_index(folder, shard)
    return meta


class Windows:
    """One split of a prepared folder as windows of seq_len + 1 tokens, which start at multiples of seq_len.

    Windows cross documents, not shards; the tail of a shard that fills no window is dropped.
    """
    def __init__(self, folder, split: str, seq_len: int):
        self.folder, self.meta, self.seq_len = Path(folder), read_meta(folder), seq_len
        self.shards = self.meta[split]["shards"]
        for shard in self.shards:
            open_shard(folder, shard)       # for its checks; it is opened again for each reading
        self.ends = np.cumsum([0, *(max(0, shard["tokens"] - 1) // seq_len for shard in self.shards)])
        if not len(self):
            raise ValueError(f"the {split} split of {folder} is shorter than one window of {seq_len + 1} "
                             "tokens: prepare more text, or take shorter windows")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        """Window i in file order. -> (seq_len + 1) int64"""
        i = range(len(self))[i]             # as of a list: the last is -1, and none is beyond
        shard = int(np.searchsorted(self.ends, i, side="right")) - 1
        start = (i - int(self.ends[shard])) * self.seq_len
        return self.tokens(shard, start, start + self.seq_len + 1)

    def tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Part of a shard. -> (stop - start) int64. Raises ValueError for ids beyond the vocabulary."""
        tokens = open_shard(self.folder, self.shards[shard])[start:stop].astype(np.int64)
        if tokens.max(initial=0) >= (V := self.meta["tokenizer"]["vocab_size"]):
            raise ValueError(f"{self.folder / self.shards[shard]['file']} holds the id {tokens.max()}, but "
                             f"the vocabulary has {V:,}: prepare the data again")
        return tokens


# ---- The commands. -----------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__)
    option = parser.add_argument
    source, tokens = (parser.add_mutually_exclusive_group() for _ in range(2))
    source.add_argument("--input", nargs="+", action="extend", metavar="FILE",
                        help=f"files or folders ({' '.join(LINES + TEXT)}, plain, .gz or .zst)")
    source.add_argument("--pile", nargs="+", action="extend", type=int, choices=range(30), metavar="N",
                        help="download these of the Pile's 30 shards (uncopyrighted) and its validation file")
    source.add_argument("--verify", type=Path, metavar="DIR", help="check every byte of a prepared folder")
    option("--format", choices=("jsonl", "text"), help='lines of JSON with a "text", or one document a file')
    option("--val", nargs="+", action="extend", default=[], metavar="FILE",
           help="for validation [the Pile's, or --holdout]")
    option("--holdout", type=int, default=20, metavar="N", help="or one document in N, by hash [%(default)s]")
    tokens.add_argument("--encoding", help="of tiktoken's [o200k_base for the Pile, else one trained here]")
    tokens.add_argument("--vocab-size", type=int, metavar="N", help="of one that is trained here [32768]")
    option("--out", type=Path, metavar="DIR", help="[data/pile or data/stdlib]")
    option("--threads", type=int, default=THREADS, metavar="N", help="that tokenise [%(default)s]")
    option("--skip-bad", action="store_true", help="leave out lines that cannot be read, and count them")
    args = parser.parse_args()
    if args.verify:
        meta = verify(args.verify)
        print(f"{args.verify} is whole: {sum(meta[split]['tokens'] for split in SPLITS):,} tokens")
        return
    if args.input and not args.out:
        raise ValueError("--input needs --out: name a folder, such as data/mine")
    val_files, trained = find_files(args.val, args.format), args.vocab_size is not None
    vocab_size = args.vocab_size if trained else 32_768
    check(args.holdout, args.threads, vocab_size)       # before a download
    name = args.encoding or ("o200k_base" if args.pile and not trained else None)
    encoding = get_encoding(name) if name else None
    if args.pile:
        pile_val, *files = download_pile([*dict.fromkeys(args.pile)])
        val_files = val_files or [pile_val]
    else:
        files = find_files(args.input, args.format) if args.input else stdlib_files()
    prepare(files, args.out or Path("data/pile" if args.pile else "data/stdlib"), encoding, val_files,
            args.holdout, args.threads, args.skip_bad, vocab_size, args.format)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends it at once: any moment will do
    sys.setswitchinterval(5e-4)                     # seconds that a thread with tokens waits for the reader
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")    # where a character of a domain is lacking, "?"
    try:
        main()
    except ValueError as error:
        sys.exit(f"prepare_pile.py: {error}")
    except MemoryError:
        sys.exit("prepare_pile.py: out of memory: lower --threads, or cut the longest documents in pieces")
    except OSError as error:
        sys.exit(f"prepare_pile.py: {error}: once that is mended, the same command goes on")
