"""The tests that are also the worked examples: read them in order beside leviathan.py.

    python -m pytest test_leviathan.py      # these; without an argument, the technical ones in tests/ too
"""
import pytest
import torch
import torch.nn.functional as F

import leviathan
from leviathan import GENERATORS, Config, LanguageModel, TokenGenerator, digits, linear_cross_entropy
from train import PRESETS, preset

TINY = dict(vocab_size=97, seq_len=16, d_model=32, n_layers=2, n_heads=2, d_seed=12, mode_width=2)
TWINS = [dict(generator="v1"), dict(generator="lev"), dict(model="dense"), dict(model="dense-untied")]


# ---- the method, step by step ------------------------------------------------------------------------

def test_digits_by_hand():
    """<|endoftext|> of o200k_base is 199,999 = 57 * 59² + 26 * 59 + 48."""
    assert leviathan.smallest_base(200_019, 3) == 59
    assert digits(torch.tensor([199_999, 0, 59]), 59, 3).tolist() == [[57, 26, 48], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("power", [2**3, 58**3, 59**3, 99**3, 1000**3])
def test_base_is_exact_at_powers(power):
    """In floating point, ceil(V ** (1/k)) is one too large for many of these."""
    root = round(power ** (1 / 3))
    assert [leviathan.smallest_base(power + i, 3) for i in (-1, 0, 1)] == [root, root, root + 1]


def test_spline_by_hand():
    """Five knots, 1/4 apart. At a knot B = 3/4 there and 1/8 beside it; half-way to the next, 1/2 and 1/2."""
    at = lambda x: leviathan.spline_basis(torch.tensor(x), n_knots=5)      # noqa: E731
    torch.testing.assert_close(at(0.5), torch.tensor([0, 1 / 8, 3 / 4, 1 / 8, 0]))
    torch.testing.assert_close(at(0.0), torch.tensor([6 / 7, 1 / 7, 0, 0, 0]))         # (3/4, 1/8) / (7/8)
    torch.testing.assert_close(at(1.0), torch.tensor([0, 0, 0, 1 / 7, 6 / 7]))
    torch.testing.assert_close(at(1 / 8), torch.tensor([0.5, 0.5, 0, 0, 0]))


@pytest.mark.parametrize("n_knots", [3, 16, 32])
def test_splines_sum_to_one_and_three_at_most_are_not_zero(n_knots):
    basis = leviathan.spline_basis(torch.linspace(0, 1, 10_001, dtype=torch.float64), n_knots)
    torch.testing.assert_close(basis.sum(-1), torch.ones(10_001, dtype=torch.float64))
    assert (basis >= 0).all() and (basis > 0).sum(-1).max() == 3


@pytest.mark.parametrize("n", [1, 2, 3, 7, 128])
def test_product_tree_is_a_product(n):
    x = torch.randn(n, 4, dtype=torch.float64)
    torch.testing.assert_close(leviathan.product_tree(x), x.prod(0))


def slow_generator(g: TokenGenerator, ids):
    """The method as the paper writes it, one token and one mode at a time. The generator must equal this."""
    lev, embeddings = isinstance(g, leviathan.LevGenerator), []
    d, M, r = g.d_seed, g.n_modes, g.mode_width
    centre = 1 if g.centred else 0
    for address in g.addresses[ids].tolist():
        i = [address // g.base**j % g.base for j in reversed(range(g.n_coords))]
        z = sum(g.codebooks[j, i[j]] for j in range(g.n_coords))
        e = 0
        for m in range(M):
            own = slice(m * d, (m + 1) * d) if lev else slice(None)             # v1: one point for all modes
            W, scale, shift = g.seed_proj.weight[own], g.seed_norm.weight[own], g.seed_norm.bias[own]
            normed = F.layer_norm(W @ z, (d,), scale, shift)
            x = torch.sigmoid(normed / 2 if lev else normed)                                        # ẑ
            t = (x[:, None] - torch.linspace(0, 1, g.n_knots, dtype=x.dtype)).abs() * (g.n_knots - 1)
            B = torch.where(t < 0.5, 0.75 - t**2, torch.where(t < 1.5, (1.5 - t)**2 / 2, 0))
            B = B / B.sum(1, keepdim=True)                                                          # (d, κ)
            S = 1 + (g.modes[m].splines if lev else g.modes.splines[:, :, m * r:(m + 1) * r])    # (d, κ, r)
            mode = torch.einsum("dn,dnc->dc", B, S).prod(0)
            e = e + g.mode_proj.weight[:, m * r:(m + 1) * r] @ (mode - centre)
        if not lev:
            e = e + g.residual_proj.weight @ (x - centre / 2)
        embeddings.append(e)
    return torch.stack(embeddings)


def tiny_generator(generator="v1", **overrides):
    settings = dict(d_seed=12, mode_width=3, n_modes=2, seed=3) | overrides
    g = GENERATORS[generator](vocab_size=97, d_model=7, **settings).double()
    g.addresses.copy_(torch.randperm(97, generator=torch.Generator().manual_seed(0)))   # need not be the ids
    return g


def gradients(e, g, weights):
    return torch.autograd.grad((e * weights).sum(), list(g.parameters()))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("generator", ["v1", "lev"])
@pytest.mark.parametrize("n_coords", [1, 2, 3])
def test_slow_version_rows_and_forward_are_one(generator, centred, n_coords, monkeypatch):
    """Values and gradients; `forward` with repeated ids of any shape, in chunks of 32 that are recomputed."""
    g = tiny_generator(generator, centred=centred, n_coords=n_coords)
    monkeypatch.setattr(type(g), "CPU", 1)
    ids = torch.randint(97, (4, 25), generator=torch.Generator().manual_seed(1))
    assert len(ids.unique()) > 32
    weights = torch.randn(4, 25, 7, dtype=torch.float64)
    slow, rows = slow_generator(g, ids.flatten()).view(4, 25, 7), g.rows(ids.flatten()).view(4, 25, 7)
    for e in (rows, g(ids)):
        torch.testing.assert_close(e, slow, rtol=1e-12, atol=1e-12)
        for (name, _), ours, theirs in zip(g.named_parameters(), gradients(e, g, weights), gradients(
                slow_generator(g, ids.flatten()).view(4, 25, 7), g, weights)):
            torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_gradcheck(generator):
    """Against finite differences."""
    g = tiny_generator(generator, d_seed=3, mode_width=1, n_knots=4)
    names, ids = [name for name, _ in g.named_parameters()], torch.tensor([3, 50, 96, 3])
    call = lambda *ps: torch.func.functional_call(g, dict(zip(names, ps)), ids)      # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(g.parameters()))


def test_a_factor_of_exactly_zero_has_the_right_gradient():
    """φ = 0 in one dimension makes the mode 0, yet S there must learn: from the product of the others."""
    g = tiny_generator()
    with torch.no_grad():
        g.modes.splines[4, :, 0] = -1                                           # S = 0
    ours, slow = (torch.autograd.grad(e.sum(), g.modes.splines)[0]
                  for e in (g(torch.tensor([7])), slow_generator(g, torch.tensor([7]))))
    torch.testing.assert_close(ours, slow)
    assert ours[4, :, 0].abs().max() > 0


def test_stands_in_for_an_embedding():
    """Any shape and integer type. Ids beyond the vocabulary, and what is no integer, are refused."""
    g = TokenGenerator(97, 8, d_seed=12, mode_width=2)
    for ids in (torch.tensor(3), torch.tensor([[1, 2]]).int(), torch.zeros(0, dtype=torch.uint8)):
        assert g(ids).shape == (*ids.shape, 8)
    for bad in (97, -1):
        with pytest.raises(IndexError):
            g(torch.tensor([bad]))
    for dtype in (torch.bfloat16, torch.float64, torch.bool):
        with pytest.raises(TypeError, match="must be integers"):
            g(torch.tensor([1], dtype=dtype))


def test_a_seed_stands_in_for_digits():
    """From seeds on, no id is needed: so a token with a seed of its own can be added after training."""
    g = tiny_generator("lev")
    ids = torch.tensor([3, 50, 96])
    torch.testing.assert_close(g.surface(g.coordinates(g.seeds(ids))), g(ids))


@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_tokens_start_apart_and_at_a_tables_scale(generator):
    """Mean cosine between the embeddings of different tokens at the start: the literal reading, and ours."""
    ids = torch.arange(0, 200_019, 1_001)

    def start(centred):
        e = GENERATORS[generator](200_019, 256, mode_width=8, centred=centred)(ids).detach()
        cosine = F.normalize(e, dim=-1) @ F.normalize(e, dim=-1).T
        return cosine[~torch.eye(len(ids), dtype=torch.bool)].mean().item(), e.std().item()

    literal, ours = start(centred=False), start(centred=True)
    assert literal[0] > 0.5 and literal[1] > 1
    assert ours[0] < 0.3 and 0.015 < ours[1] < 0.025


# ---- sizes -------------------------------------------------------------------------------------------

def test_lev_has_the_papers_number_of_parameters():
    """22,656 codebooks + 131,072 W_seed + 2,048 LayerNorm + 1,048,576 S + 1,048,576 W_out, "2.25M" [P]."""
    with torch.device("meta"):
        g = GENERATORS["lev"](200_376, 2048)
    assert g.codebooks.numel() == 177 * 128 == 22_656
    assert sum(p.numel() for p in g.parameters()) == 2_252_928


@pytest.mark.parametrize("name, tied, untied, deep, depth", [
    ("60m", 57.6, 108.9, 108.5, 52), ("270m", None, 421.0, 421, 28), ("410m", 406.5, None, None, None)])
def test_sizes_and_isoparametric_depths_are_the_papers(name, tied, untied, deep, depth):
    """In millions, as the paper labels them: 6 -> 52 layers at D=256, 12 -> 28 at D=768 [52, 28: P].

    Depths and dense sizes are exact; Leviathan's come to within 0.5 M, its generator being reconstructed [R].
    """
    def millions(**overrides):
        with torch.device("meta"):
            model = LanguageModel(preset(name, vocab_size=200_376, **overrides))
        return sum(model.parameters_by_part().values()) / 1e6

    if tied:
        assert round(millions(model="dense"), 1) == tied
    if depth:
        assert leviathan.isoparametric_depth(preset(name, vocab_size=200_376)) == depth
        assert millions(n_layers=depth) == pytest.approx(deep, abs=0.5)
        assert round(millions(model="dense-untied"), 1) == untied
        assert millions(n_layers=depth) <= millions(model="dense-untied") < millions(n_layers=depth + 1)


def test_parts_add_up_and_a_tied_table_counts_once():
    """TINY: V = 97, D = 32, L = 2; 16 D² in a block and two norms, one more at the end."""
    blocks, table = 2 * (16 * 32**2 + 2 * 32) + 32, 97 * 32
    for twin, embedding in ((dict(model="dense"), 0), (dict(model="dense-untied"), table), (dict(), None)):
        model = LanguageModel(Config(**TINY | twin))
        if embedding is None:
            embedding = sum(p.numel() for p in model.embed_tokens.parameters())
        assert model.parameters_by_part() == {"embedding": embedding, "blocks": blocks, "head": table}
        assert sum(model.parameters_by_part().values()) == sum(p.numel() for p in model.parameters())
    assert leviathan.isoparametric_depth(model.config) == 2     # so small a table leaves no room: never fewer


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("generator", ["v1", "lev"])
def test_every_parameter_starts_as_the_table_of_initialise_says(generator, centred):
    """L = 3, D = 64, d_seed = 48; 8 modes of width 8."""
    model = LanguageModel(Config(vocab_size=500, seq_len=16, d_model=64, n_layers=3, d_seed=48, mode_width=8,
                                 generator=generator, centred=centred))
    deep, scale = 0.02 / 6**0.5, 0.02 if generator == "lev" else 0.02 * 0.5**0.5
    expected = {"o_proj": deep, "down_proj": deep, "codebooks": 1, "seed_proj": 1, "splines": 0.1,
                "mode_proj": scale / 8, "residual_proj": scale / (0.21 * 48**0.5)}
    if not centred:
        expected |= {"mode_proj": 64**-0.5, "residual_proj": 48**-0.5}
    for name, p in model.named_parameters():
        leaf = name.removesuffix(".weight").split(".")[-1]
        if "norm" in name:
            assert (p == (0 if leaf == "bias" else 1)).all(), name
        else:
            std = expected.get(leaf, 0.02)
            assert p.std().item() == pytest.approx(std, rel=0.08), name
            assert p.mean().item() == pytest.approx(0, abs=4 * std / p.numel() ** 0.5), name


# ---- the model and its twins -------------------------------------------------------------------------

def test_twins_start_equal():
    """Bit by bit: blocks and heads of all. (A tied head is a table too, and starts at the same 0.02.)"""
    first, *others = (LanguageModel(Config(**TINY | twin), seed=5).state_dict() for twin in TWINS)
    shared = [name for name in first if name.startswith(("layers", "norm", "lm_head"))]
    assert all(torch.equal(first[name], other[name]) for other in others for name in shared)
    model = LanguageModel(Config(**TINY), seed=6)
    assert not torch.equal(first["lm_head.weight"], model.lm_head.weight)
    leviathan.initialise(model, seed=5)
    assert all(torch.equal(first[name], p) for name, p in model.state_dict().items())


def slow_decoder(model, x):
    """Llama written out for one sequence: head by head, positions as complex numbers. (T, D) -> (T, D)"""
    rms = lambda x, norm: norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()    # noqa: E731
    T, D, H = *x.shape, model.config.n_heads
    d = D // H
    turns = torch.exp(1j * torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(0, d, 2) / d)))
    for layer in model.layers:
        h, attention = rms(x, layer.input_layernorm), []
        for head in range(H):
            own = slice(head * d, (head + 1) * d)
            q, k, v = (h @ layer.self_attn[name].weight[own].T for name in ("q_proj", "k_proj", "v_proj"))
            q, k = (torch.complex(y[:, :d // 2], y[:, d // 2:]) * turns for y in (q, k))
            scores = (q @ k.conj().T).real / d**0.5
            attention.append(scores.masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(attention, dim=-1) @ layer.self_attn["o_proj"].weight.T
        h = rms(x, layer.post_attention_layernorm)
        gate, up = h @ layer.mlp["gate_proj"].weight.T, h @ layer.mlp["up_proj"].weight.T
        x = x + (gate * gate.sigmoid() * up) @ layer.mlp["down_proj"].weight.T
    return rms(x, model.norm)


def test_decoder_equals_llama_written_out():
    model = LanguageModel(Config(**TINY)).double()
    x = 0.003 * torch.randn(3, 16, 32, dtype=torch.float64)         # small, so that the norms' 1e-6 tells
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(torch.rand_like(p) + 0.5 if "norm" in name else 5)
        expected = torch.stack([slow_decoder(model, sequence) for sequence in x])
        torch.testing.assert_close(model.hidden(x), expected, rtol=1e-6, atol=1e-6)     # angles are float32


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_causality(twin):
    """Logits do not depend on what comes later, and do on what came before."""
    model = LanguageModel(Config(**TINY | twin)).double()
    ids = torch.randint(97, (2, 16))
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % 97
    a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-12)
    assert not torch.allclose(a[:, 9:], b[:, 9:])
    with pytest.raises(ValueError, match="^17 tokens exceed the model's seq_len of 16$"):
        model(torch.zeros(1, 17, dtype=torch.long))


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


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_materialized_it_is_its_dense_twin(twin):
    model = LanguageModel(Config(**TINY | twin)).double()
    ids = torch.randint(97, (2, 16))
    before = model(ids)
    torch.testing.assert_close(model.materialize()(ids), before, rtol=0, atol=1e-12)
    assert type(model.embed_tokens) is torch.nn.Embedding and model.config.model.startswith("dense")
    assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(ids, ids).backward()


def test_matrices_decay_and_splines_and_codebooks_do_not():
    for generator in ("v1", "lev"):
        model = LanguageModel(Config(**TINY, generator=generator))
        names = {p: name for name, p in model.named_parameters()}
        decayed, free = ({names[p] for p in group["params"]} for group in model.decay_groups(0.1))
        assert len(decayed) + len(free) == len(names) and not any("norm" in name for name in decayed)
        assert {name.split(".")[-1] for name in free if "norm" not in name} == {"codebooks", "splines"}
        assert [group["weight_decay"] for group in model.decay_groups(0.1)] == [0.1, 0]


def test_every_preset_is_a_model():
    with torch.device("meta"):
        for name in PRESETS:
            LanguageModel(preset(name))


# ---- the loss ----------------------------------------------------------------------------------------

def loss_and_gradients(loss_function, hidden, weight, targets):
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_function(*leaves, targets)
    (3 * loss).backward()       # times 3: the gradient that arrives from above counts
    return loss.detach(), *(leaf.grad for leaf in leaves)


def naive_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).flatten(0, -2).float(), targets.flatten())


def exact_loss(hidden, weight, targets):
    return F.cross_entropy((hidden.double() @ weight.double().T).flatten(0, -2), targets.flatten())


def example(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(3, 7, 16, dtype=dtype), torch.randn(211, 16, dtype=dtype), torch.randint(211, (3, 7))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [1, 4, 1_000])
def test_chunked_loss_equals_the_naive_one(rows, dtype, tolerance, monkeypatch):
    monkeypatch.setitem(leviathan.LOGITS_AT_ONCE, "cpu", rows * dtype.itemsize)
    ours, exact = (loss_and_gradients(f, *example(dtype)) for f in (linear_cross_entropy, exact_loss))
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b.to(dtype), rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert linear_cross_entropy(*example(dtype)) == ours[0]


def test_chunked_loss_under_bfloat16_autocast(monkeypatch):
    """It errs no more than the naive loss under autocast does, and is float32."""
    monkeypatch.setitem(leviathan.LOGITS_AT_ONCE, "cpu", 4 * 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours, naive = (loss_and_gradients(f, *example()) for f in (linear_cross_entropy, naive_loss))
    assert ours[0].dtype == torch.float32
    for a, b, c in zip(ours, naive, loss_and_gradients(exact_loss, *example(torch.float64))):
        assert (a - c).norm() <= 1.1 * (b - c).norm()
