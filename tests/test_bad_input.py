"""Every bad input gives one clear line that names the mend, a non-zero exit, and leaves what was there as it was."""
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import sample
import shards
import train
from checkpoints import save_checkpoint
from common import InputError, read_json
from leviathan import Config, LanguageModel, TokenGenerator
from tokenizer import tokenizer_from_json, tokenizer_to_json, train_tokenizer

HERE = Path(__file__).parent.parent
SMALL = "--seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 --mode-width 1 --steps 2 --tokens-per-step 64".split()


@pytest.fixture
def data(tiny_data, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_data, tmp_path / "shards"))


def test_the_ends_of_what_is_allowed():
    Config(n_knots=3), Config(seq_len=2**20), Config(n_coords=62, base=2), Config(base=2**21 - 1), Config(n_layers=2**31 - 1)
    assert Config(d_model=2).n_heads == 1 and Config(d_model=192).n_heads == 3
    for fields in (dict(seq_len=2**20 + 1), dict(n_coords=63), dict(base=2**21), dict(n_layers=2**31), dict(n_layers=-1)):
        with pytest.raises(InputError):
            Config(**fields)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run a script's main() as if from the command line, in an empty folder."""
    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        script.main()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    return call


@pytest.fixture
def run_folder(call, data, tmp_path) -> Path:
    """A finished run of two steps."""
    call(train, "--data", data, "--out", tmp_path / "run", "--device", "cpu", *SMALL)
    return tmp_path / "run"


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with one checkpoint, of a model that was never trained, and no tokenizer."""
    model = LanguageModel(Config(vocab_size=300, seq_len=32, d_model=32, n_layers=1, n_heads=2, d_seed=8, mode_width=1))
    (tmp_path / "saved").mkdir()
    save_checkpoint(tmp_path / "saved", 2, model, torch.optim.AdamW(model.parameters()), dict(config=vars(model.config)),
                    {}, 1)
    return tmp_path / "saved"


@pytest.mark.parametrize("fields, message", [
    (dict(model="gpt"), "unknown model 'gpt': choose from leviathan, dense, dense-untied"),
    (dict(generator="v3"), "unknown generator 'v3': choose from v1, lev"),
    (dict(d_model=30, n_heads=4), "d_model 30 is not divisible by n_heads 4"),
    (dict(d_model=12, n_heads=4), "head_dim 3 .* is odd"),
    (dict(n_knots=2), "n_knots 2: a quadratic spline needs at least 3"),
    (dict(base=10), "base 10 with 3 digits has 1,000 addresses, too few for a vocabulary of 200,019"),
    (dict(n_layers=0), "n_layers is 0: it must be at least 1"), (dict(d_model=2**31), "d_model is 2,147,483,648: it must be below"),
    (dict(base=2**20, n_coords=4), "base 1048576 with 4 digits exceeds 64 bits: lower one"),
    (dict(n_coords=63), "n_coords is 63: 62 digits are the most"), (dict(d_model="256"), "d_model is '256': it must be int"),
    (dict(paper=1), "paper is 1: it must be bool"), (dict(base=2.0), "base is 2.0: it must be int or nothing"),
])
def test_config(fields, message):
    with pytest.raises(InputError, match=message):
        Config(**fields)


def test_preset():
    with pytest.raises(InputError, match="^unknown preset 'huge': choose from nano, micro, 60m, 270m, 410m, 1.2b$"):
        Config.from_preset("huge")


@pytest.mark.parametrize("addresses, message", [
    ([0, 1, 2, 1], "addresses collide: tokens 1 and 3 share 1"),
    ([0, 1, 2, 8], "addresses must lie in 0 ... 7"),
    ([0, 1, 2], "addresses must be 4 integers"),
    ([0.0, 1.0, 2.0, 3.0], "addresses must be 4 integers"),
])
def test_addresses(addresses, message):
    with pytest.raises(InputError, match=message):
        TokenGenerator(4, 8, d_seed=4, addresses=addresses)


def test_addresses_of_a_checkpoint_are_checked_too():
    g = TokenGenerator(4, 8, d_seed=4)
    with pytest.raises(InputError, match="collide"):
        g.load_state_dict(g.state_dict() | {"addresses": torch.tensor([0, 1, 1, 2])})


@pytest.mark.parametrize("arguments, message", [
    (["--preset", "huge"], "unknown preset 'huge': choose from nano, micro, 60m, 270m, 410m, 1.2b"),
    (["--data", "nowhere"], r"no prepared data in nowhere .*: run prepare_pile.py"),
    (["--resume"], "nothing to resume: there is no out/leviathan-nano"),
    (["--steps", "0"], "--steps is 0: it must be positive"),
    (["--device", "tpu"], "--device tpu: there is none here; choose from .*cpu"),
])
def test_train_flags(call, arguments, message):
    with pytest.raises(InputError, match=message):
        call(train, "--device", "cpu", *arguments)
    assert not os.listdir()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(call):
    with pytest.raises(InputError, match="--device cuda: there is none here; choose from .*cpu"):
        call(train, "--device", "cuda")


@pytest.mark.parametrize("arguments, message", [
    (["--vocab-size", "299"], "vocab_size is 299, but the tokenizer of .* has 300 ids"),
    (["--tokens-per-step", "100"], "--tokens-per-step 100: it must be a multiple of --seq-len"),
    (["--seq-len", "1000000", "--tokens-per-step", "1000000"], "shorter than one window of 1000001 tokens: lower --seq-len"),
    (["--dtype", "int8"], "--dtype int8: choose float32, bfloat16 or float64"),
    (["--model", "dense", "--isoparametric"], "--isoparametric deepens Leviathan"),
])
def test_train_settings_that_do_not_fit_the_data(call, data, arguments, message):
    with pytest.raises(InputError, match=message):
        call(train, "--data", data, "--out", "run", "--device", "cpu", *SMALL, *arguments)
    assert not Path("run").exists()


def damage_shard(folder: Path, how: str):
    path = next(folder.glob("train-*.bin"))
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "magic":
        content[0] ^= 1
    elif how == "truncated":
        content = content[:-4]
    elif how == "empty":
        content = content[:100]
    elif how == "id":
        content[shards.HEADER_BYTES:] = np.full(len(content) // 4 - 256, 300, dtype="<u4").tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("how, message", [
    ("missing", "train-00000.bin is missing, though meta.json lists it"),
    ("magic", r"train-00000.bin is not a token shard \(magic"),
    ("truncated", "train-00000.bin is truncated or of other data"),
    ("empty", "train-00000.bin is not a token shard"),
    ("id", "train-00000.bin holds the id 300, but the vocabulary has 300"),
])
def test_damaged_shards(call, data, how, message):
    damage_shard(data, how)
    with pytest.raises(InputError, match=message):
        call(train, "--data", data, "--out", "run", "--device", "cpu", *SMALL)


@pytest.mark.parametrize("change, message", [
    (lambda meta: meta["tokenizer"]["tokens"].pop(), "the tokenizer tiny does not match"),
    (lambda meta: meta["tokenizer"].update(vocab_size="300"), "meta.json lacks a field or has one of the wrong kind"),
    (lambda meta: meta.pop("train"), "meta.json lacks a field"),
])
def test_damaged_meta(call, data, change, message):
    meta = json.loads((data / "meta.json").read_text())
    change(meta)
    (data / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=message):
        call(train, "--data", data, "--out", "run", "--device", "cpu", *SMALL)


def test_a_run_is_never_overwritten(call, data, run_folder):
    before = (run_folder / "log.jsonl").read_text()
    with pytest.raises(InputError, match="run is not empty: go on with --resume, or name another folder with --out"):
        call(train, "--data", data, "--out", run_folder, "--device", "cpu", *SMALL)
    assert (run_folder / "log.jsonl").read_text() == before


@pytest.mark.parametrize("flag, value", [("--steps", 3), ("--d-model", 64), ("--seed", 1), ("--learning-rate", 1e-5),
                                         ("--model", "dense")])
def test_resume_refuses_another_schedule_or_model(call, data, run_folder, flag, value):
    with pytest.raises(InputError, match=f"{flag} is {value}, but the run in .* has"):
        call(train, "--data", data, "--out", run_folder, "--device", "cpu", "--resume", flag, value)


def test_resume_refuses_other_data(call, data, run_folder, tmp_path):
    meta = json.loads((data / "meta.json").read_text())
    meta["val"]["tokens"] += 1
    (data / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="is not the data that the run in .* was trained on"):
        call(train, "--data", data, "--out", run_folder, "--device", "cpu", "--resume")


def weights(folder: Path) -> dict:
    return torch.load(folder / "model.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flip_in_the_largest_tensor(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        place = content.index(archive.read(max(archive.infolist(), key=lambda part: part.file_size)))
    return content[:place + 9] + bytes([content[place + 9] ^ 1]) + content[place + 10:]


DAMAGE = {"cut short": lambda content: content[:200], "empty": lambda content: b"", "one bit": flip_in_the_largest_tensor}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["model.pt", "optimizer.pt", "config.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(call, data, run_folder, capsys, file, how):
    """What comes out is the same; what was damaged is still there, under another name."""
    path, expected = run_folder / "step-00000002" / file, weights(run_folder / "step-00000002")
    path.write_bytes(DAMAGE[how if file != "config.json" else "cut short"](path.read_bytes()))
    capsys.readouterr()
    call(train, "--data", data, "--out", run_folder, "--device", "cpu", "--resume")
    printed = capsys.readouterr().out
    assert f"{file} is missing" in printed and "going on from" in printed and "step-00000002.damaged" in printed
    assert same(weights(run_folder / "step-00000002"), expected)
    assert sorted(p.name for p in run_folder.glob("step-*")) == ["step-00000001", "step-00000002", "step-00000002.damaged"]


def test_no_checkpoint_is_whole(call, data, run_folder):
    for path in run_folder.glob("step-*/model.pt"):
        path.write_bytes(path.read_bytes()[:200])
    before = sorted(run_folder.rglob("*"))
    with pytest.raises(InputError, match="no checkpoint in .* is whole: .*step-00000002/model.pt is missing, damaged or cut short"):
        call(train, "--data", data, "--out", run_folder, "--device", "cpu", "--resume")
    assert sorted(run_folder.rglob("*")) == before


def describe(run_folder: Path, change):
    """Change config.json of the newest checkpoint, and remove the one before it."""
    shutil.rmtree(run_folder / "step-00000001", ignore_errors=True)
    path = run_folder / "step-00000002/config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(change(about) or about))


@pytest.mark.parametrize("change", [
    lambda about: {"a": 1}, lambda about: [1], lambda about: about.update(config=3), lambda about: about.update(step=-1),
    lambda about: about.update(step="1"), lambda about: about["training"].update(steps="7"), lambda about: about.pop("data"),
    lambda about: about["training"].update(colour="red"), lambda about: about["config"].update(d_model=32.0),
    lambda about: about["config"].update(paper=1), lambda about: about["config"].update(n_layers=10**400)])
def test_resume_from_a_config_that_describes_no_run(call, data, run_folder, change):
    describe(run_folder, change)
    with pytest.raises(InputError, match="config.json (does not describe a run|is missing or damaged)"):
        call(train, "--data", data, "--out", run_folder, "--device", "cpu", "--resume")


@pytest.mark.parametrize("change, message", [
    (dict(n_layers=10**9), "1,000,000,000 layers do not fit into .* tensors"),
    (dict(d_model=2**20, n_heads=2**14), "size mismatch for"), (dict(vocab_size=2**30, base=2**20), "size mismatch for"),
    (dict(n_modes=2**30, mode_width=2**30), "does not describe a model"), (dict(n_layers=2), "missing or unexpected"),
    (dict(seq_len=2**30), "seq_len is 1,073,741,824: it may be 1,048,576 at most")])
def test_a_config_that_claims_too_much(saved, change, message):
    """No memory is taken for what the weights beside it do not have."""
    describe(saved, lambda about: about["config"].update(change))
    with pytest.raises(InputError, match=message):
        LanguageModel.from_checkpoint(saved)


def rewritten(path: Path, change):
    """What torch.save wrote, changed."""
    found = torch.load(path, weights_only=True)
    torch.save(change(found) or found, path)


@pytest.mark.parametrize("change, message", [
    (lambda w: [1], "list missing or unexpected"), (lambda w: w.update(more=w.pop("norm.weight")), "more, norm.weight missing"),
    (lambda w: w.update({"norm.weight": torch.full((32,), torch.nan)}), "norm.weight is damaged"),
    (lambda w: w.update({"norm.weight": torch.ones(1).expand(32)}), "norm.weight is damaged"),
    (lambda w: w.update({"norm.weight": torch.ones(32, dtype=torch.int32)}), "norm.weight is of type torch.int32"),
    (lambda w: w.update({"norm.weight": torch.ones(32).to_sparse()}), "size mismatch for norm.weight"),
    (lambda w: w.update({"norm.weight": 3}), "size mismatch for norm.weight"),
    (lambda w: w.update({"embed_tokens.addresses": torch.zeros(300, dtype=torch.int64)}), "addresses collide")])
def test_weights_from_a_stranger(saved, change, message):
    rewritten(saved / "step-00000002/model.pt", change)
    with pytest.raises(InputError, match=message):
        LanguageModel.from_checkpoint(saved)


@pytest.mark.parametrize("change, message", [
    (lambda o: [1], "does not hold the moments"), (lambda o: o.update(state={}), "does not hold the moments"),
    (lambda o: o["state"][0].update(exp_avg=torch.zeros(1)), "size mismatch for exp_avg"),
    (lambda o: o["state"][0].update(exp_avg_sq=torch.full_like(o["state"][0]["exp_avg"], torch.inf)), "exp_avg_sq is damaged")])
def test_an_optimizer_from_a_stranger(call, data, run_folder, change, message):
    describe(run_folder, lambda about: None)
    rewritten(run_folder / "step-00000002/optimizer.pt", change)
    with pytest.raises(InputError, match=f"optimizer.pt is not of this model: .*{message}"):
        call(train, "--data", data, "--out", run_folder, "--device", "cpu", "--resume")


def test_a_file_that_unpacks_to_more_than_its_size(saved):
    """A zip bomb: torch would unpack it."""
    path = saved / "step-00000002/model.pt"
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert torch.load(path, weights_only=True)
    with pytest.raises(InputError, match="it holds more than its size"):
        LanguageModel.from_checkpoint(saved)


def test_checkpoint_of_another_configuration(saved):
    path = saved / "step-00000002/config.json"
    described = json.loads(path.read_text())
    described["config"]["d_model"] = 64
    path.write_text(json.dumps(described))
    with pytest.raises(InputError, match="model.pt is of another configuration than config.json beside it: size mismatch"):
        LanguageModel.from_checkpoint(saved)
    described["config"]["colour"] = "red"
    path.write_text(json.dumps(described))
    with pytest.raises(InputError, match="does not describe a model .*colour"):
        LanguageModel.from_checkpoint(saved)


def test_a_checkpoint_keeps_its_precision(saved):
    rewritten(saved / "step-00000002/model.pt", lambda w: {n: x.double() if x.is_floating_point() else x for n, x in w.items()})
    assert {p.dtype for p in LanguageModel.from_checkpoint(saved).parameters()} == {torch.float64}


def test_a_checkpoint_runs_no_code(saved):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(saved / "trapped"),)
    torch.save(Trap(), saved / "step-00000002/model.pt")
    with pytest.raises(InputError, match="is missing, damaged or cut short"):
        LanguageModel.from_checkpoint(saved)
    assert not (saved / "trapped").exists()


def test_no_room_on_the_disk(call, data, monkeypatch, tmp_path):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(InputError, match=r"cannot save step 1 in .*no room on the disk.*free some space and go on with --resume"):
        call(train, "--data", data, "--out", tmp_path / "run", "--device", "cpu", *SMALL)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_a_disk_that_fills_while_saving(call, data, monkeypatch, tmp_path):
    """torch.save raises RuntimeError then. The checkpoint of step 1 stays; nothing half-written remains."""
    call_number = iter(range(10))
    real = torch.save

    def full(obj, path):
        if next(call_number) < 2:
            return real(obj, path)
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="cannot save step 2"):
        call(train, "--data", data, "--out", tmp_path / "run", "--device", "cpu", *SMALL)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.jsonl", "step-00000001"]


def test_a_loss_that_is_not_finite(call, data, tmp_path):
    with pytest.raises(InputError, match=r"step \d+: the loss is .*Try a lower --learning-rate"):
        call(train, "--data", data, "--out", tmp_path / "run", "--device", "cpu", *SMALL, "--learning-rate", "1e30", "--steps", "9",
             "--clip", "1e30")


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "no checkpoint in nowhere: name a folder that train.py has written"),
    (["nowhere", "--tokens", "0"], "--tokens is 0: it must be at least 1"),
    (["nowhere", "--temperature", "-1"], "--temperature is -1.0: it must be at least 0"),
    (["nowhere", "--temperature", "nan"], "--temperature is nan: it must be at least 0"),
    (["nowhere", "--samples", "0"], "--samples is 0: it must be at least 1"),
    (["nowhere", "--seed", "-1"], "--seed is -1: it must be at least 0"),
    (["nowhere", "--top-p", "0"], "--top-p is 0.0: it must be above 0 and at most 1"),
])
def test_sample_flags(call, arguments, message):
    with pytest.raises(InputError, match=message):
        call(sample, *arguments)


def test_sample_with_another_tokenizer(call, saved, tiny_data):
    path, tokenizer = saved / "step-00000002/tokenizer.json", read_json(tiny_data / "meta.json")["tokenizer"]
    path.write_text(json.dumps(tokenizer | {"fingerprint": "0"}))
    with pytest.raises(InputError, match="the tokenizer tiny does not match"):
        call(sample, saved)


def test_sample_with_a_tokenizer_of_another_size(call, saved):
    encoding = train_tokenizer(iter(["some text"]), 260, "other")
    (saved / "step-00000002/tokenizer.json").write_text(json.dumps(tokenizer_to_json(encoding)))
    with pytest.raises(InputError, match="the model has 300 ids and the tokenizer 260: they do not belong together"):
        call(sample, saved)


@pytest.mark.parametrize("change", [
    lambda known: known["tokens"].__setitem__(300 - 2, "not base64!"), lambda known: known.update(pattern="(a+)+$"),
    lambda known: known["tokens"].__setitem__(0, known["tokens"][1]), lambda known: known.update(tokens=3),
    lambda known: known.pop("name")])
def test_a_tokenizer_from_a_stranger(tiny_data, change):
    known = read_json(tiny_data / "meta.json")["tokenizer"]
    change(known)
    with pytest.raises(InputError, match="the tokenizer's description is damaged .*: prepare the data again"):
        tokenizer_from_json(known)


def test_memory_cannot_be_read_everywhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(InputError, match="peak memory cannot be read on Windows: use WSL, or a GPU"):
        bench.peak_memory(torch.device("cpu"))


@pytest.mark.parametrize("script, arguments", [("train", ["--preset", "huge"]), ("prepare_pile", ["--encoding", "gpt9"]),
                                               ("sample", ["nowhere"])])
def test_what_the_user_sees(script, arguments, tmp_path):
    """One line, no traceback, exit status 1."""
    done = subprocess.run([sys.executable, HERE / f"{script}.py", *arguments], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{script}.py: ") and len(done.stderr.splitlines()) == 1


