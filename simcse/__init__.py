"""SimCSE: train, evaluate and use sentence encoders. ``from simcse import SimCSE`` loads a trained one."""

from typing import Any as _Any

__all__ = ["SimCSE", "__version__"]


def __getattr__(name: str) -> _Any:  # `import simcse` takes no seconds
    if name == "SimCSE":
        from simcse.inference import SimCSE

        return SimCSE
    if name == "__version__":  # that of the distribution, which holds both packages
        from fused_infonce import __version__

        return __version__
    raise AttributeError(f"module 'simcse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
