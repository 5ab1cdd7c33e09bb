"""The house: which files there are, who imports whom, and that the method stands alone."""
import ast
import os
import shutil
import subprocess
import sys

import pytest

from budgets import ROOT

SCRIPTS = {"leviathan", "train", "prepare_pile", "sample", "bench", "test_leviathan"}
TOP = {f"{name}.py" for name in SCRIPTS} | {
    "README.md", "LICENSE", "pyproject.toml", "requirements.txt", "requirements-dev.txt", ".gitignore",
    ".ci", "lab", "tests", "results"}
OURS = SCRIPTS | {"lab"}
MAY_IMPORT = {                  # of the project
    "leviathan": set(), "prepare_pile": set(), "sample": {"leviathan", "prepare_pile"},
    "train": {"leviathan", "prepare_pile", "sample"}, "bench": {"leviathan", "prepare_pile", "train"},
    "lab": OURS - {"test_leviathan"}, "test_leviathan": OURS - {"test_leviathan"}}
BASE = {"torch", "numpy", "tiktoken", "tqdm", "filelock"}       # that an import of any file may need
PACKAGES = {"leviathan": {"torch"}, "prepare_pile": BASE - {"torch"}, "lab": BASE | {"matplotlib"},
            "test_leviathan": BASE | {"pytest"}}
FILES = [*(f"{name}.py" for name in sorted(SCRIPTS)),
         *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "lab").rglob("*.py"))]


def imports(tree: ast.AST) -> set[str]:
    """The first names of what is imported, anywhere; a relative import is "."."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found - sys.stdlib_module_names


def imports_at_once(tree: ast.Module) -> set[str]:
    """Those outside functions, which everybody who imports the file needs."""
    class Outside(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None
    return imports(Outside().visit(tree))


def test_imports_are_seen_wherever_they_stand():
    code = "import os, a.b\nfrom c.d import e\nclass K: import f\ndef g():\n from h import i; from . import j"
    assert imports(ast.parse(code)) == {"a", "c", "f", "h", "."}
    assert imports_at_once(ast.parse(code)) == {"a", "c", "f"}


@pytest.mark.parametrize("file", FILES)
def test_who_imports_whom(file):
    """Of the project what stands before it; at once no package but the required ones."""
    name, text = file.removesuffix(".py").split("/")[0], (ROOT / file).read_text(encoding="utf-8")
    found, at_once = imports(ast.parse(text)), imports_at_once(ast.parse(text))
    others = {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"))} | {"lab", "tests", "."}
    assert found & others <= MAY_IMPORT[name]
    assert at_once - others <= PACKAGES.get(name, BASE)
    assert name != "leviathan" or found == {"torch"}
    assert name != "prepare_pile" or "torch" not in found


def test_the_top_level_is_exactly_the_list():
    """What git knows of, for a user's own files may lie here; without git, what is there and not ignored."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    there = {line.split("/")[0] for line in listed.stdout.splitlines()}
    if not there:
        ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()} | {".git"}
        there = {path.name for path in ROOT.iterdir()} - ignored
    assert {name for name in there if (ROOT / name).exists()} == TOP


ALONE = """
import sys
sys.path.insert(0, ".")
import torch
from leviathan import Config, LanguageModel, LevGenerator, TokenGenerator

for generator in (TokenGenerator, LevGenerator):
    assert generator(97, 5)(torch.tensor([[1, 96]])).shape == (1, 2, 5)
model = LanguageModel(Config(vocab_size=97, seq_len=8, d_model=32, n_layers=1, d_seed=8, mode_width=1))
optimizer, ids = torch.optim.AdamW(model.decay_groups(0.1), lr=1e-2), torch.randint(97, (2, 9))
losses = []
for _ in range(2):
    losses.append(model(ids[:, :-1], ids[:, 1:]))
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[1] < losses[0]
print(*sorted({*sys.argv[1:]} & sys.modules.keys()))
"""


def test_the_method_stands_alone(tmp_path):
    """leviathan.py in an empty folder, in a process that sees nothing else of the project."""
    shutil.copy(ROOT / "leviathan.py", tmp_path)
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *OURS], cwd=tmp_path, timeout=300,
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "leviathan\n"             # of ours nothing else is there
