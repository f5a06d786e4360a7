"""SimCSE: train, evaluate and use sentence encoders. ``from simcse import SimCSE`` loads a trained one."""

from typing import Any

__all__ = ["SimCSE"]


def __getattr__(name: str) -> Any:  # `import simcse` takes no seconds
    if name == "SimCSE":
        from simcse.tool import SimCSE

        return SimCSE
    raise AttributeError(f"module 'simcse' has no attribute {name!r}")
