"""What the README says of the code is true: quoted lines, links, flags, commands, examples."""
import os
import re
import subprocess
import sys

import pytest

from test_architecture import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAB = [f"lab.{path.stem}" for path in sorted((ROOT / "lab").glob("*.py")) if path.stem != "__init__"]
COMMAND = re.compile(r"(?:python|torchrun)(?= )([^`\n]*?) (?:(\w+)\.py|-m ((?:lab|tests)\.\w+))([^`\n#]*)")


def commands() -> list[tuple[str, set[str]]]:
    """(module, flags) of each command; "..." is not looked into, and a line that ends in \\ goes on."""
    text = re.sub(r'"[^"\n]*"', '""', re.sub(r"\\\n", " ", README))
    return [(script or module, {*re.findall(r"(?<= )--[\w-]+", re.split("&&|[;|]", flags)[0])})
            for _, script, module, flags in COMMAND.findall(text)]


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 220 and [line for line in lines if len(line) > 110] == []


def test_equations_stand_beside_the_lines_they_became():
    table = re.search(r"^\| step \| equation \|.*\n(\|.*\n)+", README, flags=re.MULTILINE)[0]
    quoted = [line.replace(r"\|", "|") for line in re.findall(r"`([^`]+)`", table)]
    code = (ROOT / "leviathan.py").read_text(encoding="utf-8")
    assert len(quoted) >= 5 and [line for line in quoted if line not in code] == []


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_links_lead_somewhere(page):
    def headings(file):
        text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)]

    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert "://" in target or file.exists() and (not anchor or anchor in headings(file)), target


def test_every_file_is_named():
    assert [name for name in SCRIPTS if f"{name}.py" not in README] == []
    assert [name for name in LAB if not re.search(rf"\b{name.removeprefix('lab.')}\b", README)] == []


def test_commands_name_files_that_are_there():
    named = {module for module, _ in commands()}
    there = {module for module in named if (ROOT / f"{module.replace('.', '/')}.py").exists()}
    assert "train" in named and named - there == set()


@pytest.mark.parametrize("module", [*sorted(SCRIPTS - {"leviathan", "test_leviathan"}), *LAB])
def test_flags_exist(module):
    """Every script explains itself, and has the flags that the README's commands give it."""
    how = ["-m", module] if "." in module else [f"{module}.py"]
    done = subprocess.run([sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    known = re.findall(r"--[\w-]+", done.stdout)
    assert [flag for name, flags in commands() if name == module for flag in flags if flag not in known] == []


def test_examples_run():
    """Blocks of Python that need leviathan.py alone, as they stand."""
    examples = [block for block in fenced("python") if block.startswith("from leviathan import")]
    assert examples
    for block in examples:
        exec(compile(block, "README.md", "exec"), {})


def test_own_generator(tmp_path, tiny_data):
    """It trains by its name in GENERATORS; where nobody has put that there its checkpoint is refused."""
    def run(*command):
        return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                              timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = run("-m", "lab.generators", "--data", tiny_data, "--out", tmp_path / "out", *(
        "--generator additive --seq-len 16 --d-model 16 --n-layers 1 --d-seed 8 --mode-width 1 "
        "--tokens-per-step 64 --steps 2 --eval-tokens 64 --device cpu").split())
    assert done.returncode == 0, done.stderr
    done = run("sample.py", tmp_path / "out")
    assert done.returncode == 1 and "unknown generator 'additive': choose from v1, lev" in done.stderr
    assert len(done.stderr.splitlines()) == 1
