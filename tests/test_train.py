"""train.py and sample.py as a user runs them: stopped, compiled, under autocast, read from a pipe."""
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from leviathan import Config, LanguageModel

HERE = Path(__file__).parent.parent
SMALL = ("--device cpu --seq-len 32 --d-model 32 --n-layers 2 --n-heads 2 --d-seed 16 --mode-width 2 --tokens-per-step 256 "
         "--eval-tokens 512").split()


def script(name, *arguments, **how):
    return subprocess.run([sys.executable, HERE / name, *map(str, arguments)], capture_output=True, text=True, timeout=300, **how)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, tiny_data, number):
    out = tmp_path / "run"
    command = [sys.executable, str(HERE / "train.py"), "--data", str(tiny_data), "--out", str(out), *SMALL, "--steps", "100000",
               "--save-every", "100000", "--eval-every", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert process.returncode == 0, stderr
    assert [path.name for path in out.glob("step-*")] == [f"step-{len(lines):08d}"]
    assert "to go on, give the same command with --resume" in stdout.splitlines()[-1]


def test_resume_without_a_checkpoint_starts_anew(tmp_path, tiny_data):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 9.0}\nhalf a li')
    done = script("train.py", "--data", tiny_data, "--out", tmp_path, *SMALL, "--steps", 2, "--resume")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_prepares_the_default_data_and_samples(tmp_path):
    """The first command of the README, cut to two steps; then text from its checkpoint by argument, file and pipe."""
    done = script("train.py", *SMALL, "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/stdlib/meta.json").exists() and (tmp_path / "out/leviathan-nano/curves.png").exists()
    (tmp_path / "prompt.txt").write_text("import os")
    texts = [script("sample.py", "out/leviathan-nano", "--tokens", 20, *how, cwd=tmp_path, input="import os")
             for how in (["--prompt", "import os"], ["--prompt", "-"], ["--prompt-file", "prompt.txt"], ["--seed", "1"])]
    assert all(done.returncode == 0 for done in texts), texts
    assert texts[0].stdout == texts[1].stdout == texts[2].stdout != texts[3].stdout
    assert texts[0].stdout.startswith("import os") and len(texts[0].stdout) > 20


@pytest.mark.parametrize("model", ["leviathan", "dense"])
def test_bfloat16_autocast_trains_alike(tmp_path, tiny_data, model):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        done = script("train.py", "--model", model, "--data", tiny_data, "--out", tmp_path / dtype, *SMALL, "--steps", 8,
                      "--dtype", dtype)
        assert done.returncode == 0, done.stderr
        losses[dtype] = [json.loads(line)["loss"] for line in (tmp_path / dtype / "log.jsonl").read_text().splitlines()]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3) and losses["bfloat16"] != losses["float32"]
    weights = torch.load(tmp_path / "bfloat16/step-00000008/model.pt", weights_only=True)
    assert {w.dtype for w in weights.values()} <= {torch.float32, torch.int64}


@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_the_same(tiny_data):
    """Block by block, without graph breaks; then with the modes; and no name of a parameter changes."""
    model, compiled = (LanguageModel(Config(vocab_size=97, seq_len=16, d_model=32, n_layers=2, n_heads=2, d_seed=8, mode_width=1))
                       for _ in range(2))
    for layer in compiled.layers:
        layer.compile(fullgraph=True)
    compiled.embed_tokens.compile_modes()
    ids = torch.randint(97, (2, 17))
    for m in (model, compiled):
        m(ids[:, :-1], ids[:, 1:]).backward()
    assert model.state_dict().keys() == compiled.state_dict().keys()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("flags, expected", [
    ("", ("learned", "vectors", 256)), ("--base 9", ("learned", "vectors", 9)), ("--addresses learned --start noise",
    ("learned", "noise", 256)), ("--paper", ("id", "noise", 7)), ("--addresses id", ("id", "noise", 7)),
    ("--model dense", ("id", "noise", 256)), ("--paper --addresses learned", ("learned", "vectors", 256))])
def test_where_a_model_starts(tmp_path, tiny_data, monkeypatch, flags, expected):
    """Learned addresses and a start from the vectors by default; the id and noise in the paper's reading and in twins."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(tiny_data), "--out", str(tmp_path), *SMALL, "--steps", "1",
                                      *flags.split()])
    train.main()
    about = json.loads((tmp_path / "step-00000001/config.json").read_text())
    assert (about["training"]["addresses"], about["training"]["start"], about["config"]["base"]) == expected


def test_a_loss_that_jumps_is_marked(tmp_path, tiny_data, monkeypatch, capsys):
    """One step of a thousand times the rate; the same run goes on from a checkpoint with the same marks."""
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, t: rate(step, t) * (1_000 if step == 30 else 1))
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    flags = ["train.py", "--data", str(tiny_data), "--out", str(tmp_path / "run"), *SMALL, "--steps", "36", "--save-every", "25"]
    monkeypatch.setattr(sys, "argv", flags)
    train.main()
    marks = [line["step"] for line in train.read_log(tmp_path / "run/log.jsonl") if line.get("spike")]
    assert marks and marks[0] == 32 and "step     32  the loss has jumped to" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run/step-00000036")
    monkeypatch.setattr(sys, "argv", [*flags, "--resume"])
    train.main()
    assert [line["step"] for line in train.read_log(tmp_path / "run/log.jsonl") if line.get("spike")] == marks


@pytest.mark.parametrize("flags", [[], ["--decay-splines"], ["--model", "dense"],
                                   ["--model", "dense-untied", "--start", "vectors"]],
                         ids=str)
def test_every_kind_of_run_goes_on(tmp_path, tiny_data, monkeypatch, flags):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    flags = ["train.py", "--data", str(tiny_data), "--out", str(tmp_path / "run"), *SMALL, "--steps", "3", *flags]
    monkeypatch.setattr(sys, "argv", flags)
    train.main()
    log, weights = train.read_log(tmp_path / "run/log.jsonl"), (tmp_path / "run/step-00000003/model.pt").read_bytes()
    shutil.rmtree(tmp_path / "run/step-00000003")
    monkeypatch.setattr(sys, "argv", [*flags, "--resume"])
    train.main()
    assert [line["loss"] for line in train.read_log(tmp_path / "run/log.jsonl")] == [line["loss"] for line in log]
    assert (tmp_path / "run/step-00000003/model.pt").read_bytes() == weights
