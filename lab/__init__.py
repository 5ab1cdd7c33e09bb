"""Questions asked of the method, and the instruments for them; run as `python -m lab.NAME`."""
