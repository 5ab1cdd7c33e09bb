"""Files to documents: which files there are, what is in them, and how far they have been read.

Files are read as they come: JSON lines with a "text" (`.jsonl`, `.json`), or any other text, which is one document; plain or zstd
(`.zst`), of as many frames as there are. Memory is bounded whatever a file says, by the longest document that is allowed.
"""
import glob
import hashlib
import json
import sysconfig
from pathlib import Path
from typing import NamedTuple

from common import InputError

PILE = dict(repo_id="monology/pile-uncopyrighted", repo_type="dataset", revision="3be90335b66f24456a5d6659d9c8d208c0357119")
PILE_SHARDS = 30
TEXT_FILES = (".jsonl", ".json", ".txt", ".jsonl.zst", ".json.zst", ".txt.zst")     # what is taken from a folder
BLOCK = 2**20                   # bytes read at once, ...
COMPRESSED = 2**12              # ... and decompressed at once: zstd makes at most 2^15 times as much of it
CHUNK = 2**20                   # bytes of lines that a worker tokenises at once
LONGEST_DOCUMENT = 2**27        # bytes; a line or a text file must be held in memory as a whole
UNNAMED = "(none)"              # the domain of documents without one


# ---------------------------------------------------------------------------------------------------------------------
# Which files.

def stdlib_files() -> list[Path]:
    """The sources of this Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    if not files:
        raise InputError(f"no sources of the standard library in {root}: name your own text with --input")
    return files


def find_files(names: list[str]) -> list[Path]:
    """Files, folders and globs as files, sorted within each. Raises InputError where there are none, or one stands twice."""
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            found = [p for p in inside if p.name.endswith(TEXT_FILES)]
            if others := [p.name for p in inside if p not in set(found)]:
                print(f"{path}: {len(others):,} files are left out, as their names do not end in one of {', '.join(TEXT_FILES)}: "
                      f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}")
        else:
            found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(name, recursive=True)) if Path(p).is_file()]
        if not found:
            raise InputError(f"{name} is not a file that can be read, nor a folder or pattern with one: check --input and --val")
        files += found
    if twice := {str(p) for p in files if files.count(p) > 1}:
        raise InputError(f"{min(twice)} is named twice: name each file once")
    return files


def pile_shards(wanted: str) -> list[int]:
    """'0', '0-3', '1,5' or 'all' as numbers."""
    try:
        ends = [part.split("-") for part in ("0-29" if wanted == "all" else wanted).split(",")]
        numbers = [n for first, *last in ends for n in range(int(first), int(*last or [first]) + 1)]
        assert numbers and len({*numbers}) == len(numbers) and {*numbers} <= {*range(PILE_SHARDS)}
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"--pile {wanted}: name shards of 0 to {PILE_SHARDS - 1}, such as 0, 0-3, 1,5 or all") from error
    return numbers


def download_pile(numbers: list[int]) -> tuple[list[Path], list[Path]]:
    """Training shards and the validation file of the Pile (uncopyrighted), from Hugging Face or its cache. -> two lists of files"""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InputError("--pile downloads with huggingface_hub, which is not installed: pip install huggingface_hub") from error

    def fetch(name):
        try:
            return Path(hf_hub_download(filename=name, **PILE))
        except Exception as error:      # of httpx, of huggingface_hub, OSError
            raise InputError(f"could not download {name} of {PILE['repo_id']} ({type(error).__name__}: "
                             f"{' '.join(str(error).split())[:300]}): try again, what has come is kept") from error
    return [fetch(f"train/{n:02d}.jsonl.zst") for n in numbers], [fetch("val.jsonl.zst")]


# ---------------------------------------------------------------------------------------------------------------------
# Reading files: whole lines in chunks, each of which knows how far it reaches.

class Position(NamedTuple):
    """How far the sources are read: `read` bytes of file number `source`, whose hash tells whether it is still the same."""
    source: int = 0
    offset: int = 0             # bytes of its text
    line: int = 0               # lines of its text; at least 1 once a text file has become a document, be it empty
    read: int = 0
    sha256: str = hashlib.sha256().hexdigest()


class Chunk(NamedTuple):
    """Whole lines of JSON, or a text file, which is one document."""
    path: str
    lines: bool
    first_line: int
    data: bytes
    end: Position


def blocks(path: Path, start: Position):
    """A file's text from its beginning: all zstd frames, and the last one whole. Yields (bytes, bytes read, their SHA-256).

    Raises InputError where the file is damaged, or begins otherwise than it did when it was read up to `start`.
    """
    import zstandard  # here, since only preparation needs it
    digest, read, decompressor = hashlib.sha256(), 0, None
    with open(path, "rb") as file:
        while block := file.read(min(BLOCK, start.read - read) if read < start.read else BLOCK):
            digest.update(block)
            read, sha256 = read + len(block), digest.hexdigest()
            if read == start.read and sha256 != start.sha256:
                break
            if path.suffix != ".zst":
                yield block, read, sha256
                continue
            block = memoryview(block)
            while block:
                decompressor = decompressor or zstandard.ZstdDecompressor().decompressobj()
                part = block[:COMPRESSED]
                try:
                    text = decompressor.decompress(part)
                except zstandard.ZstdError as error:
                    raise InputError(f"{path} is not valid zstd ({error}): fetch it again") from error
                block = block[len(part) - len(decompressor.unused_data):]
                decompressor = None if decompressor.eof else decompressor
                yield text, read, sha256
    if read < start.read or read == start.read and digest.hexdigest() != start.sha256:
        raise InputError(f"{path} has changed since it was read: put it back, or remove the .partial folder to start over")
    if decompressor is not None:
        raise InputError(f"{path} is cut short (its last zstd frame has no end): fetch it again")
    if path.suffix == ".zst" and not read:
        raise InputError(f"{path} is empty: fetch it again")


def chunks(path: Path, start: Position = Position()):       # noqa: B008 (it is immutable)
    """The rest of a file behind `start`, as Chunks. Lines end at \\n alone: text may hold U+2028 and U+0085."""
    lines = ".json" in "".join(path.suffixes)
    skip, offset, line, parts, size = start.offset, start.offset, start.line, [], 0
    reached = 0, Position().sha256

    def chunk(data, reached):
        nonlocal offset, line
        first, offset, line = line + 1, offset + len(data), line + data.count(b"\n") + (not lines)
        return Chunk(str(path), lines, first, data, Position(start.source, offset, line, *reached))

    for data, *reached in blocks(path, start):
        skip, data = max(0, skip - len(data)), data[skip:]
        parts.append(data)
        size += len(data)
        if lines and size >= CHUNK and b"\n" in data:
            whole, newline, rest = b"".join(parts).rpartition(b"\n")
            yield chunk(whole + newline, reached)
            parts, size = [rest], len(rest)
        if size > LONGEST_DOCUMENT:
            place = f"{path}:{line + 1}: a line" if lines else f"{path} is one document"
            raise InputError(f"{place} of more than {LONGEST_DOCUMENT >> 20} MB: cut it into several")
    yield chunk(b"".join(parts), reached)                # even of nothing: it says that the file has been read to its end


def bytes_of(text: str) -> int:
    """Its length in UTF-8. Raises UnicodeEncodeError for half a surrogate pair, which JSON may hold."""
    return len(text) if text.isascii() else len(text.encode())


def parse(line: bytes) -> tuple[str, str]:
    """Text and domain (`pile_set_name`) of a line of JSON. Raises ValueError."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise ValueError('not a JSON object with a string "text"')
    about = document.get("meta")
    domain = about.get("pile_set_name") if isinstance(about, dict) else None
    try:
        bytes_of(document["text"])
    except UnicodeEncodeError as error:
        raise ValueError(f"text that is not valid Unicode ({error.reason})") from error
    return document["text"], domain[:100].encode(errors="replace").decode() if isinstance(domain, str) else UNNAMED


def parse_chunk(chunk: Chunk, bad: list):
    """Yield text and domain of a chunk's documents; bad lines go to the list, as (file:line, reason)."""
    if not chunk.lines:
        try:
            if chunk.first_line == 1:           # not again where a run goes on behind it
                yield chunk.data.decode(), UNNAMED
        except UnicodeDecodeError as error:
            bad.append((chunk.path, f"not UTF-8 (byte {error.start})"))
        return
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
        if line.strip():
            try:
                yield parse(line)
            except ValueError as error:
                bad.append((f"{chunk.path}:{number}", str(error)))


def refuse(bad: list):
    """Raise InputError for the first bad line, if there is one."""
    if bad:
        place, reason = bad[0]
        raise InputError(f"{place}: {reason}: mend it, or leave out what cannot be read with --skip-bad")


def documents(path: Path, skip_bad: bool = False):
    """The texts in a file. Raises InputError with file and line where one is not to be read."""
    bad = []
    for chunk in chunks(path):
        yield from (text for text, _ in parse_chunk(chunk, bad))
        if not skip_bad:
            refuse(bad)
