"""On a GPU: what a CPU computes, in each dtype, compiled or not; a run, its resumption, want of memory."""
import shutil
import subprocess
import sys

import pytest
import torch

from bench import natural_windows
from kill_train import FLAGS, ROOT, read_log
from leviathan import Config, LanguageModel
from test_train import run
from train import compile_parts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODELS = [dict(model="dense"), dict(model="dense-untied"), dict(), dict(centred=False), dict(generator="lev")]
SHAPE = dict(vocab_size=40_001, seq_len=64, d_model=64, n_layers=2, d_seed=32, mode_width=4)
FLOAT32, AUTOCAST, COMPILED = dict(dtype=torch.float32), dict(autocast=True), dict(compiled=True)


def gradients(settings: dict, device: str, dtype=torch.float64, autocast=False, compiled=False) -> dict:
    """The loss and every parameter's gradient, on the CPU in float64."""
    model = LanguageModel(Config(**SHAPE | settings)).to(device, dtype)
    if compiled:
        compile_parts(model)
    batch = natural_windows(1_024, SHAPE["vocab_size"], SHAPE["seq_len"]).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    found = dict(loss=loss) | {name: p.grad for name, p in model.named_parameters()}
    return {name: x.detach().cpu().double() for name, x in found.items()}


@pytest.mark.parametrize("settings", MODELS, ids=str)
@pytest.mark.parametrize("how, within", [
    (dict(), 1e-6), (COMPILED, 1e-6), (FLOAT32, 1e-3), (FLOAT32 | AUTOCAST, 0.05),
    (FLOAT32 | AUTOCAST | COMPILED, 0.05)])
def test_a_gpu_computes_what_a_cpu_does(settings, how, within):
    """The error of each tensor, as a share of its norm. (Rotary angles are always float32.)"""
    torch.compiler.reset()
    expected, found = gradients(settings, "cpu"), gradients(settings, "cuda", **how)
    errors = {name: ((found[name] - x).norm() / x.norm()).item() for name, x in expected.items()}
    assert expected.keys() == found.keys() and max(errors.values()) < within, errors


def test_a_run_and_its_resumption(tmp_path, tiny_data):
    """In float64 the losses are a CPU's; a run that goes on from its middle ends as the whole one."""
    flags = "--steps 8 --save-every 4 --eval-every 4 --keep 9 --no-compile --dtype float64 --device".split()
    cpu, gpu = (run(tmp_path / device, tiny_data, *flags, device) for device in ("cpu", "cuda"))
    shutil.rmtree(tmp_path / "cuda/step-00000008")
    for found in gpu, run(tmp_path / "cuda", tiny_data, *flags, "cuda", "--resume"):
        assert len(found["log"]) == 8
        for ours, theirs in zip(found["log"], cpu["log"]):
            assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-8)


def test_the_defaults_train(tmp_path, tiny_data):
    """Compiled, in bfloat16: the losses are those of float32 on a CPU, nearly."""
    cpu, out = run(tmp_path / "cpu", tiny_data, "--steps", "8")["log"], tmp_path / "gpu"
    flags = "--device cuda --dtype bfloat16 --steps 8 --data".split()
    done = subprocess.run([sys.executable, ROOT / "train.py", *FLAGS, *flags, tiny_data, "--out", out],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bfloat16, compiled" in done.stdout
    assert [line["loss"] for line in read_log(out)] == pytest.approx([line["loss"] for line in cpu], abs=0.05)


def test_want_of_memory_is_one_line(tmp_path, tiny_data):
    code = ("import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction(1e-4); "
            "sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')")
    flags = "--device cuda --no-compile --tokens-per-step 262144 --d-model 512 --data".split()
    done = subprocess.run([sys.executable, "-c", code, *FLAGS, *flags, tiny_data, "--out", tmp_path / "gpu"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "out of memory" in done.stderr.splitlines()[-1] and "lower --micro-batch" in done.stderr
