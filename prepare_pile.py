"""Text to binary token shards, and the reader of those shards: the one place that knows their format.

    python prepare_pile.py                                          # this Python's standard library -> data/stdlib
    python prepare_pile.py --input 00.jsonl.zst --val val.jsonl.zst --encoding o200k_base --out data/pile

A prepared folder holds shards of 100 M tokens, `train-00000.bin` ... and `val-00000.bin` ..., and a `meta.json` with the
tokenizer and the counts. A shard is llm.c's: 256 little-endian int32 (20240801, 7, number of tokens, zeros), then uint32
tokens. `<|endoftext|>` stands before each document. A folder appears under its name only when it is whole.
"""
import argparse
import base64
import hashlib
import json
import os
import shutil
import sys
import sysconfig
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from leviathan import InputError, read_json

MAGIC, VERSION, HEADER_BYTES = 20240801, 7, 1024
TOKEN = np.dtype("<u4")
SHARD_TOKENS = 100_000_000
END_OF_TEXT = "<|endoftext|>"
STDLIB_VOCABULARY = 8_192


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: any of tiktoken's by name, or one trained here, whose merges travel in the JSON.

def train_tokenizer(texts, vocab_size: int, name: str) -> tiktoken.Encoding:
    """A byte-pair encoding of `vocab_size` ids, the last of them <|endoftext|>, trained on an iterator of texts."""
    import rustbpe  # here, since only preparation needs it
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size=vocab_size - 1)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return tiktoken.Encoding(name, pat_str=trainer.get_pattern(), mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})


def fingerprint(encoding: tiktoken.Encoding) -> str:
    """SHA-256 of all that decides how text is split: pattern, ranks and special tokens."""
    ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    return hashlib.sha256(json.dumps([encoding._pat_str, ranks, sorted(encoding._special_tokens.items())]).encode()).hexdigest()


def tokenizer_to_json(encoding: tiktoken.Encoding) -> dict:
    """Name, size and fingerprint; with pattern and tokens in rank order where tiktoken does not know the name."""
    known = dict(name=encoding.name, vocab_size=encoding.n_vocab, fingerprint=fingerprint(encoding))
    if encoding.name in tiktoken.list_encoding_names():
        return known
    tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    return known | dict(pattern=encoding._pat_str, tokens=[base64.b64encode(token).decode() for token in tokens])


def get_encoding(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding of that name, with its errors made clear."""
    if name not in tiktoken.list_encoding_names():
        raise InputError(f"unknown encoding {name!r}: choose from {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:      # requests' errors, whose package we do not import
        raise InputError(f"tiktoken could not load {name} ({type(error).__name__}): it downloads the encoding once; "
                         "without internet, point TIKTOKEN_CACHE_DIR at a folder that holds it") from error


def tokenizer_from_json(known: dict) -> tiktoken.Encoding:
    """The encoding that tokenizer_to_json described. Raises InputError if it is not the same any more."""
    try:
        if "tokens" in known:
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(known["tokens"])}
            encoding = tiktoken.Encoding(known["name"], pat_str=known["pattern"], mergeable_ranks=ranks,
                                         special_tokens={END_OF_TEXT: len(ranks)})
        else:
            encoding = get_encoding(known["name"])
        same = fingerprint(encoding) == known["fingerprint"] and encoding.n_vocab == known["vocab_size"]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the tokenizer's description is damaged ({error!r}): prepare the data again") from error
    if not same:
        raise InputError(f"the tokenizer {known['name']} does not match: it is not the one that made the data "
                         "(vocabulary or fingerprint differ); prepare the data again")
    return encoding


# ---------------------------------------------------------------------------------------------------------------------
# Documents: whole text files, or the field "text" of JSON lines; plain or zstd.

def read_blocks(path: Path, progress):
    """The bytes of a file in blocks, through zstd where its name ends so: all frames, and the last one whole."""
    import zstandard  # here, since reading shards does not need it
    decompressor = None
    with open(path, "rb") as file:
        while block := file.read(2**20):
            progress(len(block))
            if path.suffix != ".zst":
                yield block
                continue
            while block:
                decompressor = decompressor or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                try:
                    yield decompressor.decompress(block)
                except zstandard.ZstdError as error:
                    raise InputError(f"{path} is not valid zstd ({error}): fetch it again") from error
                block = decompressor.unused_data
                decompressor = None if decompressor.eof else decompressor
    if decompressor is not None:
        raise InputError(f"{path} is cut short (its last zstd frame has no end): fetch it again")


def lines(blocks):
    """Lines of bytes, split at \\n alone: text may hold U+2028 and U+0085, which splitlines() would split too."""
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    yield rest


def documents(path: Path, progress=lambda n: None):
    """The texts in a file. Raises InputError with file and line number where one is not to be read."""
    if ".json" not in "".join(path.suffixes):
        try:
            yield b"".join(read_blocks(path, progress)).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 (byte {error.start}): convert it") from error
        return
    for number, line in enumerate(lines(read_blocks(path, progress)), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()           # a lone surrogate is valid JSON, not valid text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a JSON object with a valid \"text\" ({error!r}): "
                             "mend or remove the line") from error
        yield text


def stdlib_files() -> list[Path]:
    """The sources of this Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    if not files:
        raise InputError(f"no sources of the standard library in {root}: name your own text with --input")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Writing.

class ShardWriter:
    """Writes tokens of one split into shards, each under a temporary name until it is whole."""
    def __init__(self, folder: Path, split: str, vocab_size: int):
        self.folder, self.split = folder, split
        self.file, self.shards, self.documents = None, [], 0
        self.counts = np.zeros(vocab_size, dtype=np.int64)

    def write(self, tokens: list[int]):
        """Append one document."""
        tokens = np.asarray(tokens, dtype=TOKEN)
        self.documents += 1
        np.add.at(self.counts, tokens, 1)
        while len(tokens):
            if self.file is None:
                self.path = self.folder / f"{self.split}-{len(self.shards):05d}.bin"
                self.file = open(f"{self.path}.tmp", "wb")
                self.file.write(bytes(HEADER_BYTES))
                self.in_shard = 0
            part, tokens = np.split(tokens, [SHARD_TOKENS - self.in_shard])
            self.file.write(part.tobytes())
            self.in_shard += len(part)
            if self.in_shard == SHARD_TOKENS:
                self.finish_shard()

    def finish_shard(self):
        if self.file is None:
            return
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.in_shard
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(f"{self.path}.tmp", self.path)
        self.shards.append(dict(file=self.path.name, tokens=self.in_shard))
        self.file = None

    def summary(self) -> dict:
        return dict(documents=self.documents, tokens=int(self.counts.sum()), distinct_ids=int((self.counts > 0).sum()),
                    shards=self.shards)


def held_out(text: str, one_in: int) -> bool:
    """Whether a document belongs to validation: by its text, so that exact duplicates stay on one side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % one_in == 0


def prepare(files: list[Path], out: Path, encoding: tiktoken.Encoding | None, val_files: list[Path] = (),
            holdout: int = 20) -> dict:
    """Tokenise `files` into the new folder `out` and return its meta.json.

    Validation is `val_files`, or one document in `holdout`. encoding None: trained on the training documents.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: remove it or choose another --out")
    for file in (*files, *val_files):
        if not file.is_file():
            raise InputError(f"{file} is not a file that can be read: check --input and --val")
    in_validation = lambda text: not val_files and held_out(text, holdout)      # noqa: E731
    if encoding is None:
        print(f"training a byte-pair vocabulary of {STDLIB_VOCABULARY:,} on {len(files):,} files")
        texts = (text for file in files for text in documents(file) if not in_validation(text))
        encoding = train_tokenizer(texts, STDLIB_VOCABULARY, f"bpe{STDLIB_VOCABULARY}")
    end_of_text = encoding.encode_single_token(END_OF_TEXT)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        train, val = (ShardWriter(partial, split, encoding.n_vocab) for split in ("train", "val"))
        with tqdm(total=sum(f.stat().st_size for f in (*files, *val_files)), unit="B", unit_scale=True,
                  desc=f"tokenising into {out}", mininterval=0.5) as bar:
            def flush(batch):
                encoded = encoding.encode_ordinary_batch([text for _, text in batch], num_threads=os.cpu_count() or 1)
                for (writer, _), tokens in zip(batch, encoded):
                    writer.write([end_of_text, *tokens])

            marked = chain(((val if in_validation(text) else train, text) for f in files for text in documents(f, bar.update)),
                           ((val, text) for f in val_files for text in documents(f, bar.update)))
            batch, size = [], 0
            for writer, text in marked:
                batch.append((writer, text))
                size += len(text)
                if size > 2**22:
                    flush(batch)
                    batch, size = [], 0
            flush(batch)
        for writer, name in ((train, "training"), (val, "validation")):
            writer.finish_shard()
            if not writer.shards:
                raise InputError(f"no {name} documents among {train.documents + val.documents} in all: give more "
                                 "documents, or a validation file of its own with --val")
        frequency = (train.counts + 1) / (train.counts + 1).sum()       # the add-one unigram model: what to beat
        meta = dict(tokenizer=tokenizer_to_json(encoding), end_of_text=end_of_text,
                    sources=[file.name for file in files][:100], train=train.summary(), val=val.summary(),
                    unigram_val_loss=float(-(val.counts * np.log(frequency)).sum() / val.counts.sum()))
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for split in ("train", "val"):
        print(f"{split:>5}: {meta[split]['documents']:,} documents, {meta[split]['tokens']:,} tokens, "
              f"{meta[split]['distinct_ids']:,} distinct ids in {len(meta[split]['shards'])} shards")
    print(f"a unigram model's validation loss: {meta['unigram_val_loss']:.3f} nats per token")
    return meta


def prepare_stdlib(out: Path = Path("data/stdlib")) -> dict:
    """The default data, which every machine has: Python's own standard library."""
    return prepare(stdlib_files(), out, encoding=None)


# ---------------------------------------------------------------------------------------------------------------------
# Reading.

def read_meta(folder: Path) -> dict:
    """meta.json of a prepared folder, checked. Raises InputError."""
    if not (folder / "meta.json").is_file():
        raise InputError(f"no prepared data in {folder} (no meta.json): run prepare_pile.py --input FILE --out {folder}")
    meta = read_json(folder / "meta.json")
    try:
        for split in ("train", "val"):
            assert all(isinstance(s["file"], str) and isinstance(s["tokens"], int) for s in meta[split]["shards"])
        assert isinstance(meta["tokenizer"]["vocab_size"], int) and isinstance(meta["end_of_text"], int)
    except (KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{folder / 'meta.json'} lacks a field or has one of the wrong kind ({error!r}): "
                         "prepare the data again") from error
    return meta


def open_shard(path: Path, tokens: int) -> np.memmap:
    """The tokens of a shard, memory-mapped. Raises InputError for anything but a whole shard of that many tokens."""
    if not path.is_file():
        raise InputError(f"{path} is missing, though meta.json lists it: prepare the data again")
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != MAGIC or header[1] != VERSION:
        raise InputError(f"{path} is not a token shard (magic {header[:2].tolist()}, expected [{MAGIC}, {VERSION}]): "
                         "prepare the data again")
    size = HEADER_BYTES + TOKEN.itemsize * tokens
    if header[2] != tokens or path.stat().st_size != size:
        raise InputError(f"{path} is truncated or of other data: {path.stat().st_size:,} bytes and {header[2]:,} tokens in "
                         f"its header, expected {size:,} and {tokens:,}: prepare the data again")
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES)


def permute(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """A seeded permutation of 0 ... n-1, computed at the given indices rather than stored.

    A Feistel network permutes 0 ... 4^bits - 1; where it leads outside, it is applied again ("cycle walking").
    """
    bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)
    keys = np.random.default_rng(seed).integers(2**63, size=6, dtype=np.uint64)

    def walk(x):
        left, right = x >> bits, x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)        # Knuth's multiplicative hash, modulo 2^64
            mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        return left << bits | right

    x = walk(np.asarray(index, dtype=np.uint64))
    while (outside := x >= n).any():
        x[outside] = walk(x[outside])
    return x.astype(np.int64)


class Windows:
    """One split of a prepared folder as windows of seq_len + 1 tokens, which start at multiples of seq_len in a shard.

    Windows cross documents, not shards; the tail of a shard that fills no window is dropped.
    """
    def __init__(self, folder, split: str, seq_len: int):
        self.meta = read_meta(Path(folder))
        self.seq_len, self.vocab_size = seq_len, self.meta["tokenizer"]["vocab_size"]
        listed = self.meta[split]["shards"]
        self.paths = [Path(folder) / shard["file"] for shard in listed]
        self.shards = [open_shard(path, shard["tokens"]) for path, shard in zip(self.paths, listed)]
        self.ends = np.cumsum([max(0, len(shard) - 1) // seq_len for shard in self.shards])
        if not len(self):
            raise InputError(f"the {split} split of {folder} is shorter than one window of {seq_len + 1} tokens: "
                             "lower --seq-len or prepare more text")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> np.ndarray:
        """Window i in file order. -> (seq_len + 1) int64"""
        shard = int(np.searchsorted(self.ends, i, side="right"))
        start = (i - (self.ends[shard - 1] if shard else 0)) * self.seq_len
        return self.tokens(shard, start, start + self.seq_len + 1)

    def tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Part of a shard. -> (stop - start) int64. Raises InputError for ids beyond the vocabulary."""
        tokens = self.shards[shard][start:stop].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise InputError(f"{self.paths[shard]} holds the id {tokens.max()}, but the vocabulary has {self.vocab_size:,}: "
                             "the shard is damaged or of another tokenizer; prepare the data again")
        return tokens

    def shuffled(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The windows at these positions of an endless shuffled stream, in which every epoch holds each window once.

        (n) -> (n, seq_len + 1). A position is all the state there is: any can be reached at once, on any rank.
        """
        epochs, within = np.divmod(positions, len(self))
        order = np.concatenate([permute(within[epochs == epoch], len(self), seed=(seed, int(epoch)))
                                for epoch in np.unique(epochs)])        # positions ascend, so epochs do
        return np.stack([self[int(i)] for i in order])


def main():
    parser = argparse.ArgumentParser(description="Text to binary token shards. Without --input: this Python's standard library.")
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE",
                        help="text (.txt ...) or JSON lines with a \"text\" (.jsonl), plain or .zst")
    parser.add_argument("--val", nargs="+", type=Path, default=[], metavar="FILE",
                        help="files for validation (default: documents of --input, chosen by a hash of their text)")
    parser.add_argument("--holdout", type=int, default=20, metavar="N",
                        help="without --val, one document in N is for validation (default: %(default)s)")
    parser.add_argument("--encoding", help="a tiktoken encoding, such as o200k_base "
                        f"(default: a byte-pair vocabulary of {STDLIB_VOCABULARY:,}, trained on the input)")
    parser.add_argument("--out", type=Path, default=Path("data/stdlib"), metavar="DIR", help="a new folder (default: %(default)s)")
    args = parser.parse_args()
    if args.holdout < 2:
        raise InputError(f"--holdout {args.holdout}: it must be at least 2, or nothing is left for training")
    encoding = get_encoding(args.encoding) if args.encoding else None
    prepare(args.input or stdlib_files(), args.out, encoding, args.val, args.holdout)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"prepare_pile.py: {error}")
