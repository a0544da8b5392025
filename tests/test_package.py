"""What is installed: one version, and the types beside the code."""

import importlib.metadata
from pathlib import Path

import ftrain


def test_the_version_is_that_of_the_distribution():
    assert ftrain.__version__ == importlib.metadata.version("ftrain")


def test_types_are_shipped():
    package = Path(ftrain.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "__init__.pyi").is_file()
