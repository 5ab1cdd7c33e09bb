"""What the README says of the code is true: quoted lines, links, flags, examples."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import InputError
from leviathan import LanguageModel

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
SCRIPTS = [path.name for path in sorted(HERE.glob("*.py")) if "argparse" in path.read_text(encoding="utf-8")]


def test_equations_stand_beside_the_lines_they_became():
    table = README[README.index("| step | equation"):README.index("Two readings of the method")]
    quoted = re.findall(r"`([^`]+)`", table)
    code = (HERE / "leviathan.py").read_text(encoding="utf-8")
    assert len(quoted) == 9 and [line for line in quoted if line not in code] == []


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_links_lead_somewhere(page):
    text = (HERE / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = ((HERE / page).parent / path) if path else HERE / page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_every_file_is_named():
    assert [path.name for path in HERE.glob("*.py") if path.name not in README and path.name != "conftest.py"] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_exist(script):
    """Every flag in a command of the README is one of the script's; --help needs no packages but the required ones."""
    done = subprocess.run([sys.executable, HERE / script, "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    used = set()
    for line in re.sub(r"\\\n", " ", README).splitlines():
        if line.startswith(("python ", "torchrun ")) and f" {script}" in line:
            used |= set(re.findall(r"(?<= )--[\w-]+", line.split(script)[1].partition(" # ")[0]))
    if script != "bench.py":        # whose subcommands have helps of their own
        assert [flag for flag in sorted(used) if flag not in done.stdout] == []


def test_own_generator(tmp_path, tiny_data):
    """mine.py as it stands in the README, at a tiny size."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if block.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "mine.py", "--data", tiny_data, "--out", tmp_path / "out", *(
        "--seq-len 32 --d-model 32 --n-layers 1 --n-heads 2 --d-seed 8 --mode-width 1 --tokens-per-step 256 --steps 4").split()],
        capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(HERE), "PATH": ""})
    assert done.returncode == 0, done.stderr
    with pytest.raises(InputError, match="was trained with Additive in the place of TokenGenerator: load it where leviathan.Token"):
        LanguageModel.from_checkpoint(tmp_path / "out")
    done = subprocess.run([sys.executable, tmp_path / "mine.py", "--data", tiny_data, "--out", tmp_path / "out"],
                          capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(HERE), "PATH": ""})
    assert done.returncode == 1 and done.stderr.startswith("mine.py: ") and len(done.stderr.splitlines()) == 1
