"""How long the files are, shown at the end of a test run: nothing fails by it, and growth is seen."""
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGETS = {"leviathan.py": 400, "train.py": 350, "prepare_pile.py": 420, "sample.py": 150, "bench.py": 320,
           "test_leviathan.py": 380, "README.md": 220}        # lines
LAYOUT = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """Lines of Python that hold more than comments and docstrings."""
    lines, before = set(), tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        docstring = token.type == tokenize.STRING and before in LAYOUT      # a statement of its own
        if token.type not in LAYOUT and not docstring:
            lines |= {*range(token.start[0], token.end[0] + 1)}
        before = token.type
    return len(lines)


def measure(path: Path) -> tuple[int, int | None, int]:
    """Lines, lines of code, columns of the longest."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    return len(lines), code_lines(text) if path.suffix == ".py" else None, max(map(len, lines), default=0)


def pytest_terminal_summary(terminalreporter):
    files = [ROOT / name for name in BUDGETS] + sorted((ROOT / "lab").glob("*.py"))
    rows = [(path.relative_to(ROOT).as_posix(), *measure(path)) for path in files if path.exists()]
    terminalreporter.write_line(f"\n{'file':24}{'lines':>8}{'code':>8}{'longest':>9}{'budget':>8}")
    for name, lines, code, longest in rows:
        budget = BUDGETS.get(name, "")
        over = "  over" if budget and lines > budget or longest > 110 else ""
        terminalreporter.write_line(f"{name:24}{lines:>8}{code or '':>8}{longest:>9}{budget:>8}{over}")
