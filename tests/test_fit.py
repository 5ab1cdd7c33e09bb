"""lab/fit.py: rows that can be held are held; from a run to a file that train.py goes on from."""
import sys

import pytest
import torch

from lab import fit
from leviathan import Config, TokenGenerator
from test_leviathan import TINY
from train import Training, build


def test_few_rows_are_fitted_by_frequency(monkeypatch):
    """Fifty random rows by a generator of many more numbers. Those that are never seen do not count."""
    monkeypatch.setattr(fit, "BATCH", 64)
    table, frequency = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.ones(50)
    frequency[40:] = 0
    embed = TokenGenerator(50, 4, d_seed=16, n_modes=2, mode_width=8)
    left = fit.fit(table, frequency, embed, steps=300, rate=1e-2)
    off = (embed.table() - table).square().sum(1)
    seen = table[:40] - table[:40].mean(0)
    assert left == pytest.approx((off[:40].sum() / seen.square().sum()).item(), rel=1e-4)
    assert left < 0.02 and off[40:].mean() > 50 * off[:40].mean()


def test_from_a_run_to_a_start(saved, tiny_data, tmp_path, monkeypatch, capsys):
    twin = saved(Config(**TINY | dict(vocab_size=300, model="dense-untied")), tmp_path / "twin")
    words = f"lab.fit {tmp_path / 'twin'} --out {tmp_path / 'x.pt'} --d-seed 8 --mode-width 2 --steps 10"
    monkeypatch.setattr(sys, "argv", words.split())
    fit.main()
    assert " numbers for " in capsys.readouterr().out
    config = Config(**TINY | dict(vocab_size=300, d_seed=8, mode_width=2))
    model = build(config, Training(data=str(tiny_data), start=str(tmp_path / "x.pt")))
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight)
    assert not torch.equal(model.embed_tokens.table(), TokenGenerator(300, twin.config.d_model).table())
    with pytest.raises(ValueError, match="x.pt exists: name another"):
        fit.main()
    torch.save({"embed_tokens.weight": torch.ones(300, 8)}, tmp_path / "table.pt")
    for more, message in (("--steps 2", "must be at least 1, --steps 3"),
                          (f"--start {tmp_path / 'table.pt'}", "does not fit here: .* no embed_tokens.weig"),
                          ("--rate 1e30", "the fit diverged at --rate 1e")):
        monkeypatch.setattr(sys, "argv", f"{words.replace('x.pt', 'y.pt')} {more}".split())
        with pytest.raises(ValueError, match=message):
            fit.main()
    assert not (tmp_path / "y.pt").exists()
