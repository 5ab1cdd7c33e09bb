"""lab/new_tokens.py: tokens added to a trained model."""
import json
import sys

import numpy as np
import pytest
import torch

from lab import new_tokens
from leviathan import Config, LanguageModel, TokenGenerator

TINY = dict(vocab_size=300, seq_len=64, d_model=32, n_layers=1, n_heads=2, d_seed=8, mode_width=2)


def test_words_are_the_pairs_that_belong_together():
    """7 8 always stand together and 5 6 nearly always; 1 2 by chance, often as they are; none comes twice."""
    rng = np.random.default_rng(0)
    text = np.concatenate([[7, 8, *rng.integers(1, 4, size=5), 5, 6 if i % 9 else 4] for i in range(400)])
    assert new_tokens.find_words(text, text, V=10, n=2, examples=20).tolist() == [[7, 8], [5, 6]]
    assert [7, 8] not in new_tokens.find_words(text, text, V=10, n=2, examples=20, never=7).tolist()
    with pytest.raises(ValueError, match="lower --words or --examples"):
        new_tokens.find_words(text, text, V=10, n=9, examples=20)


def test_sentences_hold_the_word_in_its_place():
    text = np.random.default_rng(0).integers(0, 4, size=5_000)
    pieces, merged = new_tokens.sentences(text, np.array([[1, 2], [3, 0]]), 10, 5, np.random.default_rng(1))
    before, after = new_tokens.BEFORE, new_tokens.AFTER
    assert pieces.shape == (2, 5, before + 2 + after) and merged.shape == (2, 5, before + 1 + after)
    assert (pieces[0, :, before:before + 2] == torch.tensor([1, 2])).all()
    assert (merged[0, :, before] == 10).all() and (merged[1, :, before] == 11).all()
    assert torch.equal(pieces[..., :before], merged[..., :before])
    assert torch.equal(pieces[..., before + 2:], merged[..., before + 1:])


@pytest.mark.parametrize("twin", ["leviathan", "dense-untied"])
def test_only_the_new_token_is_fitted(twin):
    """Logits of the old tokens stay as they are, and the loss falls. A seed is fitted as a seed."""
    model = LanguageModel(Config(**TINY, model=twin)).requires_grad_(False)
    embed, outputs = model.embed_tokens, model.lm_head.weight[[1, 3]]
    ids = torch.randint(300, (6, 20), generator=torch.Generator().manual_seed(0))
    before = model(ids)
    methods = new_tokens.methods(embed, np.array([[1, 2], [3, 4]]))
    name, inputs = next((name, inputs) for name, (inputs, fitted) in methods.items() if fitted)
    assert name.startswith("seed" if twin == "leviathan" else "row")
    assert inputs.shape == (2, 8 if twin == "leviathan" else 32)
    to_rows = (lambda z: embed.surface(embed.coordinates(z))) if twin == "leviathan" else lambda rows: rows
    model.materialize()

    none = new_tokens.extended(model, to_rows, inputs, outputs, ids[:0].view(2, 0, 20), 0)
    torch.testing.assert_close(none.embed_tokens.weight[300:], to_rows(inputs))
    new = ids.clone()
    new[:, 7] = 300 + torch.arange(6) // 3
    fitted = new_tokens.extended(model, to_rows, inputs, outputs, new.view(2, 3, 20), 0.3)
    torch.testing.assert_close(fitted(ids)[..., :300], before)
    assert torch.equal(fitted.embed_tokens.weight[:300], model.embed_tokens.weight)
    first, last = new_tokens.nats(none, new), new_tokens.nats(fitted, new)
    assert last.mean() < first.mean()
    assert last[:, 6].mean() < first[:, 6].mean() - 1           # where it is to be predicted


def test_the_nearest_free_address_by_trying_all():
    """And where no address is free, as with 216 tokens in base 6, no method asks for one."""
    rng = torch.Generator().manual_seed(0)
    generator = TokenGenerator(100, 8, base=6, d_seed=4).requires_grad_(False)
    generator.addresses = torch.randperm(216, generator=rng)[:100]
    pairs = np.array([[0, 1], [7, 9], [50, 99]])
    free = torch.tensor(sorted({*range(216)} - {*generator.addresses.tolist()}))
    sums = new_tokens.summed(free, generator.codebooks)
    wanted = (generator.seeds(torch.tensor(pairs[:, 0])) + generator.seeds(torch.tensor(pairs[:, 1]))) / 2
    found = new_tokens.methods(generator, pairs)
    expected = torch.stack([sums[(sums - row).square().sum(1).argmin()] for row in wanted])
    torch.testing.assert_close(found["nearest free address"][0], expected)
    assert len(found) == 3 and len(new_tokens.methods(TokenGenerator(216, 8, d_seed=4), pairs)) == 2


def test_from_runs_to_a_table(saved, tmp_path, monkeypatch, capsys):
    for model in ("dense-untied", "leviathan", "dense"):
        saved(Config(**TINY, model=model), tmp_path / model)
    monkeypatch.setattr(new_tokens, "TESTED", 2)
    monkeypatch.setattr(new_tokens, "STEPS", 2)
    command = ["lab.new_tokens", "--words", "2", "--examples", "1", "3"]
    lines = tmp_path / "lines"
    runs = [str(tmp_path / "dense-untied"), str(tmp_path / "leviathan")]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(lines), *runs])
    new_tokens.main()
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    tried = [(line["method"], line["examples"]) for line in found
             if line["model"] == "v1, width 2, base 7, D 32, L 1"]
    assert tried == [("as two tokens", 0), ("seed, pieces' mean", 0), ("seed, fitted from the mean", 1),
                     ("seed, fitted from the mean", 3), ("nearest free address", 0)]
    table = capsys.readouterr().out
    assert table.count("| dense-untied, D 32, L 1 |") == 4
    assert table.count("| +") + table.count("| -") == 2 * 7
    with pytest.raises(ValueError, match="lines: name a new file"):
        new_tokens.main()
    saved(Config(**TINY, generator="bits"), tmp_path / "bits")
    monkeypatch.setattr(new_tokens, "study", lambda *_: pytest.fail("work was done first"))
    for run in "dense", "bits":
        monkeypatch.setattr(sys, "argv", [command[0], *runs, str(tmp_path / run)])
        with pytest.raises(ValueError, match=f"{run} must have an input that can be fitted, an untied head"):
            new_tokens.main()


def test_differences_are_paired_by_run():
    """Two of one name and seed, such as a shorter one."""
    lines = [dict(run=run, model="v1", seed=0, method=method, examples=0, sentence=x, following=x / 2)
             for run, two, one in (("a", 100, 101), ("b", 80, 82))
             for method, x in ((new_tokens.AS_TWO, two), ("mean", one))]
    assert "| v1 | mean |  | +1.500 ± 0.707 | +0.750 ± 0.354 | 2 |" in new_tokens.as_table(lines)


def test_a_checkpoint_that_does_not_say_its_data_is_one_clear_line(saved, tmp_path, monkeypatch):
    saved(Config(**TINY), tmp_path)
    config = tmp_path / "step-00000002/config.json"
    config.write_text(json.dumps({"config": json.loads(config.read_text())["config"]}))
    monkeypatch.setattr(sys, "argv", ["lab.new_tokens", str(tmp_path)])
    with pytest.raises(ValueError, match="config.json"):
        new_tokens.main()
