"""The extra: what is said when it is missing or wrongly paired, and that nothing imports it unasked."""

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from bitlower.backends.registry import known_backends, make_backend
from bitlower.backends.tvm_kernels import pins
from bitlower.ir import BitlowerError


def _installed(monkeypatch, **versions):
    def version(name):
        if (found := versions.get(name.replace("-", "_"))) is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(pins, "version", version)


def test_the_pins_are_those_of_the_extra():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    expected = [f"{name}=={version}" for name, version in pins.PINS.items()]
    assert project["project"]["optional-dependencies"]["tvm"] == expected


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        ({}, "apache-tvm, which is not installed"),
        ({"apache_tvm": "0.27.0.post1"}, "apache-tvm-ffi, which is not installed"),
        ({"apache_tvm": "0.27.0.post1", "apache_tvm_ffi": "0.1.15.post2"}, "apache-tvm-ffi 0.1.15.post2 is installed"),
        ({"apache_tvm": "0.26.0", "apache_tvm_ffi": "0.1.14.post1"}, "apache-tvm 0.26.0 is installed"),
    ],
)
def test_what_is_wrong_and_how_to_mend_it_is_said(monkeypatch, versions, named):
    _installed(monkeypatch, **versions)
    with pytest.raises(BitlowerError, match=named) as caught:
        pins.require_tvm()
    assert caught.value.hint == "pip install 'bitlower[tvm]'"


def test_the_pair_that_works_is_let_through(monkeypatch):
    _installed(monkeypatch, **{name.replace("-", "_"): version for name, version in pins.PINS.items()})
    pins.check_pins()


def test_the_package_imports_no_tvm():
    script = (
        "import sys, bitlower.backends.tvm_kernels as backend; backend.TvmKernels('llvm'); print('tvm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_recipes_can_name_it_and_are_told_what_is_missing(monkeypatch):
    assert "tvm-kernels" in known_backends()
    made = make_backend("tvm-kernels", {"target": "llvm"})
    _installed(monkeypatch)
    with pytest.raises(BitlowerError, match="apache-tvm, which is not installed"):
        made.check_host()
