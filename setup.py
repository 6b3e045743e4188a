"""Maps the folder ``kernels/`` to the package ``fastmixer.kernels``, and ``benchmarks/`` likewise.

PyPI has an unrelated package named ``kernels``; a second top-level package of that name would
shadow it, so the device code is installed below ``fastmixer``. The license is here because no form of it
in ``pyproject.toml`` suits both setuptools 68 and the newest. Everything else is declared there.
"""

from setuptools import find_packages, setup

FOLDERS = {"fastmixer": "fastmixer", "fastmixer.benchmarks": "benchmarks", "fastmixer.kernels": "kernels"}
DATA = "fastmixer.configs.compiled"  # a folder of records: setuptools wants it named like a package

setup(
    license="MIT",
    packages=[
        *(
            f"{name}{rest}"
            for name, folder in FOLDERS.items()
            for rest in ("", *(f".{package}" for package in find_packages(folder)))
        ),
        DATA,
    ],
    package_dir=FOLDERS,
    package_data={"fastmixer.configs": ["*.json"], "fastmixer.benchmarks": ["*.c"], DATA: ["*/*.json"]},
)
