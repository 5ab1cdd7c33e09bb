"""Questions asked of the method, and the instruments for them; run as `python -m lab.NAME`."""
import sys


def command(name: str, main):
    """Run a script's main; what is wrong, or Ctrl-C, is one line, with exit status 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")
