"""In a checkout that is not installed, ``fused_infonce.kernels`` is found in the folder ``kernels/infonce``.

An install maps the package to that folder (setup.py). A link in git would do the same for a checkout, but Windows
checks links out as text files, archives and source distributions lose them, and type checkers follow them.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent
_KERNELS = _PACKAGE.parent / "kernels" / "infonce"


class _KernelsFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != f"{__package__}.kernels":
            return None
        return spec_from_file_location(
            fullname, _KERNELS / "__init__.py", submodule_search_locations=[str(_KERNELS)]
        )


if not (_PACKAGE / "kernels").is_dir() and _KERNELS.is_dir():
    sys.meta_path.insert(0, _KernelsFinder())
