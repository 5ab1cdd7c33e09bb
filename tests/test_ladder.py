"""lab/ladder.py: sizes and recipes are as it says; what it makes of losses that lie on a power law."""
import shlex
import sys

import numpy as np
import pytest
import torch

from lab import ladder
from lab.generators import Bits
from leviathan import Config, LanguageModel

FIELDS = dict(model=str, generator=str, d_model=int, n_layers=int, d_seed=int, mode_width=int, seq_len=int)


def parts(flags: str, **more) -> dict[str, int]:
    """Parameters of the model that flags of train.py describe."""
    words = shlex.split(flags)
    given = {name[2:].replace("-", "_"): value for name, value in zip(words, words[1:])}
    config = Config(vocab_size=ladder.V, **{n: FIELDS[n](given[n]) for n in FIELDS if n in given} | more)
    with torch.device("meta"):
        return LanguageModel(config).parameters_by_part()


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_sizes_and_tokens(rung):
    """20 tokens for each parameter of the untied twin; no other mode width is nearer to the share."""
    (title, variants), = ladder.experiments([rung], sweep=False).items()
    D, L = ladder.RUNGS[rung]
    untied, steps = parts(variants["dense-untied"]), int(variants["dense"].split("--steps ")[1].split()[0])
    assert title == f"D {D}, L {L}" and D * L == rung
    assert steps * ladder.TOKENS / sum(untied.values()) == pytest.approx(20, rel=2e-3)
    for name, flags in variants.items():
        if "1/" not in name or "deepened" in name:
            continue
        share, own = eval(name.split(", ")[1]), int(flags.split("--mode-width ")[1].split()[0])
        base = 256 if "vectors" in name else None
        off = [abs(parts(flags, mode_width=r, base=base)["embedding"] - share * ladder.V * D)
               for r in (max(1, own - 1), own, own + 1)]
        assert min(off) == off[1], (name, off)
    assert parts(variants["bits of the id"])["embedding"] == 0


def test_bits_by_hand():
    assert Bits(8, 7)(torch.tensor([[5], [0]])).tolist() == [[[1, -1, 1, 1, -1, 1, 1]], [[-1] * 7]]
    model = LanguageModel(Config(generator="bits", vocab_size=300, d_model=8, n_layers=1))
    ids = torch.arange(6).view(2, 3)
    expected = model(ids)
    torch.testing.assert_close(model.materialize()(ids), expected)


def losses(found: dict) -> dict:
    """{rung: {model: {seed: loss}}} as lab.campaign returns it, with one evaluation half-way."""
    def run(seed, size, loss):
        log = [dict(step=i + 1, val_loss=x) for i, x in enumerate((loss + 1, loss))]
        return dict(seed=seed, parameters=dict(embedding=0, blocks=size, head=0), log=log)
    return {rung: {name: [run(seed, *point) for seed, point in enumerate(points)]
                   for name, points in variants.items()} for rung, variants in found.items()}


def test_a_power_law_by_hand(monkeypatch, tmp_path):
    """Dense: loss = 8 n^(-1/4), and a tenth more for the second seed. "v1" is as good as one of 1, 2 and 4
    times its size, "bits" only there on one rung."""
    sizes, times = (10_000, 40_000, 160_000), (1, 2, 4)
    found = losses({str(n): {
        "dense": [(n, 8 * n**-0.25), (n, 8.8 * n**-0.25)], "dense-untied": [(n, 8 * n**-0.25)] * 2,
        "v1": [(n, 8 * (n * k)**-0.25), (n, 8.8 * (n * k)**-0.25)]} for n, k in zip(sizes, times)})
    found["10000"]["bits"] = found["10000"]["v1"]
    np.testing.assert_allclose(ladder.multiples(found, "v1"), [[1, 1], [2, 2], [4, 4]])
    monkeypatch.setattr(ladder, "campaign", lambda *_: found)
    monkeypatch.setattr(sys, "argv", f"lab.ladder --data x --out {tmp_path}".split())
    ladder.main()
    tables = (tmp_path / "tables.md").read_text()
    assert "v1: as good as a tied model of 2.333 ± 1.366 times its parameters" in tables
    assert "| dense-untied | 0.01 | 0.00 | 0.800 ± 0.000 | -0.040 ± 0.057 | 2 |" in tables
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="unknown model 'gpt': choose from dense, dense-untied, control"):
        ladder.experiments([64], False, ["dense", "gpt"])
