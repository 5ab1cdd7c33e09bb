import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leviathan import Config, LanguageModel


class LoRA(nn.Module):
    """base(x) + B A x in the place of a linear layer, as peft does it."""
    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_lora(generator):
    """Adapters on mode_proj and lm_head are part of the loss, and all that learns."""
    config = Config(vocab_size=300, seq_len=16, d_model=32, n_layers=1, d_seed=16, generator=generator)
    model = LanguageModel(config).requires_grad_(False)
    ids = torch.randint(300, (2, 17))
    plain = model(ids[:, :-1], ids[:, 1:])
    model.lm_head, model.embed_tokens.mode_proj = LoRA(model.lm_head), LoRA(model.embed_tokens.mode_proj)
    loss = model(ids[:, :-1], ids[:, 1:])
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert loss != plain
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == {
        f"{place}.{part}.weight" for place in ("lm_head", "embed_tokens.mode_proj") for part in "ab"}
