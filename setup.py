"""What pyproject.toml cannot say: the folder ``kernels/infonce`` is the package ``fused_infonce.kernels``.

It lies outside ``fused_infonce/``, and has no ``kernels/__init__.py`` above it, because a top-level package
called ``kernels`` would shadow Hugging Face's, which transformers imports. In a checkout that is not installed,
``fused_infonce/_checkout.py`` finds it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fused_infonce*", "simcse*"]), "fused_infonce.kernels"],
    package_dir={"fused_infonce.kernels": "kernels/infonce"},
)
