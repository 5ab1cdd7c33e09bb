"""The generator and the model as modules of other people's code: types, copies, devices, hooks, adapters."""
import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import leviathan
from leviathan import (
    Config,
    LanguageModel,
    LevGenerator,
    Modes,
    TokenGenerator,
    initialise,
    linear_cross_entropy,
)
from test_leviathan import TWINS

GENERATORS = dict(v1=TokenGenerator, lev=LevGenerator)      # not the lab's
SIZES = dict(d_seed=12, n_modes=4, mode_width=2)
TINY = dict(vocab_size=97, seq_len=16, d_model=32, n_layers=1, n_heads=2, **SIZES)
IDS = torch.tensor([[5, 96, 5, 0], [17, 5, 96, 44]])


@pytest.fixture(params=GENERATORS)
def embed(request):
    return GENERATORS[request.param](97, 7, **SIZES)


@pytest.fixture
def chunks(monkeypatch):
    """More than one chunk of ids, the later ones of which backward computes again."""
    for generator in GENERATORS.values():
        monkeypatch.setattr(generator, "CPU", 0)
    return torch.randperm(97)


# ---- it stands where nn.Embedding does -----------------------------------------------------------------

@pytest.mark.parametrize("width", [1, 7, 64, 129])
@pytest.mark.parametrize("generator", GENERATORS)
def test_any_width(generator, width):
    e = GENERATORS[generator](97, width, **SIZES)
    assert e(IDS).shape == (2, 4, width) and (e.num_embeddings, e.embedding_dim) == (97, width)
    torch.testing.assert_close(e(IDS), e.rows(IDS.flatten()).view(2, 4, width))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_and_any_shape(embed, dtype):
    assert torch.equal(embed(IDS.to(dtype)), embed(IDS))
    for shape in ((), (0,), (2, 0), (3, 1, 2)):
        assert embed(torch.ones(shape, dtype=dtype)).shape == (*shape, 7)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.bfloat16])
def test_other_types_are_refused(embed, dtype):
    """bfloat16 would take both 4001 and 4003 for 4000."""
    with pytest.raises(TypeError, match="must be integers"):
        embed(IDS.to(dtype))


@pytest.mark.parametrize("ids", [[97], [-1], [0, 500], [0, -97]])
def test_ids_beyond_the_vocabulary_are_refused(embed, ids):
    with pytest.raises(IndexError):
        embed(torch.tensor(ids))


@pytest.mark.parametrize("wrong", [
    dict(base=0), dict(base=4), dict(base=2**40), dict(n_knots=0), dict(n_knots=2), dict(d_seed=1),
    dict(n_modes=0), dict(mode_width=-1), dict(base=2, n_coords=63)], ids=str)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ValueError):
        TokenGenerator(97, 8, **wrong)


@pytest.mark.parametrize("wrong", [
    dict(d_model="256"), dict(vocab_size=None), dict(n_layers=True), dict(n_heads=0), dict(seq_len=2.0),
    dict(n_coords=63)], ids=str)
def test_a_shape_is_of_whole_numbers(wrong):
    with pytest.raises(ValueError, match=f"{min(wrong)} is .*: it must be a whole number"):
        Config(**wrong)


def test_the_table_is_all_rows(embed):
    table = embed.table()
    assert not table.requires_grad and torch.equal(table, embed(torch.arange(97)))


def test_chunks_are_of_32_ids_at_least(embed, chunks, monkeypatch):
    sizes = []
    monkeypatch.setattr(leviathan, "checkpoint",
                        lambda function, ids, use_reentrant: sizes.append(len(ids)) or function(ids))
    embed(chunks)
    assert sizes == [32, 32, 32, 1]


def test_one_chunk_is_functional(embed):
    """Values and gradients are those of the parameters that are given."""
    given = {name: (1.5 * p).detach().requires_grad_() for name, p in embed.named_parameters()}
    loss = torch.func.functional_call(embed, given, IDS).square().sum()
    ours = torch.autograd.grad(loss, [*given.values()])
    embed.load_state_dict(given, strict=False)
    for a, b in zip(ours, torch.autograd.grad(embed(IDS).square().sum(), [*embed.parameters()])):
        torch.testing.assert_close(a, b)


def test_alone_it_starts_as_in_a_model(embed):
    name = next(name for name, kind in GENERATORS.items() if type(embed) is kind)
    model = LanguageModel(Config(**TINY, generator=name), seed=6).embed_tokens
    alone = GENERATORS[name](97, 32, **SIZES, seed=6).state_dict()
    assert all(torch.equal(x, alone[name]) for name, x in model.state_dict().items())


def test_what_is_no_matrix_starts_as_it_was_built(monkeypatch):
    """In a generator of a user's own: a gain, a norm by another name, a scalar."""
    class Own(TokenGenerator):
        def __init__(self, *given, **settings):
            super().__init__(*given, **settings)
            self.gain, self.scale = (torch.nn.Parameter(torch.ones(n)) for n in (32, ()))
            self.ln = torch.nn.LayerNorm(32)
    monkeypatch.setitem(leviathan.GENERATORS, "v1", Own)
    embed = LanguageModel(Config(**TINY)).embed_tokens
    assert all((p == 1).all() for p in (embed.gain, embed.scale, embed.ln.weight))
    assert torch.equal(embed.codebooks, TokenGenerator(97, 32, **SIZES).codebooks)


# ---- copies, processes, devices, types -----------------------------------------------------------------

def call(module, ids):
    with torch.no_grad():
        return module(ids)


def test_pickled_copied_and_spawned():
    models = [LanguageModel(Config(**TINY | twin)) for twin in TWINS]
    for module in [*models, *(model.embed_tokens for model in models)]:
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(other(IDS), module(IDS))
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        for model in models:
            assert torch.equal(pool.apply(call, (model, IDS)), model(IDS))


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_built_on_meta_and_loaded(twin):
    """Whatever is not in the state dict is made when it is needed, not a buffer that would be empty."""
    model = LanguageModel(Config(**TINY | twin), seed=3)
    with torch.device("meta"):
        assigned, emptied = LanguageModel(model.config), LanguageModel(model.config)
    assigned.load_state_dict(model.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(model.state_dict())
    if model.config.model == "leviathan":
        begun = LanguageModel(model.config).to(torch.device("cpu"))
        begun.embed_tokens.addresses.fill_(-1)                      # as of memory that nobody has written
        initialise(begun, seed=3)
        assert torch.equal(begun(IDS), model(IDS))
    for other in (assigned, emptied):
        other.tie()
        assert torch.equal(other(IDS), model(IDS)) and torch.equal(other(IDS, IDS), model(IDS, IDS))
        assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_built_under_another_default_type(twin, dtype):
    """The same values as the float32 model, cast."""
    model = LanguageModel(Config(**TINY | twin)).to(dtype)
    expected = model(IDS)
    torch.set_default_dtype(dtype)
    try:
        other = LanguageModel(Config(**TINY | twin))
        found = other(IDS)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):                          # where nothing can be drawn
        initialise(other, seed=0)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())
    assert torch.equal(found, expected) and torch.equal(other(IDS), expected) and found.dtype == dtype


def test_cast_whole_to_bfloat16(embed):
    """Embeddings stay within a few percent, and splines, which are S - 1, move by small steps."""
    exact = embed.table()
    embed.bfloat16()
    error = (embed.table().float() - exact).norm() / exact.norm()
    assert embed(IDS).dtype == torch.bfloat16 and 0 < error < 0.03
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = kind(embed.parameters(), lr=1e-3)
        splines = [module.splines for module in embed.modules() if isinstance(module, Modes)]
        before = [p.clone() for p in splines]
        optimizer.zero_grad()
        (100 * embed(IDS)).square().sum().backward()
        optimizer.step()
        for p, was in zip(splines, before):
            assert (p != was)[p.grad != 0].float().mean() > 0.5


def test_positions_are_exact_in_bfloat16():
    """Which has no 257."""
    x = torch.ones(1, 1, 9, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(leviathan.rotate(x, 1_000), leviathan.rotate(x.float(), 1_000).bfloat16())


def test_autocast_leaves_the_generator_in_float32(embed, chunks):
    exact = torch.autograd.grad(embed(chunks).square().sum(), list(embed.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        e = embed(chunks)
    assert e.dtype == torch.float32 and torch.equal(e, embed(chunks))
    for a, b in zip(torch.autograd.grad(e.square().sum(), list(embed.parameters())), exact):
        assert torch.equal(a, b)


# ---- submodules are called, never read past ------------------------------------------------------------

class LoRA(nn.Module):
    """W x + B A dropout(x), in place of a linear layer that is frozen."""
    def __init__(self, linear, p=0.0):
        super().__init__()
        self.linear, self.dropout = linear.requires_grad_(False), nn.Dropout(p)
        self.a = nn.Parameter(torch.randn(2, linear.in_features))
        self.b = nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, x):
        return self.linear(x) + self.dropout(x) @ self.a.T @ self.b.T


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_hooks_of_all_submodules_fire(twin):
    model, fired = LanguageModel(Config(**TINY | twin)), set()
    names = {module: name for name, module in model.named_modules()
             if not isinstance(module, (nn.ModuleList, nn.ModuleDict))}
    for module in names:
        module.register_forward_hook(lambda module, *_: fired.add(names[module]))
    for targets in (None, IDS):
        fired.clear()
        model(IDS, targets)
        assert fired == {*names.values()}
    for kind in "register_full_backward_hook", "register_full_backward_pre_hook":
        model, fired = LanguageModel(Config(**TINY | twin)), set()
        getattr(model.lm_head, kind)(lambda *_: fired.add(kind))                # noqa: B023
        model(IDS, IDS).backward()
        assert fired == {kind}


@pytest.mark.parametrize("generator", GENERATORS)
def test_adapters_learn(generator):
    """LoRA in place of any linear layer, of generator, block or head, changes the loss and learns."""
    model = LanguageModel(Config(**TINY, generator=generator))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {"embed_tokens.mode_proj", "embed_tokens.seed_proj", "lm_head"} < {*linear}
    for name in linear:
        adapted = copy.deepcopy(model)
        adapted.set_submodule(name, LoRA(adapted.get_submodule(name)))
        loss = adapted(IDS, IDS)
        loss.backward()
        lora = adapted.get_submodule(name)
        assert lora.a.grad.abs().sum() > 0 and lora.b.grad.abs().sum() > 0, name
        assert not torch.equal(loss, model(IDS, IDS)), name
        torch.testing.assert_close(loss, F.cross_entropy(adapted(IDS).flatten(0, 1), IDS.flatten()))


def test_dropout_in_chunks_is_the_same_in_backward(embed, chunks, monkeypatch):
    """Chunks are computed again in backward: with the masks that they had."""
    embed.mode_proj, embed.seed_proj = LoRA(embed.mode_proj, 0.5), LoRA(embed.seed_proj, 0.5)

    def gradients():
        torch.manual_seed(0)
        loss = embed(chunks).square().sum()
        torch.rand(1)
        return loss, *torch.autograd.grad(loss, [p for p in embed.parameters() if p.requires_grad])
    again = gradients()
    monkeypatch.setattr(leviathan, "checkpoint", lambda function, ids, use_reentrant: function(ids))
    for a, b in zip(again, gradients()):
        torch.testing.assert_close(a, b)


# ---- the loss ------------------------------------------------------------------------------------------

class Doubled(nn.Linear):
    """As quantised layers are: a Linear with a forward of its own."""
    def forward(self, x):
        return super().forward(x) * 2


def patched(head):
    """As accelerate does it: another forward of the same object."""
    head.forward = lambda x, forward=head.forward: forward(x) * 2
    return head


@pytest.mark.parametrize("change", [
    lambda head: nn.Linear(32, 97), LoRA, parametrizations.weight_norm, patched,
    lambda head: prune.random_unstructured(head, "weight", 0.5), lambda head: Doubled(32, 97, bias=False)],
    ids=["bias", "LoRA", "norm", "patched", "pruned", "subclass"])
def test_any_head(change):
    """With a bias, an adapter, a computed weight: the loss is that of its logits, and all learn."""
    model = LanguageModel(Config(**TINY)).double()
    model.lm_head = change(model.lm_head).double()
    for p in model.lm_head.parameters():
        nn.init.normal_(p)
    loss, naive = model(IDS, IDS), F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    torch.testing.assert_close(loss, naive)
    learn = [p for p in model.lm_head.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, learn), torch.autograd.grad(naive, learn)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", [None, LoRA])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (6,), (3, 2), (2, 4), (2, 3, 1)])
def test_targets_of_a_wrong_size_are_refused(shape, head):
    """6 hidden rows and 1 target must not broadcast, nor (3, 2) stand for (2, 3)."""
    model, targets = LanguageModel(Config(**TINY)), torch.zeros(shape, dtype=torch.long)
    model.lm_head = head(model.lm_head) if head else model.lm_head
    with pytest.raises((ValueError, RuntimeError), match="target"):
        model(IDS[:, :3], targets)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(torch.randn(2, 3, 8), torch.randn(97, 8), targets)


def test_derivatives_that_would_be_wrong_are_refused():
    """The second one, and what would be scaled twice."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(97, 8, requires_grad=True)
    targets = torch.arange(6)
    with pytest.raises(RuntimeError, match="not with create_graph"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        loss.backward()
    with pytest.raises(RuntimeError):
        torch.func.grad(linear_cross_entropy)(hidden, weight, targets)


@pytest.mark.parametrize("frozen, training, products", [(False, True, 3), (True, True, 2), (False, False, 1)])
def test_products_are_of_what_learns(frozen, training, products):
    """An evaluation takes one, though the weight is a parameter then too."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(97, 8, requires_grad=not frozen)
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as count:
        with torch.autocast("cpu", torch.bfloat16):     # in float32 addmm_ is not counted
            linear_cross_entropy(hidden, weight, torch.arange(6))
    assert count.get_total_flops() == products * 2 * 6 * 97 * 8


def test_softmax_of_bfloat16_is_float32():
    logits = torch.randn(4, 5_000).bfloat16()
    expected = logits.float().logsumexp(1, keepdim=True)
    torch.testing.assert_close(leviathan.softmax_(logits), expected)


@pytest.mark.parametrize("target", [-100, -1, 97])
def test_targets_beyond_the_vocabulary_are_refused(target):
    with pytest.raises(RuntimeError):
        linear_cross_entropy(torch.randn(6, 8), torch.randn(97, 8), torch.tensor([0, 1, 2, 3, 4, target]))


def test_compiled_whole():
    """Traced with its backward; what a C++ compiler makes of that, tests of train.py see."""
    model = LanguageModel(Config(**TINY | dict(d_model=8, d_seed=4, n_modes=1)))
    losses = torch.compile(model, backend="aot_eager")(IDS, IDS), model(IDS, IDS)
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses)):
        torch.testing.assert_close(a, b)


# ---- what comes from a file ----------------------------------------------------------------------------

def test_the_newest_checkpoint(saved, tmp_path):
    for step in (2, 10):
        saved(Config(**TINY), tmp_path, step=step)
    (tmp_path / "step-00000011").touch()
    (tmp_path / "step-00000012-mine").mkdir()
    assert leviathan.newest_checkpoint(tmp_path) == tmp_path / "step-00000010"


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_loads(saved, tmp_path, twin):
    """A tied table is tied again, and it goes to the device."""
    model, other = saved(Config(**TINY | twin), tmp_path), leviathan.load(tmp_path)
    assert torch.equal(other(IDS), model(IDS)) and leviathan.load(tmp_path, "meta").lm_head.weight.is_meta
    assert len([*other.parameters()]) == len([*model.parameters()])


def test_a_device_without_room_is_no_damage(saved, tmp_path, monkeypatch):
    saved(Config(**TINY), tmp_path)
    monkeypatch.setattr(LanguageModel, "to", mock.Mock(side_effect=RuntimeError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="^CUDA out of memory"):
        leviathan.load(tmp_path)


def test_no_code_is_run_from_a_file(tmp_path):
    torch.save(dict(w=Config()), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt is missing or damaged"):
        leviathan.load_tensors(tmp_path / "model.pt")


@pytest.mark.parametrize("change", [lambda w: w["lm_head.weight"][0].fill_(torch.nan),
                                    lambda w: w.update(more=torch.ones(1))], ids=["nan", "more"])
def test_no_whole_model(saved, tmp_path, change):
    saved(Config(**TINY), tmp_path)
    change(weights := torch.load(path := tmp_path / "step-00000002/model.pt"))
    torch.save(weights, path)
    with pytest.raises(ValueError, match="step-00000002 holds no whole model"):
        leviathan.load(tmp_path)
