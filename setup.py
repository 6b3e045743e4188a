"""Maps the folder ``kernels/`` to the package ``fastmixer.kernels``, and ``benchmarks/`` likewise.

PyPI has an unrelated package named ``kernels``; a second top-level package of that name would
shadow it, so the device code is installed below ``fastmixer``. Everything else is declared in
``pyproject.toml``.
"""

from setuptools import setup

setup(
    packages=[
        "fastmixer",
        "fastmixer.adapters",
        "fastmixer.benchmarks",
        "fastmixer.configs",
        "fastmixer.kernels",
    ],
    package_dir={
        "fastmixer": "fastmixer",
        "fastmixer.benchmarks": "benchmarks",
        "fastmixer.kernels": "kernels",
    },
    package_data={"fastmixer.configs": ["*.json", "compiled/*/*.json"]},
)
