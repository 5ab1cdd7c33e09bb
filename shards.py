"""Token shards: their format, their writer and their reader.

A prepared folder holds `meta.json` (tokenizer, sources, counts, checksums), `counts.npy` (how often each id stands in the
training split) and for each split shards of 100 M tokens, each with an index of its documents:

    train-00000.bin   llm.c's format: 256 little-endian int32 (20240801, 7, number of tokens, zeros), then uint32 tokens;
                      `<|endoftext|>` stands before each document
    train-00000.idx   pairs of uint32: the token at which a document starts, and its domain, a place in meta.json's list; a
                      document that began in the shard before has a pair too, of start 0
"""
import hashlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import InputError, read_json

MAGIC, VERSION, HEADER_BYTES = 20240801, 7, 1024
TOKEN = np.dtype("<u4")
DOCUMENT = np.dtype([("start", "<u4"), ("domain", "<u4")])
SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000
MOST_IDS = 2**24
MOST_DOMAINS = 256              # one more is counted as OTHER
OTHER = "(other)"
BLOCK = 2**22                   # tokens that are verified at once


# ---------------------------------------------------------------------------------------------------------------------
# Writing.

def sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(2**20)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
    return digest.hexdigest()


def write_all(file, data: bytes):
    """An unbuffered file may take a part, and the next call then says why, such as a full disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest):]


class Split:
    """One split while it is written: shards, indices and counts. Its state is what an interrupted run must know of it."""
    def __init__(self, folder: Path, name: str, vocab_size: int):
        self.folder, self.name = folder, name
        self.shards = []                                                # the whole ones, as meta.json describes them
        self.filled, self.entries = 0, 0                                # tokens and documents in the one being written
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.seen = np.zeros((MOST_DOMAINS, vocab_size), dtype=bool)    # memory is used for the domains there are
        self.totals = np.zeros((MOST_DOMAINS, 3), dtype=np.int64)       # documents, bytes, tokens
        self.files = None

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}-{len(self.shards):05d}{suffix}"

    def write(self, tokens, lengths, sizes, domains):
        """Append documents, whose tokens lie one after the other."""
        if not len(tokens):
            return
        self.count(tokens, lengths, sizes, domains, np.ones_like(sizes))
        starts = np.cumsum(lengths) - lengths
        position = 0
        while position < len(tokens):
            stop = min(len(tokens), position + SHARD_TOKENS - self.filled)
            own = (starts >= position) & (starts < stop)
            if not self.filled:                                         # a document that began in the shard before
                own[np.searchsorted(starts, position, side="right") - 1] = True
            index = np.empty(own.sum(), dtype=DOCUMENT)
            index["start"] = np.maximum(starts[own], position) - position + self.filled
            index["domain"] = domains[own]
            self.append(tokens[position:stop], index)
            position = stop
            if self.filled == SHARD_TOKENS:
                self.finish_shard()

    def count(self, tokens, lengths, sizes, domains, documents):
        np.add.at(self.totals, domains, np.stack([documents, sizes, lengths], axis=1))
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self.seen[np.repeat(domains, lengths), tokens] = True

    def append(self, tokens, index):
        if self.files is None:
            self.files = [open(self.path(suffix), "wb", buffering=0) for suffix in (".bin", ".idx")]
            write_all(self.files[0], bytes(HEADER_BYTES))
        for file, values in zip(self.files, (tokens, index)):
            write_all(file, values.tobytes())
        self.filled += len(tokens)
        self.entries += len(index)

    def finish_shard(self):
        if not self.filled:
            return
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.filled
        self.files[0].seek(0)
        write_all(self.files[0], header.tobytes())
        self.flush()
        self.close()
        self.shards.append(dict(file=self.path(".bin").name, tokens=self.filled, sha256=sha256(self.path(".bin")),
                                index_sha256=sha256(self.path(".idx"))))
        self.filled = self.entries = 0

    def flush(self):
        for file in self.files or ():
            os.fsync(file.fileno())

    def close(self):
        for file in self.files or ():
            file.close()
        self.files = None

    def state(self, n_domains: int) -> tuple[dict, dict]:
        """For JSON, and arrays."""
        return (dict(shards=self.shards, filled=self.filled, entries=self.entries),
                {f"{self.name}_counts": self.counts, f"{self.name}_seen": self.seen[:n_domains],
                 f"{self.name}_totals": self.totals[:n_domains]})

    def restore(self, state: dict, arrays):
        """Go back to a state: cut the files to the lengths they had."""
        self.shards, self.filled, self.entries = state["shards"], state["filled"], state["entries"]
        self.counts[:] = arrays[f"{self.name}_counts"]
        for name, array in (("seen", self.seen), ("totals", self.totals)):
            saved = arrays[f"{self.name}_{name}"]
            array[:len(saved)] = saved
        for path in self.folder.glob(f"{self.name}-*"):
            if path.stem > self.path("").name or path.stem == self.path("").name and not self.filled:
                path.unlink()
        if self.filled:
            self.files = [open(self.path(suffix), "rb+", buffering=0) for suffix in (".bin", ".idx")]
            lengths = HEADER_BYTES + TOKEN.itemsize * self.filled, DOCUMENT.itemsize * self.entries
            for file, length in zip(self.files, lengths):
                if file.seek(0, os.SEEK_END) < length:
                    raise InputError(f"{file.name} is shorter than {length:,} bytes: remove {self.folder} to start over")
                file.truncate(length)
                file.seek(length)

    def summary(self, domains: list[str]) -> dict:
        keys = ("documents", "bytes", "tokens")
        by_domain = {name: dict(zip(keys, totals.tolist()), distinct_ids=int(seen.sum()))
                     for name, totals, seen in zip(domains, self.totals, self.seen) if totals.any()}
        return (dict(zip(keys, self.totals.sum(0).tolist()), distinct_ids=int((self.counts > 0).sum()))
                | dict(domains=by_domain, shards=self.shards))


# ---------------------------------------------------------------------------------------------------------------------
# Checks.

def read_meta(folder: Path) -> dict:
    """meta.json of a prepared folder, checked. Raises InputError."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise InputError(f"no prepared data in {folder} (no meta.json): run prepare_pile.py --input FILE --out {folder}")
    meta = read_json(folder / "meta.json")
    try:
        for split in SPLITS:
            for shard in meta[split]["shards"]:
                assert shard["file"] == Path(shard["file"]).name and type(shard["tokens"]) is int and shard["tokens"] >= 0, shard
        V = meta["tokenizer"]["vocab_size"]
        for number, limit in ((V, MOST_IDS + 1), (meta["end_of_text"], V), *((meta[split]["tokens"], 2**63) for split in SPLITS),
                              *((meta[split]["documents"], 2**63) for split in SPLITS)):
            assert type(number) is int and 0 <= number < limit, number
        assert type(meta.get("overlap", 0)) is int
        assert type(meta["unigram_val_loss"]) is float and type(meta["tokenizer"]["fingerprint"]) is str
        assert len(meta["domains"]) <= MOST_DOMAINS and all(type(name) is str for name in meta["domains"]), meta["domains"]
    except (KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{folder / 'meta.json'} lacks a field or has one of the wrong kind ({error!r}): "
                         "prepare the data again") from error
    return meta


def read_counts(folder: Path, vocab_size: int) -> np.ndarray:
    """How often each id stands in the training split. -> (V) int64. Raises InputError."""
    path = Path(folder) / "counts.npy"
    try:
        counts = np.load(path, mmap_mode="r")           # which takes no more than the file has
        assert counts.shape == (vocab_size,) and counts.dtype == np.int64, (counts.shape, counts.dtype)
    except Exception as error:      # numpy raises anything from EOFError to tokenize.TokenError
        raise InputError(f"{path} is missing, damaged or of another vocabulary ({error}): prepare the data again") from error
    return np.array(counts)


def open_shard(path: Path, tokens: int) -> np.ndarray:
    """The tokens of a shard, memory-mapped. Raises InputError for anything but a whole shard of that many tokens."""
    try:
        words = np.memmap(path, dtype=TOKEN, mode="r").view(np.ndarray)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing, though meta.json lists it: prepare the data again") from error
    except ValueError:                  # empty, or no multiple of 4 bytes
        words = np.zeros(0, dtype=TOKEN)
    header = words[:HEADER_BYTES // TOKEN.itemsize]
    if len(header) < HEADER_BYTES // TOKEN.itemsize or header[0] != MAGIC or header[1] != VERSION:
        raise InputError(f"{path} is not a token shard (magic {header[:2].tolist()}, expected [{MAGIC}, {VERSION}]): "
                         "prepare the data again")
    size = HEADER_BYTES + TOKEN.itemsize * tokens
    if header[2] != tokens or path.stat().st_size != size:
        raise InputError(f"{path} is truncated or of other data: {path.stat().st_size:,} bytes and {header[2]:,} tokens in "
                         f"its header, expected {size:,} and {tokens:,}: prepare the data again")
    return words[len(header):]


def read_index(path: Path, tokens: int, domains: int) -> np.ndarray:
    """Starts and domains of the documents in the shard beside it. Raises InputError."""
    try:
        index = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: prepare the data again") from error
    if not len(index) or len(index) % DOCUMENT.itemsize:
        raise InputError(f"{path} is no index of documents ({len(index):,} bytes): prepare the data again")
    index = index.view(DOCUMENT)
    starts = index["start"].astype(np.int64)
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= tokens or index["domain"].max() >= domains:
        raise InputError(f"{path} does not belong to its shard of {tokens:,} tokens and {domains} domains: prepare the data again")
    return index


def verify(folder: Path) -> dict:
    """Check a prepared folder from end to end: checksums, ids, documents and counts. -> meta.json. Raises InputError."""
    folder = Path(folder)
    meta = read_meta(folder)

    def require(ok, what):
        if not ok:
            raise InputError(f"{what}: the folder is damaged; prepare the data again")
    try:
        for split in SPLITS:
            found = Split(folder, split, meta["tokenizer"]["vocab_size"])
            for shard in meta[split]["shards"]:
                path = folder / shard["file"]
                tokens = open_shard(path, shard["tokens"])
                index = read_index(path.with_suffix(".idx"), len(tokens), len(meta["domains"]))
                for file, digest in ((path, shard["sha256"]), (path.with_suffix(".idx"), shard["index_sha256"])):
                    require(sha256(file) == digest, f"{file} is not what was written (its SHA-256 differs)")
                starts_here = tokens[index["start"]] == meta["end_of_text"]
                require(starts_here[1:].all(), f"{path} has no document where its index says so")
                for begin in range(0, len(tokens), BLOCK):
                    end = min(len(tokens), begin + BLOCK)
                    first, last = (np.searchsorted(index["start"], n, side) for n, side in ((begin, "right"), (end, "left")))
                    own = index[first - 1:last]
                    require(tokens[begin:end].max() < len(found.counts), f"{path} holds an id beyond the vocabulary")
                    found.count(tokens[begin:end], np.diff(own["start"].astype(np.int64).clip(begin), append=end),
                                np.zeros(len(own), dtype=np.int64), own["domain"],
                                starts_here[first - 1:last] & (own["start"] >= begin))
            summary, said = found.summary(meta["domains"]), meta[split]
            for name, ours, theirs in [(split, summary, said), *((f"{split}, {domain}", n, said["domains"].get(domain, {}))
                                                                 for domain, n in summary["domains"].items())]:
                for key in ("documents", "tokens", "distinct_ids"):
                    require(ours[key] == theirs.get(key), f"{folder} holds {ours[key]:,} {key} of {name}, "
                                                          f"but its meta.json says {theirs.get(key)}")
            if split == "train":
                require(np.array_equal(read_counts(folder, len(found.counts)), found.counts), f"{folder / 'counts.npy'} is wrong")
    except (KeyError, TypeError, AttributeError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} cannot be verified ({type(error).__name__}: {error}): prepare the data again") from error
    return meta


def allow_open_files(n: int):
    """A memory map keeps its file open, and by default a process may open 1,024: ask the system for as many as needed."""
    try:
        import resource
    except ImportError:             # Windows, which sets no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < n:
        if hard != resource.RLIM_INFINITY and hard < n:
            raise InputError(f"the data has {n - 256:,} shards, but a process may open only {hard:,} files here: raise `ulimit -n`")
        resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))


# ---------------------------------------------------------------------------------------------------------------------
# Reading: windows, in an order that is computed rather than stored.

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
        self.meta = read_meta(folder)
        self.seq_len, self.vocab_size = seq_len, self.meta["tokenizer"]["vocab_size"]
        listed = self.meta[split]["shards"]
        allow_open_files(sum(len(self.meta[s]["shards"]) for s in SPLITS) + 256)
        self.paths = [Path(folder) / shard["file"] for shard in listed]
        self.shards = [open_shard(path, shard["tokens"]) for path, shard in zip(self.paths, listed)]
        self.ends = np.cumsum([max(0, len(shard) - 1) // seq_len for shard in self.shards], dtype=np.int64)
        if not len(self):
            raise InputError(f"the {split} split of {folder} is shorter than one window of {seq_len + 1} tokens: "
                             "lower --seq-len or prepare more text")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> np.ndarray:
        """Window i in file order. -> (seq_len + 1) int64"""
        shard, start = self.place(i)
        return self.tokens(shard, start, start + self.seq_len + 1)

    def place(self, i: int) -> tuple[int, int]:
        """Shard and first token of window i."""
        shard = int(np.searchsorted(self.ends, i, side="right"))
        return shard, (i - (int(self.ends[shard - 1]) if shard else 0)) * self.seq_len

    def tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Part of a shard. -> (stop - start) int64. Raises InputError for ids beyond the vocabulary."""
        tokens = self.shards[shard][start:stop].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise InputError(f"{self.paths[shard]} holds the id {tokens.max()}, but the vocabulary has {self.vocab_size:,}: "
                             "the shard is damaged or of another tokenizer; prepare the data again")
        return tokens

    def shuffled(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The windows at these ascending positions of an endless shuffled stream, whose every epoch holds each window once.

        (n) -> (n, seq_len + 1). A position is all the state there is: any can be reached at once, on any rank.
        """
        epochs, within = np.divmod(positions, len(self))
        order = np.concatenate([permute(within[epochs == epoch], len(self), seed=(seed, int(epoch)))
                                for epoch in np.unique(epochs)])        # positions ascend, so epochs do
        return np.stack([self[i] for i in order.tolist()])


def batches(windows: Windows, per_step: int, steps: range, seed: int, rank: int = 0, world: int = 1, pin: bool = False):
    """A rank's windows of each of the `steps`, read ahead by a thread. Yields tensors (about per_step / world, seq_len + 1).

    Step n has the positions n * per_step ... (n + 1) * per_step - 1 of the shuffled stream, dealt out to the ranks. So the
    number of the step is all that has to be remembered, and any number of ranks computes the same step.
    """
    import torch  # here, since preparing data does without it

    def read(step):
        positions = np.arange(step * per_step + rank, (step + 1) * per_step, world)
        batch = torch.from_numpy(windows.shuffled(positions, seed))
        return batch.pin_memory() if pin else batch

    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(read, step) for step in steps[:2])
        for later in range(len(steps)):
            batch = ahead.popleft().result()
            if later + 2 < len(steps):
                ahead.append(thread.submit(read, steps[later + 2]))
            yield batch
