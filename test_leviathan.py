"""The tests, which are also the worked examples: read them in order beside leviathan.py.

    python -m pytest test_leviathan.py      # these; without an argument, the technical ones in tests/ too
"""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common import InputError
from leviathan import (
    PRESETS,
    Config,
    LanguageModel,
    TokenGenerator,
    digits,
    isoparametric_depth,
    product_tree,
    smallest_base,
    spline_basis,
)
from loss import LinearCrossEntropy, linear_cross_entropy

HERE = Path(__file__).parent
TINY = dict(vocab_size=97, seq_len=16, d_model=32, n_layers=2, n_heads=2, d_seed=12, mode_width=2)
TWINS = [dict(generator="v1"), dict(generator="lev"), dict(model="dense"), dict(model="dense-untied")]


# ---- the method, step by step ----------------------------------------------------------------------------------------

def test_digits_by_hand():
    """<|endoftext|> of o200k_base is 199,999 = 57 * 59² + 26 * 59 + 48."""
    assert smallest_base(200_019, 3) == 59
    assert digits(torch.tensor([199_999, 0, 59]), base=59, n_coords=3).tolist() == [[57, 26, 48], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("power", [58**3, 59**3, 99**3, 1000**3])
def test_base_is_exact_at_powers(power):
    """In floating point, ceil(V ** (1/k)) is one too large for many of these."""
    root = round(power ** (1 / 3))
    assert [smallest_base(power + i, 3) for i in (-1, 0, 1)] == [root, root, root + 1]


def test_spline_by_hand():
    """Five knots, 1/4 apart. At a knot B = 3/4 there and 1/8 at its neighbours; half-way to the next, 1/2 and 1/2."""
    at = lambda x: spline_basis(torch.tensor(x), n_knots=5)      # noqa: E731
    torch.testing.assert_close(at(0.5), torch.tensor([0, 1 / 8, 3 / 4, 1 / 8, 0]))
    torch.testing.assert_close(at(0.0), torch.tensor([6 / 7, 1 / 7, 0, 0, 0]))         # (3/4, 1/8) / (7/8)
    torch.testing.assert_close(at(1.0), torch.tensor([0, 0, 0, 1 / 7, 6 / 7]))
    torch.testing.assert_close(at(1 / 8), torch.tensor([0.5, 0.5, 0, 0, 0]))


@pytest.mark.parametrize("n_knots", [3, 16, 32])
def test_splines_sum_to_one_and_at_most_three_are_not_zero(n_knots):
    basis = spline_basis(torch.linspace(0, 1, 10_001, dtype=torch.float64), n_knots)
    torch.testing.assert_close(basis.sum(-1), torch.ones(10_001, dtype=torch.float64))
    assert (basis >= 0).all() and (basis > 0).sum(-1).max() == 3


@pytest.mark.parametrize("n", [1, 2, 3, 7, 128])
def test_product_tree_is_a_product(n):
    x = torch.randn(n, 4, dtype=torch.float64)
    torch.testing.assert_close(product_tree(x), x.prod(0))


def slow_generator(g: TokenGenerator, ids):
    """The method as the paper writes it: every token, every knot, no shortcut. The generator must equal this."""
    c = g.config
    embeddings = []
    for address in g.addresses[ids].tolist():
        i = [address // c.base**j % c.base for j in reversed(range(c.n_coords))]
        z = sum(g.codebooks[j, i[j]] for j in range(c.n_coords))
        modes, latents = [], []
        for p, W_seed in enumerate(g.seed_proj):
            normed = F.layer_norm(W_seed @ z, (c.d_seed,), g.seed_norm_weight[p], g.seed_norm_bias[p])
            latent = torch.sigmoid((0.5 if c.generator == "lev" else 1.0) * normed)
            t = (latent[:, None] - torch.linspace(0, 1, c.n_knots, dtype=latent.dtype)).abs() * (c.n_knots - 1)
            B = torch.where(t < 0.5, 0.75 - t**2, torch.where(t < 1.5, (1.5 - t)**2 / 2, 0))
            B = B / B.sum(1, keepdim=True)
            modes.append(torch.einsum("dn,dnc->dc", B, g.splines[:, p]).prod(0))
            latents.append(latent)
        centre = 0 if c.paper else 1
        e = g.mode_proj.weight @ (torch.cat(modes) - centre)
        if c.generator == "v1":
            e = e + g.residual_proj.weight @ (latents[0] - centre / 2)
        embeddings.append(e)
    return torch.stack(embeddings)


def tiny_generator(**overrides):
    settings = dict(generator="v1", d_seed=12, mode_width=3, n_modes=2, seed=3) | overrides
    return TokenGenerator(vocab_size=97, d_model=8, **settings).double()


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("generator", ["v1", "lev"])
@pytest.mark.parametrize("n_coords", [1, 2, 3])
def test_generator_equals_the_slow_version(generator, paper, n_coords):
    """Values and gradients, for repeated ids of any shape and for addresses that are not the ids."""
    addresses = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    g = tiny_generator(generator=generator, paper=paper, n_coords=n_coords, addresses=addresses)
    ids = torch.tensor([[5, 96, 5, 0], [17, 5, 96, 44]])
    weights = torch.randn(2, 4, 8, dtype=torch.float64)
    fast, slow = g(ids), slow_generator(g, ids.flatten()).view(2, 4, 8)
    torch.testing.assert_close(fast, slow)
    gradients = [torch.autograd.grad((e * weights).sum(), list(g.parameters())) for e in (fast, slow)]
    for name, a, b in zip(dict(g.named_parameters()), *gradients):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_chunks_change_nothing(generator, monkeypatch):
    g = tiny_generator(generator=generator)
    whole = g(torch.arange(97))
    monkeypatch.setattr(TokenGenerator, "ELEMENTS_PER_CHUNK", {"cpu": 40 * g.splines[:, 0, 0].numel()})
    torch.testing.assert_close(g(torch.arange(97)), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_gradcheck(generator):
    """Against finite differences, in float64."""
    g = tiny_generator(generator=generator, d_seed=3, mode_width=1, n_knots=4)
    names = [name for name, _ in g.named_parameters()]
    call = lambda *ps: torch.func.functional_call(g, dict(zip(names, ps)), torch.tensor([3, 50, 96, 3]))     # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(g.parameters()))


def test_a_factor_of_exactly_zero_has_the_right_gradient():
    """φ = 0 in one dimension makes the mode 0, yet S there must learn: its gradient is the product of the others."""
    g = tiny_generator()
    with torch.no_grad():
        g.splines[4, 0, :, 0] = 0
    fast, slow = (torch.autograd.grad(e.sum(), g.splines)[0]
                  for e in (g(torch.tensor([7])), slow_generator(g, torch.tensor([7]))))
    torch.testing.assert_close(fast, slow)
    assert fast[4, 0, :, 0].abs().max() > 0


def test_generator_stands_in_for_an_embedding():
    """Any shape, any integer type; ids outside the vocabulary are refused."""
    g = TokenGenerator(97, 8, d_seed=12, mode_width=2)
    for ids in (torch.tensor(3), torch.tensor([[1, 2]], dtype=torch.int32), torch.zeros(0, dtype=torch.long)):
        assert g(ids).shape == (*ids.shape, 8)
    for bad in (97, -1):
        with pytest.raises(IndexError):
            g(torch.tensor([bad]))


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_a_seed_stands_in_for_digits(generator):
    """The sum of a token's codebook rows, given as a seed, is that token: so a token without digits can be added."""
    g = tiny_generator(generator=generator)
    ids = torch.tensor([3, 50, 96])
    seeds = sum(codebook[digit] for codebook, digit in zip(g.codebooks, digits(ids, g.config.base, g.config.n_coords).T))
    torch.testing.assert_close(g.from_seeds(seeds), g(ids))


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_tokens_start_apart_and_at_a_tables_scale(generator):
    """Mean cosine between the embeddings of different tokens at the start: the literal reading and ours."""
    ids = torch.arange(0, 200_019, 1_001)

    def start(paper):
        with torch.no_grad():
            e = TokenGenerator(200_019, 256, generator, mode_width=8, paper=paper)(ids)
        cosine = F.normalize(e, dim=-1) @ F.normalize(e, dim=-1).T
        return cosine[~torch.eye(len(ids), dtype=torch.bool)].mean().item(), e.std().item()

    literal, ours = start(paper=True), start(paper=False)
    assert literal[0] > 0.5 and literal[1] > 1
    assert ours[0] < 0.3 and 0.015 < ours[1] < 0.025


# ---- sizes -----------------------------------------------------------------------------------------------------------

def test_lev_has_the_papers_number_of_parameters():
    """22,656 codebooks + 131,072 W_seed + 2,048 LayerNorm + 1,048,576 S + 1,048,576 W_out, "2.25M" [P]."""
    with torch.device("meta"):
        g = TokenGenerator(200_376, 2048, "lev")
    assert g.codebooks.numel() == 177 * 128 == 22_656
    assert sum(p.numel() for p in g.parameters()) == 2_252_928


@pytest.mark.parametrize("preset, tied, untied, deep, depth", [("60m", 57.6, 108.9, 108.5, 52), ("270m", None, 421.0, 421, 28),
                                                               ("410m", 406.5, None, None, None)])
def test_sizes_and_isoparametric_depths_are_the_papers(preset, tied, untied, deep, depth):
    """In millions, as the paper labels them: 6 -> 52 layers at D=256 and 12 -> 28 at D=768 [P].

    Depths and dense sizes are exact; Leviathan's come to within 0.5 M, its generator being reconstructed [R].
    """
    def shape(**overrides):
        return Config.from_preset(preset, vocab_size=200_376, generator="v1", **overrides)

    def millions(**overrides):
        with torch.device("meta"):
            return LanguageModel(shape(**overrides)).n_parameters() / 1e6

    if tied:
        assert round(millions(model="dense"), 1) == tied
    if depth:
        assert isoparametric_depth(shape()) == depth
        assert millions(n_layers=depth) == pytest.approx(deep, abs=0.5)
        assert round(millions(model="dense-untied"), 1) == untied
        assert millions(n_layers=depth) <= millions(model="dense-untied") < millions(n_layers=depth + 1)


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_every_parameter_starts_as_the_table_of_initialise_says(generator, paper):
    """L = 3, D = 64, d_seed = 48; 8 modes of width 8."""
    shape = dict(vocab_size=500, seq_len=16, d_model=64)
    model = LanguageModel(Config(**shape, n_layers=3, d_seed=48, mode_width=8, generator=generator, paper=paper))
    wide, scale = 0.02 / 6**0.5, 1 if generator == "lev" else 0.5**0.5
    expected = {"codebooks": 0.02, "seed_proj": 48**-0.5, "splines": 0.1, "mode_proj": 0.02 * scale / 8, "lm_head": 0.02,
                "residual_proj": 0.02 * scale / (0.21 * 48**0.5), **dict.fromkeys(("o_proj", "down_proj"), wide),
                **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0.02)}
    if paper:
        expected |= {"mode_proj": 64**-0.5, "residual_proj": 48**-0.5}
    for name, p in model.named_parameters():
        leaf = name.removesuffix(".weight").split(".")[-1]
        if "norm" in leaf:
            assert (p == (0 if leaf.endswith("bias") else 1)).all(), name
        else:
            assert p.std().item() == pytest.approx(expected[leaf], rel=0.06), name
            assert p.mean().item() == pytest.approx(float(leaf == "splines"), abs=4 * expected[leaf] / p.numel() ** 0.5), name
    table = LanguageModel(Config(**shape, n_layers=1, model="dense-untied")).embed_tokens.weight
    assert table.std().item() == pytest.approx(0.02, rel=0.06)


def test_a_models_settings_reach_its_generator():
    settings = dict(generator="v1", n_coords=2, base=11, d_seed=10, n_knots=5, n_modes=4, mode_width=3, paper=True)
    addresses = torch.arange(97).flip(0)
    model = LanguageModel(Config(**TINY | settings), addresses=addresses)
    found = vars(model.embed_tokens.config)
    assert {name: found[name] for name in settings} == settings and torch.equal(model.embed_tokens.addresses, addresses)
    assert not {"cos", "sin"} & model.state_dict().keys()       # computed, not kept
    assert len(model.embed_tokens.seed_proj) == 1 and len(TokenGenerator(97, 32, "lev", n_modes=4).seed_proj) == 4      # P
    same_seed = TokenGenerator(97, 32, "v1", n_coords=2, base=11, d_seed=10, n_knots=5, n_modes=4, mode_width=3, paper=True, seed=0)
    assert torch.equal(same_seed.splines, model.embed_tokens.splines)       # inside a model or alone, from the same stream


def test_a_context_has_an_end():
    with pytest.raises(InputError, match="^17 tokens exceed the model's seq_len of 16$"):
        LanguageModel(Config(**TINY))(torch.zeros(1, 17, dtype=torch.long))


def test_parts_add_up_and_a_tied_table_counts_once():
    """TINY: V = 97, D = 32, L = 2; 16 D² in a block and two norms, one more at the end."""
    blocks, table = 2 * (16 * 32**2 + 2 * 32) + 32, 97 * 32
    ours, tied, untied = (LanguageModel(Config(**TINY, model=name)) for name in ("leviathan", "dense", "dense-untied"))
    generator = sum(p.numel() for p in ours.embed_tokens.parameters())
    assert ours.parameters_by_part() == {"generator": generator, "blocks": blocks, "head": table}
    assert tied.parameters_by_part() == {"table": 0, "blocks": blocks, "head": table}
    assert untied.parameters_by_part() == {"table": table, "blocks": blocks, "head": table}
    for model in (ours, tied, untied):
        assert model.n_parameters() == sum(p.numel() for p in model.parameters())
    assert isoparametric_depth(ours.config) == 2            # a table so small leaves no room: never fewer layers


def test_flops_leave_the_generator_out():
    """6 per parameter of blocks and head, 12 L D T for attention: the same for Leviathan and its twins."""
    flops = {LanguageModel(Config(**TINY | twin)).flops_per_token() for twin in TWINS}
    assert flops == {6 * (2 * (16 * 32**2 + 2 * 32) + 32 + 97 * 32) + 12 * 2 * 32 * 16}


# ---- the model and its twins -----------------------------------------------------------------------------------------

def test_twins_start_equal():
    """Bit by bit: blocks of all, and heads. (A tied head is a table too, and starts at the same 0.02.)"""
    first, *others = (LanguageModel(Config(**TINY | twin), seed=5).state_dict() for twin in TWINS)
    for other in others:
        for name in first:
            if name.startswith(("layers", "norm", "lm_head")):
                assert torch.equal(first[name], other[name]), name
    assert not torch.equal(first["lm_head.weight"], LanguageModel(Config(**TINY), seed=6).state_dict()["lm_head.weight"])


def slow_decoder(model, x):
    """Llama written out for one sequence: head by head, positions as complex numbers. (T, D) -> (T, D)"""
    rms = lambda x, norm: norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()          # noqa: E731
    T, D, H = *x.shape, model.config.n_heads
    d = D // H
    turns = torch.exp(1j * torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(0, d, 2) / d)))     # (T, d / 2)
    for layer in model.layers:
        h, attention = rms(x, layer.input_layernorm), []
        for head in range(H):
            own = slice(head * d, (head + 1) * d)
            q, k, v = (h @ getattr(layer.self_attn, name).weight[own].T for name in ("q_proj", "k_proj", "v_proj"))
            q, k = (torch.complex(z[:, :d // 2], z[:, d // 2:]) * turns for z in (q, k))
            scores = (q @ k.conj().T).real / d**0.5
            attention.append(scores.masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(attention, dim=-1) @ layer.self_attn.o_proj.weight.T
        h = rms(x, layer.post_attention_layernorm)
        gate, up = h @ layer.mlp.gate_proj.weight.T, h @ layer.mlp.up_proj.weight.T
        x = x + (gate * gate.sigmoid() * up) @ layer.mlp.down_proj.weight.T
    return rms(x, model.norm)


def test_decoder_equals_llama_written_out():
    model = LanguageModel(Config(**TINY)).double()
    x = 0.003 * torch.randn(3, 16, 32, dtype=torch.float64)          # small, so that the 1e-6 in the norms tells
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(torch.rand_like(p) + 0.5 if "norm" in name else 5)
        expected = torch.stack([slow_decoder(model, sequence) for sequence in x])
        torch.testing.assert_close(model.hidden(x), expected, rtol=1e-6, atol=1e-6)      # cosines and sines are float32


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_causality(twin):
    """Logits do not depend on what comes later, and do on what came before. (How many ids there are may change the rounding.)"""
    model = LanguageModel(Config(**TINY | twin)).double()
    ids = torch.randint(97, (2, 16))
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % 97
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-12)
    assert not torch.allclose(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_overfits_one_batch(twin):
    torch.manual_seed(0)
    model = LanguageModel(Config(**TINY | twin))
    ids = torch.randint(97, (4, 17))
    optimizer = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-2)
    for _ in range(150):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_splines_and_codebooks_do_not_decay():
    """A spline is neutral at 1: weight decay would send the product of d_seed of them to 0."""
    model = LanguageModel(Config(**TINY))
    names = {p: name for name, p in model.named_parameters()}
    decayed, free = ({names[p] for p in group["params"]} for group in model.decay_groups(0.1))
    assert len(decayed) + len(free) == len(names)
    assert {name for name in free if "norm" not in name} == {"embed_tokens.codebooks", "embed_tokens.splines"}
    assert not any("norm" in name for name in decayed)
    assert [group["weight_decay"] for group in model.decay_groups(0.1)] == [0.1, 0]
    against_advice = {names[p] for p in model.decay_groups(0.1, decay_splines=True)[0]["params"]}
    assert against_advice == decayed | {"embed_tokens.codebooks", "embed_tokens.splines"}


# ---- the loss --------------------------------------------------------------------------------------------------------

def loss_and_gradients(loss_function, hidden, weight, targets):
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_function(*leaves, targets)
    (3 * loss).backward()       # times 3: the gradient that arrives from above counts
    return loss.detach(), *(leaf.grad for leaf in leaves)


def naive_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).flatten(0, -2).float(), targets.flatten())


def example(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(3, 7, 16, dtype=dtype), torch.randn(211, 16, dtype=dtype), torch.randint(211, (3, 7))


@pytest.mark.parametrize("rows", [1, 4, 1_000])
def test_chunked_loss_equals_the_naive_one(rows, monkeypatch):
    monkeypatch.setattr(LinearCrossEntropy, "LOGITS_PER_CHUNK", {"cpu": 211 * rows})
    for ours, naive in zip(loss_and_gradients(linear_cross_entropy, *example()), loss_and_gradients(naive_loss, *example())):
        torch.testing.assert_close(ours, naive)


def test_chunked_loss_under_bfloat16_autocast(monkeypatch):
    """Its own error against float64 is no larger than that of the naive loss under autocast, and the loss is float32."""
    monkeypatch.setattr(LinearCrossEntropy, "LOGITS_PER_CHUNK", {"cpu": 211 * 4})
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, *example())
        naive = loss_and_gradients(naive_loss, *example())
    exact = loss_and_gradients(lambda h, w, t: F.cross_entropy((h @ w.T).flatten(0, -2), t.flatten()), *example(torch.float64))
    assert ours[0].dtype == torch.float32
    for a, b, c in zip(ours, naive, exact):
        assert (a - c).norm() <= 1.1 * (b - c).norm()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has its own from 2.13 on")
def test_chunked_loss_equals_torchs_own():
    torchs = lambda h, w, t: F.linear_cross_entropy(h.flatten(0, -2), w, t.flatten())     # noqa: E731
    for ours, theirs in zip(loss_and_gradients(linear_cross_entropy, *example()), loss_and_gradients(torchs, *example())):
        torch.testing.assert_close(ours, theirs)


# ---- training --------------------------------------------------------------------------------------------------------

def train(folder, *flags, ranks=1, tiny_data):
    """Run train.py in a process of its own, as a user does. -> (the log's lines, the final weights)"""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
                                      "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]     # needs no name of this host
    command = [sys.executable, *launcher, str(HERE / "train.py"), "--data", str(tiny_data), "--out", str(folder), "--device", "cpu",
               *"--seq-len 32 --d-model 32 --n-layers 2 --n-heads 2 --d-seed 16 --mode-width 2 --steps 6 --tokens-per-step 256 "
               "--save-every 2 --eval-every 3 --eval-tokens 512 --keep 9".split(), *flags]
    gloo = dict(GLOO_SOCKET_IFNAME="lo") if sys.platform == "linux" else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | gloo)
    assert done.returncode == 0, done.stdout + done.stderr
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, torch.load(sorted(folder.glob("step-*"))[-1] / "model.pt", weights_only=True)


def test_resume_equals_not_stopping(tmp_path, tiny_data):
    """The run is cut after step 4, with step 2 as its newest checkpoint: what follows is the same, bit by bit."""
    log, weights = train(tmp_path / "a", tiny_data=tiny_data)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/step-00000004")
    shutil.rmtree(tmp_path / "b/step-00000006")
    (tmp_path / "b/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log[:4]))
    log_again, weights_again = train(tmp_path / "b", "--resume", tiny_data=tiny_data)
    curve = lambda log: [(line["step"], line["loss"], line.get("val_loss")) for line in log]      # noqa: E731
    assert curve(log) == curve(log_again) and len(log) == 6
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert (tmp_path / "b/curves.png").stat().st_size > 10_000


def loopback_works() -> bool:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not loopback_works(), reason="ranks talk over 127.0.0.1, which is not reachable here")
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float64", 1e-10)])
def test_any_layout_is_the_same_run(tmp_path, tiny_data, dtype, tolerance):
    """Tokens per step and their order are fixed: 20 steps of 8 windows at once, on 2 ranks (gloo) by 3 and 1, or on 4 by 1."""
    one, weights = train(tmp_path / "1", "--dtype", dtype, "--steps", "20", tiny_data=tiny_data)
    for ranks, micro_batch in ((2, 3), (4, 1)):
        flags = "--dtype", dtype, "--steps", "20", "--micro-batch", f"{micro_batch}"
        log, others = train(tmp_path / f"{ranks}", *flags, ranks=ranks, tiny_data=tiny_data)
        assert len(log) == 20 and weights.keys() == others.keys()              # no "module." before a name
        for a, b in zip(one, log):
            clock = {"tokens_per_second"}
            assert {k: b[k] for k in b.keys() - clock} == pytest.approx({k: a[k] for k in a.keys() - clock}, rel=tolerance)


def test_every_preset_is_a_model():
    with torch.device("meta"):
        for name in PRESETS:
            LanguageModel(Config.from_preset(name))
