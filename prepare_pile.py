"""Text to binary token shards, on all cores. What is written, and how it is read, stands in shards.py.

    python prepare_pile.py                                          # this Python's standard library -> data/stdlib
    python prepare_pile.py --pile 0                                 # one shard of the Pile -> data/pile
    python prepare_pile.py --input texts/ more.jsonl.zst --encoding o200k_base --out data/mine
    python prepare_pile.py --verify data/mine                       # is every byte what it was?

One process reads and writes, in order; a pool tokenises megabytes of lines. All is written into OUT.partial, which becomes
OUT when it is whole. Every few seconds the shards are flushed and `progress.npz` says how far they reach: the same command
after a crash cuts them to that length and goes on, so that the result is the same, byte for byte.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import tiktoken
from tqdm import tqdm

from common import InputError, command_line, written_whole
from documents import (
    Chunk,
    Position,
    bytes_of,
    chunks,
    documents,
    download_pile,
    find_files,
    parse_chunk,
    pile_shards,
    refuse,
    stdlib_files,
)
from shards import MOST_DOMAINS, OTHER, SPLITS, TOKEN, Split, read_meta, verify
from tokenizer import END_OF_TEXT, cut_runs, fingerprint, get_encoding, tokenizer_from_json, tokenizer_to_json, train_tokenizer

STDLIB_VOCABULARY = 8_192
AHEAD = 16                      # chunks for each worker, so that none waits while files are flushed
SAVE_SECONDS = 5                # of work are lost in a crash
LISTED = 1_000                  # bad lines that meta.json lists; all are counted


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising, in a pool of processes.

class Encoded(NamedTuple):
    """The documents of a chunk, one after the other."""
    tokens: np.ndarray          # uint32, with <|endoftext|> before each document
    lengths: np.ndarray         # of the documents, in tokens
    sizes: np.ndarray           # ... in bytes of UTF-8
    hashes: np.ndarray          # ... of the text, 64 bits
    domains: list[str]
    bad: list[tuple[str, str]]
    end: Position


def hash_of(text: str) -> int:
    """64 bits of its SHA-256, by which a document is chosen for validation: so exact duplicates stay on one side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def start_worker(encoding: tiktoken.Encoding):
    """In each process of the pool: take what all chunks need, leave Ctrl-C to the parent, and end when it ends."""
    global shared
    shared = encoding
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def encode(chunk: Chunk) -> Encoded:
    """Parse and tokenise. A literal <|endoftext|> in a text is text."""
    encoding = shared
    end_of_text = np.array([encoding.encode_single_token(END_OF_TEXT)], dtype=TOKEN)
    parts, lengths, sizes, hashes, domains, bad = [], [], [], [], [], []
    for text, domain in parse_chunk(chunk, bad):
        own = [end_of_text, *(encoding.encode_to_numpy(part, disallowed_special=()) for part in cut_runs(text))]
        parts += own
        lengths.append(sum(map(len, own)))
        sizes.append(bytes_of(text))
        hashes.append(hash_of(text))
        domains.append(domain)
    tokens = np.concatenate(parts, dtype=TOKEN) if parts else np.zeros(0, TOKEN)
    return Encoded(tokens, np.array(lengths, dtype=np.int64), np.array(sizes, dtype=np.int64),
                   np.array(hashes, dtype=np.uint64), domains, bad, chunk.end)


def in_order(chunks, encoding: tiktoken.Encoding, workers: int):
    """encode() of each chunk, in order, by processes that are never far ahead; 1: by this one."""
    if workers == 1:
        start_worker(encoding)
        yield from map(encode, chunks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (encoding,))
    ahead = deque()
    try:
        for chunk in chunks:
            ahead.append(pool.submit(encode, chunk))
            if len(ahead) > AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise InputError("a worker was killed, perhaps for want of memory: lower --workers; the same command goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# A folder that is being written.

@contextmanager
def sole_writer(out: Path):
    """Raises InputError while another process prepares the same folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{out}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"another run is writing {out} just now: wait for it, or choose another --out") from error
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists already: remove it or choose another --out")
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def clear_errors(partial: Path):
    """What the system refuses, such as room on the disk or permission, as an InputError that says what is left."""
    try:
        yield
    except OSError as error:
        left = f": {partial} holds what is done; once that is mended, the same command goes on" if partial.exists() else ""
        raise InputError(f"{error}{left}") from error


class Unfinished:
    """OUT.partial: both splits, and how far the sources are read. What `save` wrote, the next run goes on from."""
    def __init__(self, folder: Path, request: dict, choose_encoding):
        self.folder, self.request, self.file, self.splits = folder, request, folder / "progress.npz", []
        if self.file.exists():
            self.restore()
            return
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} holds files but no progress.npz: remove it, or choose another --out")
        folder.mkdir(exist_ok=True)
        self.use(choose_encoding())
        self.position, self.sources, self.domains, self.bad, self.n_bad = Position(), [], [], [], 0
        self.validation, self.overlap = np.zeros(0, np.uint64), 0       # hashes of --val's documents; those seen in training too
        self.save()

    def use(self, encoding: tiktoken.Encoding):
        self.encoding, self.tokenizer = encoding, tokenizer_to_json(encoding)
        self.splits = [Split(self.folder, name, encoding.n_vocab) for name in SPLITS]

    def save(self):
        """Flush the shards, then say so."""
        for split in self.splits:
            split.flush()
        states = [split.state(len(self.domains)) for split in self.splits]
        state = dict(request=self.request, tokenizer=self.tokenizer, position=self.position, sources=self.sources,
                     domains=self.domains, bad=self.bad, n_bad=self.n_bad, overlap=self.overlap,
                     splits=[about for about, _ in states])
        with written_whole(self.file) as path, open(path, "wb") as file:
            np.savez(file, state=json.dumps(state), validation=self.validation,
                     **{name: array for _, arrays in states for name, array in arrays.items()})
        self.saved = time.monotonic()

    def restore(self):
        try:
            with np.load(self.file, allow_pickle=False) as arrays:
                state = json.loads(arrays["state"].item())
                changed = [key for key in self.request if self.request[key] != state["request"].get(key)]
                if changed:
                    raise InputError(f"{self.folder} was begun by another command (its {changed[0]} differed): repeat that, or "
                                     "remove the folder, or choose another --out")
                self.use(tokenizer_from_json(state["tokenizer"]))
                self.position, self.sources, self.domains = Position(*state["position"]), state["sources"], state["domains"]
                self.bad, self.n_bad, self.overlap = state["bad"], state["n_bad"], state["overlap"]
                self.validation = arrays["validation"]
                for split, about in zip(self.splits, state["splits"]):
                    split.restore(about, arrays)
        except Exception as error:      # numpy raises anything from BadZipFile to tokenize.TokenError
            self.close()
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.file} is damaged ({error!r}): remove {self.folder} to start over") from error
        self.saved = time.monotonic()

    def add(self, encoded: Encoded, in_validation: bool, one_in: int | None):
        """Write a chunk's documents to their splits: all to validation, or one in so many; None: all to training."""
        for name in dict.fromkeys(encoded.domains):
            if name not in self.domains and len(self.domains) < MOST_DOMAINS:
                self.domains.append(name if len(self.domains) < MOST_DOMAINS - 1 else OTHER)
        number = {name: i for i, name in enumerate(self.domains)}
        domains = np.array([number.get(name, MOST_DOMAINS - 1) for name in encoded.domains], dtype=np.int64)
        chosen = np.full(len(domains), in_validation) if one_in is None else encoded.hashes % np.uint64(one_in) == 0
        if in_validation:
            self.validation = np.union1d(self.validation, encoded.hashes[encoded.sizes > 0])
        elif one_in is None:
            self.overlap += int(np.isin(encoded.hashes, self.validation).sum())
        of_token = np.repeat(chosen, encoded.lengths)
        for split, own, tokens in zip(self.splits, (~chosen, chosen), (encoded.tokens[~of_token], encoded.tokens[of_token])):
            split.write(tokens, encoded.lengths[own], encoded.sizes[own], domains[own])
        self.bad += [(Path(place).name, reason) for place, reason in encoded.bad[:LISTED - len(self.bad)]]
        self.n_bad += len(encoded.bad)
        self.position = encoded.end
        self.sources[self.position.source:] = [[self.position.read, self.position.sha256]]

    def close(self):
        for split in self.splits:
            split.close()

    def finish(self, names: list[str]):
        """The last shards, counts.npy and, when all is there, meta.json."""
        for split in self.splits:
            split.finish_shard()
        train, val = self.splits
        frequency = (train.counts + 1) / (train.counts + 1).sum()       # the add-one unigram model: what to beat
        np.save(self.folder / "counts.npy", train.counts)
        meta = dict(tokenizer=self.tokenizer, end_of_text=self.encoding.encode_single_token(END_OF_TEXT),
                    sources=[dict(file=name, bytes=size, sha256=digest) for name, (size, digest) in zip(names, self.sources)],
                    skipped=dict(lines=self.n_bad, first=self.bad), overlap=self.overlap, domains=self.domains,
                    train=train.summary(self.domains), val=val.summary(self.domains),
                    unigram_val_loss=float(-(val.counts * np.log(frequency)).sum() / val.counts.sum()))
        with written_whole(self.folder / "meta.json") as path:
            path.write_text(json.dumps(meta, indent=1), encoding="utf-8")


def prepare(files: list[Path], out: Path, encoding: tiktoken.Encoding | None, val_files: list[Path] = (), holdout: int = 20,
            workers: int = 1, skip_bad: bool = False) -> dict:
    """Tokenise `files` into the new folder `out` and return its meta.json; go on where an interrupted run of the same was.

    Validation is `val_files`, or one document in `holdout`. encoding None: trained on the training documents.
    """
    sources, one_in = [*val_files, *files], None if val_files else holdout         # validation first, to know it in training
    for file in sources:
        if not file.is_file():
            raise InputError(f"{file} is not a file that can be read: check --input and --val")
    sizes = [file.stat().st_size for file in sources]
    request = dict(sources=[file.name for file in sources], validation=[len(val_files), one_in],
                   tokenizer=encoding and fingerprint(encoding))

    def choose_encoding():
        if encoding is not None:
            return encoding
        print(f"training a byte-pair vocabulary of {STDLIB_VOCABULARY:,} on {len(files):,} files")
        texts = (text for file in files for text in documents(file, skip_bad) if one_in is None or hash_of(text) % one_in)
        return train_tokenizer(texts, STDLIB_VOCABULARY, f"bpe{STDLIB_VOCABULARY}")

    partial = out.with_name(out.name + ".partial")
    with sole_writer(out), clear_errors(partial):
        for leftover in partial.glob("*.tmp"):          # of a run that was killed while it saved
            leftover.unlink()
        if (partial / "progress.npz").exists() or not (partial / "meta.json").exists():      # else only the renaming is left
            with closing(Unfinished(partial, request, choose_encoding)) as unfinished:
                tokenise(unfinished, sources, sizes, len(val_files), one_in, workers, skip_bad)
                for split in unfinished.splits:
                    if not split.totals.any():
                        unfinished.close()
                        shutil.rmtree(partial)
                        n = sum(s.totals[:, 0].sum() for s in unfinished.splits)
                        raise InputError(f"no documents for {split.name} among {n} in all: give more documents, or a validation "
                                         "file of its own with --val")
                unfinished.finish(request["sources"])
        (partial / "progress.npz").unlink(missing_ok=True)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    meta = read_meta(out)
    report(meta)
    return meta


def tokenise(unfinished: Unfinished, sources: list[Path], sizes: list[int], n_val: int, one_in, workers: int, skip_bad: bool):
    """All that is left of the sources."""
    begun = unfinished.position
    for file, size, (was, _) in zip(sources, sizes, unfinished.sources[:begun.source]):
        if size != was:
            raise InputError(f"{file} has changed since it was read: put it back, or remove {unfinished.folder} to start over")
    left = (chunk for i in range(begun.source, len(sources))
            for chunk in chunks(sources[i], begun if i == begun.source else Position(source=i)))
    done = sum(sizes[:begun.source]) + begun.read
    started, text, tokens = time.monotonic(), 0, 0
    with tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, desc=f"tokenising into {unfinished.folder.stem}",
              mininterval=0.5) as bar:
        for encoded in in_order(left, unfinished.encoding, workers):
            if not skip_bad:
                refuse(encoded.bad)
            unfinished.add(encoded, encoded.end.source < n_val, one_in)
            text, tokens, seconds = text + encoded.sizes.sum(), tokens + len(encoded.tokens), time.monotonic() - started
            bar.set_postfix_str(f"{text / 1e6 / seconds:.1f} MB/s of text, {tokens / 1e6 / seconds:.2f} M tokens/s", refresh=False)
            bar.update(sum(sizes[:encoded.end.source]) + encoded.end.read - bar.n)
            if time.monotonic() - unfinished.saved > SAVE_SECONDS:
                unfinished.save()


def overlap_warning(meta: dict) -> str:
    return (f"{meta['overlap']:,} of {meta['train']['documents']:,} training documents stand in the validation file too, word for "
            "word: its loss flatters")


def report(meta: dict):
    """The table by domain, and what was left out."""
    print(f"\n{'':32}{'documents':>14}{'bytes':>20}{'tokens':>18}{'bytes/token':>13}{'distinct ids':>14}")
    for split in SPLITS:
        by_domain = meta[split]["domains"]
        for name, n in [*(by_domain.items() if len(by_domain) > 1 else ()), (f"{split} in all", meta[split])]:
            print(f"{name:32.32}{n['documents']:>14,}{n['bytes']:>20,}{n['tokens']:>18,}{n['bytes'] / n['tokens']:>13.3f}"
                  f"{n['distinct_ids']:>14,}")
    if meta["skipped"]["lines"]:
        print(f"\nleft out, as they could not be read: {meta['skipped']['lines']:,}")
        for place, reason in meta["skipped"]["first"][:20]:
            print(f"    {place}: {reason}")
    if meta["overlap"]:
        print(f"\n{overlap_warning(meta)}")
    print(f"\na unigram model's validation loss: {meta['unigram_val_loss']:.3f} nats per token")


def prepare_stdlib(out: Path = Path("data/stdlib")) -> dict:
    """The default data, which every machine has: Python's own standard library."""
    return prepare(stdlib_files(), out, encoding=None)


def main():
    parser = argparse.ArgumentParser(description="Text to binary token shards. Without --input or --pile: this Python's standard "
                                     "library. An interrupted run goes on by the same command.", allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", metavar="FILE",
                        help="files, folders or patterns: text (.txt ...) or JSON lines with a \"text\" (.jsonl), plain or .zst")
    source.add_argument("--pile", metavar="SHARDS",
                        help="download the Pile (uncopyrighted): 0, 0-3, 1,5 or all of 30 shards of 11 GB, and its validation file")
    source.add_argument("--verify", type=Path, metavar="DIR", help="check a prepared folder from end to end")
    parser.add_argument("--val", nargs="+", default=[], metavar="FILE",
                        help="files for validation [the Pile's own, or documents chosen by a hash of their text]")
    parser.add_argument("--holdout", type=int, default=20, metavar="N",
                        help="without --val, one document in N is for validation [%(default)s]")
    parser.add_argument("--encoding", help="a tiktoken encoding [o200k_base for the Pile, else a byte-pair vocabulary of "
                        f"{STDLIB_VOCABULARY:,} trained on the input]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder [data/pile or data/stdlib]")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N",
                        help="processes that tokenise [%(default)s]")
    parser.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be read, and count and list them")
    args = parser.parse_args()
    for name, least in (("holdout", 2), ("workers", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: it must be at least {least}")
    if args.verify:
        meta = verify(args.verify)
        print(f"{args.verify} is whole: {sum(len(meta[split]['shards']) for split in SPLITS):,} shards, "
              f"{sum(meta[split]['tokens'] for split in SPLITS):,} tokens")
        return
    name = args.encoding or ("o200k_base" if args.pile else None)
    encoding = get_encoding(name) if name else None
    val_files = find_files(args.val)
    if args.pile:
        files, pile_val = download_pile(pile_shards(args.pile))
        val_files = val_files or pile_val
    else:
        files = find_files(args.input) if args.input else stdlib_files()
    if args.input and not args.out:
        raise InputError("--input needs --out: name a new folder, such as data/mine")
    prepare(files, args.out or Path("data/pile" if args.pile else "data/stdlib"), encoding, val_files, args.holdout, args.workers,
            args.skip_bad)


if __name__ == "__main__":
    command_line(main)
