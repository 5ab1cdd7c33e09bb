"""Questions asked of the method, and the instruments for them; run as `python -m lab.NAME`."""
import re
import sys


def command(name: str, main):
    """Run a script's main; what is wrong, or Ctrl-C, is one line, with exit status 1."""
    if hasattr(sys.stdout, "reconfigure"):              # not in a notebook
        sys.stdout.reconfigure(errors="replace")        # where a character is lacking, "?"
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")
    except (RuntimeError, MemoryError) as error:        # of CUDA, of the CPU's allocator, of numpy
        if not re.search("(of|enough|allocate) memory|MemoryError|overflow", repr(error)):
            raise
        sys.exit(f"{name}: out of memory ({error!r:.300}): take smaller sizes")
