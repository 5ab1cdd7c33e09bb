"""sample.py: the cache changes nothing, draws are what was asked for, text is whole."""
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import sample
from leviathan import Config, LanguageModel
from sample import Embeddings, KeyValues, draw, generate, stream_text
from test_leviathan import TINY, TWINS


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_cached_logits_equal_uncached_ones(twin):
    """Two sequences read in pieces of 5, 1, 4, 1 and 5 tokens, against one pass over all 16."""
    model = LanguageModel(Config(**TINY | twin)).double()
    ids = torch.randint(97, (2, 16))
    embed, caches = Embeddings(model), [KeyValues(model, 2) for _ in model.layers]
    with torch.no_grad():
        pieces = [model.lm_head(model.hidden(embed(part), caches)) for part in ids.split([5, 1, 4, 1, 5], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-9, atol=1e-12)
    assert caches[0].length == 16


def uncached(model, ids: list[int], n: int, seed: int) -> list[int]:
    """Tokens drawn after a pass over all that each is drawn from: see generate."""
    out, T, rng = list(ids), model.config.seq_len, torch.Generator().manual_seed(seed)
    first = max(0, len(out) - T)                        # of the context
    for _ in range(n):
        if len(out) - first > T:
            first = len(out) - T // 2
        out.append(draw(model(torch.tensor([out[first:]]))[:, -1], 1.0, 0, 1.0, [rng]).item())
    return out[len(ids):]


@pytest.mark.parametrize("twin", TWINS, ids=str)
@pytest.mark.parametrize("prompt", [1, 7, 16, 30])
def test_text_may_outgrow_the_context(twin, prompt):
    model = LanguageModel(Config(**TINY | twin)).double()
    ids = torch.randint(97, (prompt,))
    with torch.no_grad():
        model.lm_head.weight.mul_(6)                    # so that it has a preference
        tokens = [token.item() for token in generate(model, ids, 40, seed=3)]
        assert tokens == uncached(model, ids.tolist(), 40, seed=3) and len(set(tokens)) > 5


def test_each_embedding_is_generated_once(monkeypatch):
    model, made = LanguageModel(Config(**TINY)), []
    rows = model.embed_tokens.rows
    monkeypatch.setattr(model.embed_tokens, "rows", lambda ids: made.extend(ids.tolist()) or rows(ids))
    embed = Embeddings(model)
    for ids in torch.tensor([[3, 5, 3], [5, 7, 3], [7, 7, 7]]):
        torch.testing.assert_close(embed(ids[None]), model.embed_tokens(ids[None]))
        made[-len(ids.unique()):] = []                  # those of the comparison
    assert made == [3, 5, 7]


def counts(logits, n=2_000, **how):
    rng = torch.Generator().manual_seed(0)
    settings = dict(temperature=1.0, top_k=0, top_p=1.0) | how
    return torch.bincount(torch.cat([draw(logits, rngs=[rng], **settings) for _ in range(n)]), minlength=logits.shape[1]) / n


def test_draws_by_hand():
    """Tokens of probability 0.1, 0.4, 0.3 and 0.2."""
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    expected = {"plain": ({}, [0.1, 0.4, 0.3, 0.2]), "greedy": (dict(temperature=0), [0, 1, 0, 0]),
                "temperature": (dict(temperature=0.5), [1 / 30, 16 / 30, 9 / 30, 4 / 30]),         # squares
                "top 2": (dict(top_k=2), [0, 4 / 7, 3 / 7, 0]), "more than there are": (dict(top_k=9), [0.1, 0.4, 0.3, 0.2]),
                "nucleus": (dict(top_p=0.75), [0, 4 / 9, 3 / 9, 2 / 9]),                           # 0.4 + 0.3 is too little
                "nucleus of one": (dict(top_p=0.01), [0, 1, 0, 0]), "cold": (dict(temperature=1e-300), [0, 1, 0, 0])}
    for name, (how, wanted) in expected.items():
        torch.testing.assert_close(counts(logits, **how), torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=0.04, msg=name)


def test_draws_are_seeded():
    model = LanguageModel(Config(**TINY))
    text = lambda n=1, **how: torch.stack(list(generate(model, torch.tensor([1, 2]), 12, samples=n, **how))).T.tolist()  # noqa: E731
    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(3, seed=1) == text(seed=1) + text(seed=2) + text(seed=3)
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2) == text(top_k=1) == text(top_p=1e-9)


BYTES = tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                          special_tokens={"<|endoftext|>": 258})        # so 257 is no token, as some ids of o200k_base


class Speller:
    """In place of generate: says these tokens, for each of the samples."""
    def __init__(self, *samples):
        self.samples = [list(sample) for sample in samples]

    def __call__(self, model, ids, n_tokens, samples, **how):
        yield from torch.tensor(self.samples).T[:n_tokens]


def test_streamed_text_never_cuts_a_character(monkeypatch):
    """Characters of several bytes arrive whole, though each byte is a token of its own."""
    text = "né 北京 🙂!"
    monkeypatch.setattr(sample, "generate", Speller(text.encode()))
    pieces = [piece for piece, in stream_text(None, BYTES, [0], 100)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(pieces) == len(text.encode()) + 1
    monkeypatch.setattr(sample, "generate", Speller(text.encode()[:-2]))                # its last character is cut by --tokens
    assert "".join(piece for piece, in stream_text(None, BYTES, [0], 100)) == "né 北京 \ufffd"


def test_a_sample_ends_at_the_end_of_text(monkeypatch):
    """The first after two tokens, the second after four, when nothing is left to draw; an id that is no token says nothing."""
    monkeypatch.setattr(sample, "generate", Speller([72, 105, 258, 33, 33, 33], [79, 257, 104, 33, 258, 33]))
    pieces = list(stream_text(None, BYTES, [0], 100, samples=2))
    assert ["".join(piece) for piece in zip(*pieces)] == ["Hi", "Oh!"] and len(pieces) == 5


def test_embeddings_of_one_id_and_of_many_agree():
    """Few ids are summed and then projected, many the other way round (TokenGenerator.latent)."""
    for twin in TWINS[:2]:
        model = LanguageModel(Config(**TINY | twin)).double()
        table = model.embed_tokens.table()
        one_by_one = torch.cat([model.embed_tokens(torch.tensor([i])) for i in range(97)])
        torch.testing.assert_close(table, one_by_one, rtol=1e-9, atol=1e-12)
        assert F.cosine_similarity(table[0], table[1], dim=0) < 0.99
