"""sample.py: the cache changes nothing, draws are what was asked for, text is whole."""
import io
import json
import os
import subprocess
import sys

import pytest
import tiktoken
import torch

import sample
from kill_train import ROOT
from leviathan import Config, LanguageModel
from sample import Embeddings, KeyValues, draw, generate, stream_text
from test_leviathan import TINY, TWINS


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_cached_logits_equal_uncached_ones(twin):
    """Two sequences read in pieces of 5, 1, 4, 1 and 5 tokens, against one pass over all 16."""
    model, ids = LanguageModel(Config(**TINY | twin)).double(), torch.randint(97, (2, 16))
    embed, caches = Embeddings(model), [KeyValues(model, 2) for _ in model.layers]
    with torch.no_grad():
        parts = ids.split([5, 1, 4, 1, 5], dim=1)
        pieces = [model.lm_head(model.hidden(embed(part), caches)) for part in parts]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-9, atol=1e-12)


def uncached(model, ids: list[int], n: int, seed: int) -> list[int]:
    """Tokens drawn after a pass over all that each is drawn from: see generate."""
    out, T, stream = list(ids), model.config.seq_len, torch.Generator().manual_seed(seed)
    first = max(0, len(out) - T)                        # of the context
    for _ in range(n):
        if len(out) - first > T:
            first = len(out) - T // 2
        out.append(draw(model(torch.tensor([out[first:]]))[:, -1], 1.0, 0, 1.0, [stream]).item())
    return out[len(ids):]


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_text_may_outgrow_the_context(twin):
    """A context of 16, prompts of 1 to 30 tokens, 40 more."""
    model = LanguageModel(Config(**TINY | twin)).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)                    # so that it has a preference
        for ids in map(torch.randint, [97] * 4, [(1,), (7,), (16,), (30,)]):
            tokens = [token.item() for token in generate(model, ids, 40, seed=3)]
            assert tokens == uncached(model, ids.tolist(), 40, seed=3) and len(set(tokens)) > 5


def test_each_embedding_is_generated_once(monkeypatch):
    model, made = LanguageModel(Config(**TINY)), []
    expected, rows = model.embed_tokens.table(), model.embed_tokens.rows
    monkeypatch.setattr(model.embed_tokens, "rows", lambda ids: made.extend(ids.tolist()) or rows(ids))
    embed = Embeddings(model)
    for ids in torch.tensor([[3, 5, 3], [5, 7, 3], [7, 7, 7]]):
        torch.testing.assert_close(embed(ids[None]), expected[ids[None]])
    assert made == [3, 5, 7]


@pytest.mark.parametrize("how, expected", [
    ({}, [1, 4, 3, 2]), (dict(temperature=0), [0, 1, 0, 0]),
    (dict(temperature=0.5), [1, 16, 9, 4]),         # squares
    (dict(top_k=2), [0, 4, 3, 0]), (dict(top_k=9), [1, 4, 3, 2]), (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_p=0.75), [0, 4, 3, 2]), (dict(top_p=0.65), [0, 4, 3, 0]), (dict(top_p=0.01), [0, 1, 0, 0]),
    (dict(top_k=3, top_p=0.5), [0, 4, 3, 0]), (dict(temperature=1e-300), [0, 1, 0, 0])], ids=str)
def test_draws_by_hand(how, expected):
    """Of tokens that have the probabilities 0.1, 0.4, 0.3 and 0.2."""
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().expand(2_000, 4)
    how = dict(temperature=1.0, top_k=0, top_p=1.0, streams=[torch.Generator().manual_seed(0)] * 2_000) | how
    drawn = draw(logits, **how).bincount(minlength=4) / 2_000
    torch.testing.assert_close(drawn, torch.tensor(expected) / sum(expected), rtol=0, atol=0.04)
    assert [x > 0 for x in drawn] == [x > 0 for x in expected]


def test_draws_are_seeded():
    """Sample i of seed s is the one of seed s + i, whatever stands beside it."""
    model = LanguageModel(Config(**TINY))
    def text(n=1, **how):
        return torch.stack(list(generate(model, torch.tensor([1, 2]), 12, samples=n, **how))).T.tolist()
    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(3, seed=1) == text(seed=1) + text(seed=2) + text(seed=3)
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2) == text(top_k=1) == text(top_p=1e-9)


BYTES = tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                          special_tokens={"<|endoftext|>": 258})    # 257 is none, as some ids of o200k_base


@pytest.mark.parametrize("spelt, expected, pieces", [
    (["né 北京 🙂!".encode()], ["né 北京 🙂!"], 17),
    (["né 🙂".encode()[:-1]], ["né \ufffd"], 8),                                            # cut by --tokens
    ([[72, 105, 258, 33, 33, 33], [79, 257, 104, 33, 258, 33]], ["Hi", "Oh!"], 5)])         # by <|endoftext|>
def test_streamed_text_never_cuts_a_character(monkeypatch, spelt, expected, pieces):
    """Each byte is a token of its own; then two samples, one of them with an id that is no token."""
    tokens = torch.tensor([list(one) for one in spelt]).T
    monkeypatch.setattr(sample, "generate", lambda *_, **__: tokens)
    streamed = list(stream_text(None, BYTES, [0], 100, samples=len(spelt)))
    assert ["".join(piece) for piece in zip(*streamed)] == expected and len(streamed) == pieces
    broken = sum("\ufffd" in piece for pieces in streamed for piece in pieces)
    assert broken == "".join(expected).count("\ufffd")


def call(monkeypatch, *arguments, stdin: str = "") -> str:
    """sample.main() with streams that are no files, as in a notebook. -> what it wrote"""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    for name, stream in dict(stdin=io.StringIO(stdin), stdout=io.StringIO(), stderr=io.StringIO()).items():
        monkeypatch.setattr(sys, name, stream)
    sample.main()
    return sys.stdout.getvalue()


def test_from_a_checkpoint_to_text(monkeypatch, saved, tmp_path):
    saved(Config(**TINY | dict(vocab_size=300)), tmp_path)
    text = call(monkeypatch, tmp_path, "--prompt", "def né(", "--tokens", 30)
    assert text.startswith("def né(") and len(text) > 20
    assert "the model sees the last 8 to 16 tokens only" in sys.stderr.getvalue()
    step = tmp_path / "step-00000002"
    assert text == call(monkeypatch, step, "--prompt", "-", "--tokens", 30, stdin="def né(")
    assert text != call(monkeypatch, tmp_path, "--prompt", "def né(", "--tokens", 30, "--seed", 1)
    two = call(monkeypatch, tmp_path, "--prompt", "def né(", "--tokens", 30, "--samples", 2)
    assert two.startswith(f"--- sample 0 ---\n{text}--- sample 1 ---\ndef né(")
    command = [sys.executable, ROOT / "sample.py", tmp_path, "--prompt", "def né(", "--tokens", "30"]
    ascii_only = os.environ | dict(PYTHONIOENCODING="ascii", OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, env=ascii_only)
    assert done.stdout.startswith(b"def n?(") and done.returncode == 0  # a terminal without é


@pytest.mark.parametrize("flags, message", [
    ("--tokens 0", "--tokens 0: give 1 to"), ("--temperature -1", "--temperature -1.0: give 0 to"),
    ("--temperature nan", "--temperature nan"), ("--samples 0", "--samples 0"), ("--top-p 0", "--top-p 0.0"),
    ("--seed -1", "--seed -1: give 0 to"), ("--device tpu", "--device tpu: there is none here; .*cpu"),
    ("nowhere", "no checkpoint in nowhere: name a folder"),
    ("other", "tokenizer.json is not train.py's .*300 ids, but the model has 97"),
    ("damaged", "tokenizer.json is not train.py's"), ("empty", "tokenizer.json is not train.py's")])
def test_what_cannot_be_is_one_line(monkeypatch, saved, tmp_path, flags, message):
    saved(Config(**TINY | dict(vocab_size=97 if flags == "other" else 300)), tmp_path / "run")
    path = tmp_path / "run/step-00000002/tokenizer.json"
    if flags in ("damaged", "empty"):
        known = json.loads(path.read_text())
        path.write_text(json.dumps(known | dict(tokens=known["tokens"][:-1])) if flags == "damaged" else "")
    arguments = [tmp_path / "run", *(flags.split() if "-" in flags else ())]
    if flags == "nowhere":
        arguments = ["nowhere"]
    with pytest.raises(ValueError, match=message) as raised:
        call(monkeypatch, *arguments)
    assert "\n" not in str(raised.value)
