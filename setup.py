"""Maps the folder ``kernels/`` to the package ``fastmixer.kernels``, and ``benchmarks/`` likewise.

PyPI has an unrelated package named ``kernels``; a second top-level package of that name would
shadow it, so the device code is installed below ``fastmixer``. The license is here because no form of it
in ``pyproject.toml`` suits both setuptools 68 and the newest. Everything else is declared there.
"""

from setuptools import setup

setup(
    license="MIT",
    packages=[
        "fastmixer",
        "fastmixer.adapters",
        "fastmixer.benchmarks",
        "fastmixer.benchmarks.evidence",
        "fastmixer.configs",
        "fastmixer.configs.compiled",
        "fastmixer.kernels",
    ],
    package_dir={
        "fastmixer": "fastmixer",
        "fastmixer.benchmarks": "benchmarks",
        "fastmixer.benchmarks.evidence": "benchmarks/evidence",
        "fastmixer.kernels": "kernels",
    },
    package_data={"fastmixer.configs": ["*.json"], "fastmixer.configs.compiled": ["*/*.json"]},
)
