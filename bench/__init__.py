"""How fast, how lean, how exact: run ``python -m bench.speed``, ``bench.memory`` or ``bench.accuracy``."""
