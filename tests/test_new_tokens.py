"""Tokens added to a trained model."""
import json
import sys

import numpy as np
import pytest
import torch

import addresses
import new_tokens
import train
from common import InputError
from leviathan import Config, LanguageModel, TokenGenerator

TINY = dict(vocab_size=300, seq_len=64, d_model=32, n_layers=1, n_heads=2, d_seed=8, mode_width=2)


def test_words_are_the_pairs_that_belong_together():
    """7 8 always stand together and 5 6 nearly always; 1 2 stand together by chance, often as they are; no token twice."""
    rng = np.random.default_rng(0)
    text = np.concatenate([[7, 8, *rng.integers(1, 4, size=5), 5, 6 if i % 9 else 4] for i in range(400)])
    assert new_tokens.find_words(text, text, V=10, n=2, examples=20).tolist() == [[7, 8], [5, 6]]
    with pytest.raises(InputError, match="lower --words or --examples"):
        new_tokens.find_words(text, text, V=10, n=9, examples=20)


def test_sentences_hold_the_word_in_its_place():
    text = np.random.default_rng(0).integers(0, 4, size=5_000)
    pieces, merged = new_tokens.sentences(text, np.array([[1, 2], [3, 0]]), 10, 5, np.random.default_rng(1))
    before, after = new_tokens.BEFORE, new_tokens.AFTER
    assert pieces.shape == (2, 5, before + 2 + after) and merged.shape == (2, 5, before + 1 + after)
    assert (pieces[0, :, before:before + 2] == torch.tensor([1, 2])).all() and (merged[1, :, before] == 11).all()
    assert torch.equal(pieces[..., :before], merged[..., :before])
    assert torch.equal(pieces[..., before + 2:], merged[..., before + 1:])


@pytest.mark.parametrize("twin", ["leviathan", "dense-untied"])
def test_only_the_new_token_is_fitted(twin):
    """Logits of the old tokens stay as they are, the model's weights too, and the loss falls."""
    model = LanguageModel(Config(**TINY, model=twin)).requires_grad_(False)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    inputs, seeds, _ = list(new_tokens.methods(model, np.array([[1, 2], [3, 4]])).values())[-1]
    table = model.embed_tokens.table() if seeds else model.embed_tokens.weight
    extended = new_tokens.Extended(model, table, inputs, model.lm_head.weight[[1, 3]], seeds)
    ids = torch.randint(300, (6, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(extended(ids)[..., :300], model(ids))
    ids[:, 7] = 300 + torch.arange(6) % 2
    nats = new_tokens.losses(extended, ids)
    new_nats = new_tokens.losses(extended.fit(ids.view(2, 3, 20), rate=0.3), ids)
    assert new_nats.mean() < nats.mean()
    assert new_nats[:, 6].mean() < nats[:, 6].mean() - 1            # where it is to be predicted
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_nearest_free_address_by_trying_all():
    taken = torch.randperm(216, generator=torch.Generator().manual_seed(0))[:100]
    generator = TokenGenerator(100, 8, base=6, d_seed=4, addresses=taken)
    wanted = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) * 0.05
    free = sorted(set(range(216)) - set(taken.tolist()))
    assert new_tokens.free_addresses(generator, n=5).tolist() == free[:5]
    sums = addresses.approximate(torch.tensor(free), generator.codebooks.detach())
    expected = [free[(sums - row).square().sum(1).argmin()] for row in wanted]
    assert new_tokens.free_addresses(generator, wanted).tolist() == expected


def test_from_runs_to_a_table(tiny_data, tmp_path, monkeypatch, capsys):
    flags = ("--device cpu --seq-len 64 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 --mode-width 1 --steps 2 "
             f"--tokens-per-step 256 --eval-tokens 512 --data {tiny_data}").split()
    for model in ("dense-untied", "leviathan", "dense"):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--model", model, "--out", str(tmp_path / model)])
        train.main()
    monkeypatch.setattr(new_tokens, "TESTED", 2)
    monkeypatch.setattr(new_tokens, "STEPS", 2)
    command = ["new_tokens.py", "--words", "2", "--examples", "1", "3", "--json", str(tmp_path / "lines")]
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "dense-untied"), str(tmp_path / "leviathan")])
    new_tokens.main()
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [(line["method"], line["examples"]) for line in lines if line["model"].startswith("lev, width 1, learned")] == [
        ("as two tokens", 0), ("first free address", 0), ("nearest free address", 0), ("seed, pieces' mean", 0),
        ("seed, fitted from the mean", 3), ("seed, fitted from the mean", 1)]
    assert capsys.readouterr().out.count("| dense-untied |") == 4
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "dense")])
    with pytest.raises(InputError, match="use dense-untied"):
        new_tokens.main()
