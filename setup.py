"""What pyproject.toml cannot say: the folder ``kernels/infonce`` is the package ``fused_infonce.kernels``.

It lies outside ``fused_infonce/``, and has no ``kernels/__init__.py`` above it, because a top-level package
called ``kernels`` would shadow Hugging Face's, which transformers imports. In a checkout that is not installed,
``fused_infonce/_checkout.py`` finds it.
"""

from setuptools import setup

setup(
    packages=["fused_infonce", "fused_infonce.integrations", "fused_infonce.kernels", "simcse"],
    package_dir={"fused_infonce.kernels": "kernels/infonce"},
)
