"""How long the files are, shown at the end of a test run: nothing fails by it, and growth is seen."""
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUDGETS = {"leviathan.py": 400, "train.py": 350, "prepare_pile.py": 420, "sample.py": 150, "bench.py": 320,
           "test_leviathan.py": 380, "README.md": 220}        # lines


def pytest_terminal_summary(terminalreporter):
    files = [ROOT / name for name in BUDGETS] + sorted((ROOT / "lab").glob("*.py"))
    terminalreporter.write_line(f"\n{'file':24}{'lines':>8}{'longest':>9}{'budget':>8}")
    for path in files:
        name, lines = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8").splitlines()
        budget, longest = BUDGETS.get(name, ""), max(map(len, lines))
        over = "  over" if budget and len(lines) > budget or longest > 110 else ""
        terminalreporter.write_line(f"{name:24}{len(lines):>8}{longest:>9}{budget:>8}{over}")
