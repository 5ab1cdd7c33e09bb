"""Tokenizers: any of tiktoken's by name, or one trained here, whose merges travel in JSON."""
import base64
import hashlib
import json
from functools import lru_cache

import tiktoken

from common import InputError

END_OF_TEXT = "<|endoftext|>"
LONGEST_RUN = 100_000           # characters; tiktoken fails on a million spaces
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|"
           r"\s+")              # rustbpe's own, after GPT-4's


def train_tokenizer(texts, vocab_size: int, name: str) -> tiktoken.Encoding:
    """A byte-pair encoding of `vocab_size` ids, the last of them <|endoftext|>, trained on an iterator of texts."""
    import rustbpe  # here, since only preparation needs it
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size=vocab_size - 1)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return tiktoken.Encoding(name, pat_str=trainer.get_pattern(), mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})


@lru_cache(maxsize=8)
def fingerprint(encoding: tiktoken.Encoding) -> str:
    """SHA-256 of all that decides how text is split: pattern, ranks and special tokens."""
    ranks = sorted((rank, token.hex()) for token, rank in encoding._mergeable_ranks.items())
    return hashlib.sha256(json.dumps([encoding._pat_str, ranks, sorted(encoding._special_tokens.items())]).encode()).hexdigest()


def cut_runs(text: str) -> list[str]:
    """The text, cut where whitespace, or its absence, goes on for long: no run of more than twice LONGEST_RUN is left.

    tiktoken takes the longer the more of memory for such a run, and panics where it is of whitespace. All other texts are
    left whole, and so have exactly tiktoken's tokens.
    """
    starts = range(0, len(text), LONGEST_RUN)
    run = lambda part: len(part) == LONGEST_RUN and (part.isspace() or part.split(None, 1) == [part])        # noqa: E731
    cuts = [0, *(i for i in starts if i and run(text[i:i + LONGEST_RUN])), len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Its tokens; a literal <|endoftext|> is text."""
    return [token for part in cut_runs(text) for token in encoding.encode_ordinary(part)]


@lru_cache(maxsize=8)
def token_bytes(encoding: tiktoken.Encoding) -> list[bytes]:
    """What each id spells: nothing for special tokens, and for ids that no token has."""
    spelling = [b""] * encoding.n_vocab
    for token, rank in encoding._mergeable_ranks.items():
        spelling[rank] = token
    return spelling


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
            tokens = [base64.b64decode(token, validate=True) for token in known["tokens"]]
            ranks = {token: rank for rank, token in enumerate(tokens)}
            if known["pattern"] != PATTERN:         # one that is made to, can take for ever
                raise ValueError("an unknown pattern")
            if len(ranks) < len(tokens) or not {*(bytes([i]) for i in range(256))} <= ranks.keys():     # tiktoken would panic
                raise ValueError("tokens twice, or bytes without one")
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
