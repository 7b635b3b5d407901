"""The parts of the demo page; `python examples/app.py` starts it."""
