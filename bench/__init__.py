"""How fast, how lean, how exact, against what people use today and against the machine: ``python -m bench``."""
