"""sample.py: the cache changes nothing, draws are what was asked for, text is whole."""
import io
import json
import runpy
import sys
from unittest import mock

import pytest
import tiktoken
import torch

import sample
from kill_train import ROOT
from leviathan import Config, LanguageModel
from prepare_pile import sealed
from sample import KeyValues, draw, generate, stream_text
from test_leviathan import TINY, TWINS


def uncached(model, ids: list[int], n: int, seed: int) -> list[int]:
    """Tokens drawn after a pass over all that each is drawn from: see generate."""
    out, T, stream = list(ids), model.config.seq_len, torch.Generator().manual_seed(seed)
    first = max(0, len(out) - T)                        # of the context
    for _ in range(n):
        if len(out) - first > T:
            first = len(out) - T // 2
        out.append(draw(model(torch.tensor([out[first:]]))[:, -1], 1.0, 0, 1.0, [stream]).item())
    return out[len(ids):]


@torch.no_grad()
@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_the_cache_changes_nothing(twin):
    """In pieces of 5, 1, 4, 1 and 5 tokens, against one pass; then texts that outgrow the context of 16."""
    model, ids = LanguageModel(Config(**TINY | twin)).double(), torch.randint(97, (2, 16))
    model.lm_head.weight.mul_(6)                        # so that it has a preference
    caches, parts = [KeyValues() for _ in model.layers], ids.split([5, 1, 4, 1, 5], dim=1)
    logits = [model.lm_head(model.hidden(model.embed_tokens(new), caches)) for new in parts]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), rtol=1e-9, atol=1e-12)
    for prompt in (torch.randint(97, (n,)) for n in (1, 7, 16, 30)):
        tokens = [token.item() for token in generate(model, prompt, 40, seed=3)]
        assert tokens == uncached(model, prompt.tolist(), 40, seed=3) and len(set(tokens)) > 5


@pytest.mark.parametrize("how, expected", [
    ({}, [1, 4, 3, 2]), (dict(temperature=0), [0, 1, 0, 0]), (dict(temperature=0.5), [1, 16, 9, 4]),
    (dict(top_k=2), [0, 4, 3, 0]), (dict(top_k=9), [1, 4, 3, 2]), (dict(top_p=0.75), [0, 4, 3, 2]),
    (dict(top_p=0.65), [0, 4, 3, 0]), (dict(top_k=3, top_p=0.5), [0, 4, 3, 0])], ids=str)
def test_draws_by_hand(how, expected):
    """2,000 of tokens that have the probabilities 0.1, 0.4, 0.3 and 0.2."""
    logits, stream = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log(), torch.Generator().manual_seed(0)
    how = dict(temperature=1.0, top_k=0, top_p=1.0) | how
    drawn = draw(logits.expand(2_000, 4), **how, streams=[stream] * 2_000).bincount(minlength=4) / 2_000
    torch.testing.assert_close(drawn, torch.tensor(expected) / sum(expected), rtol=0, atol=0.04)
    assert [x > 0 for x in drawn] == [x > 0 for x in expected]


def test_draws_are_seeded():
    """Sample i of seed s is the one of seed s + i, whatever stands beside it."""
    def text(n=1, **how):
        return torch.stack(list(generate(model, torch.tensor([1, 2]), 12, samples=n, **how))).T.tolist()
    model = LanguageModel(Config(**TINY))
    assert text(3, seed=1) == text(seed=1) + text(seed=2) + text(seed=3) and text(seed=1) != text(seed=2)
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2) == text(top_k=1) == text(top_p=1e-9)


BYTES = tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                          special_tokens={"<|endoftext|>": 258})        # so 257 is no token


@pytest.mark.parametrize("spelt, expected, n", [
    (["né 北京 🙂!".encode()], ["né 北京 🙂!"], 17),
    (["né 🙂".encode()[:-1]], ["né \ufffd"], 8),
    ([[72, 105, 258, 33, 33, 33], [79, 257, 104, 33, 258, 33]], ["Hi", "Oh!"], 5)])
def test_streamed_text_never_cuts_a_character(monkeypatch, spelt, expected, n):
    """Each byte is a token. The last of a text may be lacking; two samples stop at their end of text."""
    monkeypatch.setattr(sample, "generate", lambda *_, **__: torch.tensor([list(ids) for ids in spelt]).T)
    streamed = list(stream_text(None, BYTES, [0], 100, samples=len(spelt)))
    assert ["".join(pieces) for pieces in zip(*streamed)] == expected and len(streamed) == n


def call(monkeypatch, *arguments, stdin: str = "", **streams) -> str:
    """sample.py as `%run` in a notebook runs it, with streams that are no files. -> what it wrote"""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    streams = dict(stdin=io.StringIO(stdin), stdout=io.StringIO(), stderr=io.StringIO()) | streams
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    return sys.stdout.getvalue()


def test_from_a_checkpoint_to_text(monkeypatch, saved, tmp_path):
    saved(Config(**TINY | dict(vocab_size=300)), tmp_path)
    how = [tmp_path, "--tokens", 30, "--prompt"]
    text = call(monkeypatch, *how, "né(")
    assert text.startswith("né(") and "sees the last 8 to 16 tokens only" in sys.stderr.getvalue()
    assert text == call(monkeypatch, *how, "-", stdin="né(") != call(monkeypatch, *how, "né(", "--seed", 1)
    assert call(monkeypatch, *how, "né(", "--samples", 2).startswith(f"--- sample 0 ---\n{text}--- sample 1")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    terminal.getvalue = lambda: terminal.buffer.getvalue().decode()         # which lacks a character
    assert call(monkeypatch, *how, "né(", stdout=terminal) == text.encode("ascii", "replace").decode()


@pytest.mark.parametrize("flags, message", [
    ("--tokens 0", "--tokens 0: give 1"), ("--temperature nan", "nan: give"), ("--top-p 0", "0.0: give"),
    ("--seed -1", "--seed -1: give 0"), ("--device tpu", "--device tpu: there is none here"),
    ("97", "300 ids, .* 97"), ("other", "tokenizer.json is missing"), ("empty", "tokenizer.json is missing")])
def test_what_cannot_be_is_one_line(monkeypatch, saved, tmp_path, flags, message):
    """The last three: tokenizer.json is not of this model of 97 ids, or no tokenizer, or empty."""
    saved(Config(**TINY | dict(vocab_size=97 if flags == "97" else 300)), tmp_path)
    path = tmp_path / "step-00000002/tokenizer.json"
    path.write_text(dict(other="{}", empty="").get(flags, path.read_text()))
    with pytest.raises(SystemExit, match=rf"^sample\.py: [^\n]*{message}[^\n]*$"):
        call(monkeypatch, tmp_path, *(flags.split() if "-" in flags else []))


def test_a_tokenizer_that_cannot_be_fetched_is_no_damage(saved, tmp_path, monkeypatch):
    saved(Config(**TINY | dict(vocab_size=300)), tmp_path)
    known = sealed(dict(name="gpt2", vocab_size=300))
    (tmp_path / "step-00000002/tokenizer.json").write_text(json.dumps(known))
    monkeypatch.setattr(tiktoken, "get_encoding", mock.Mock(side_effect=OSError("no network")))
    with pytest.raises(ConnectionError, match="^tiktoken could not load gpt2 .*: it downloads it once"):
        sample.read_checkpoint(tmp_path)
