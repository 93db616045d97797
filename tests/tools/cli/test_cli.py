"""The command line: options anywhere, JSON for machines, exit codes, quick help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlower.backends.registry import known_backends
from bitlower.ir import CheckError
from bitlower.passes import format_pipeline, known_passes
from bitlower.tools.cli import main
from bitlower.tools.cli.info import _describe
from bitlower.tools.cli.pass_table import PassRow, own_passes
from bitlower.tools.cli.settings import hoist
from bitlower.tools.runs.flow import standard_passes

ROOT = Path(__file__).parents[3]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """``call(arguments…)`` runs the command and gives exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from bitlower.tools.cli import main\n"
        "assert main(['--help']) == 0 and main(['quantize', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'onnx', 'numpy', 'rich.progress'} & set(sys.modules)\n"
        "assert main(['--version']) == 0"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bitlower 0." in done.stdout
    for command in ("run", "quantize", "analyze", "plan", "verify", "eval", "passes", "recipe", "replay"):
        assert f" {command} " in done.stdout


@given(
    st.lists(st.sampled_from(["run", "a.yaml", "-o", "out", "--json", "-q", "--plugin", "--plugin=p.py"]), max_size=8)
)
def test_hoisting_keeps_every_argument_and_the_order_of_the_rest(arguments: list[str]) -> None:
    moved = hoist(arguments)
    assert sorted(moved) == sorted(arguments)
    assert hoist(moved) == moved
    assert hoist(["x", "--", "--json"]) == ["x", "--", "--json"]


def test_no_command_prints_help(call: Any) -> None:
    code, out, err = call()
    assert code == 2
    assert "quantize" in out
    assert "Begin with: bitlower plan MODEL" in out
    assert err == "error: no command was given\n"
    code, out, err = call("passes")
    assert (code, "show" in out, err) == (2, True, "error: no command was given\n")


def test_passes(call: Any) -> None:
    code, out, _ = call("passes", "list", "--json")
    forms = {form["name"]: form for form in json.loads(out)["passes"]}
    assert code == 0
    assert forms["clean"]["contract"] == "exact"
    assert (forms["quantize"]["requires"], forms["quantize"]["ensures"]) == ("float|simulated", "simulated")
    scheme = next(p for p in forms["quantize"]["parameters"] if p["name"] == "scheme")
    assert scheme["default"] == "W8A8"
    assert "W8A8" in scheme["doc"]  # the text below the field in the source
    code, out, _ = call("passes", "show", "quantize")
    assert "scheme" in out
    assert ":class:" not in out
    assert json.loads(call("passes", "schema")[1])["passes"]
    code, _, err = call("passes", "show", "quantise")
    assert (code, "did you mean 'quantize'" in err) == (2, True)


def test_the_table_of_passes_is_read_from_source_and_says_what_they_say() -> None:
    expected = [
        PassRow(form["name"], form["contract"], form["requires"], form["ensures"] or "same", form["summary"])
        for form in (_describe(cls) for _, cls in sorted(known_passes().items()))
    ]
    assert own_passes() == expected
    probe = (
        "import sys; from bitlower.tools.cli import main\n"
        "assert main(['passes', 'list']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "peg-permute" in done.stdout


def test_recipes_can_be_begun_and_checked(call: Any, bert: Path, texts: Path, tmp_path: Path, traced: None) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert call("recipe", "init", bert, "-o", recipe)[0] == 0
    assert call("recipe", "init", bert, "-o", recipe)[0] == 2
    assert call("recipe", "init", bert)[1].rstrip("\n") == recipe.read_text().rstrip("\n")
    recipe.write_text(recipe.read_text().replace("calibration.txt", texts.name).replace("samples: 128", "samples: 32"))
    schema = json.loads(call("recipe", "schema")[1])
    assert "passes" in schema["properties"]


def test_run_writes_the_artifact_and_one_json_document(
    call: Any, bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {bert}}}\ncalibration: {{data: {texts.name}, samples: 16}}\n"
        "passes: [clean, quantize, calibrate, lower-integer]\nexport: [onnx-qdq]\n"
    )
    code, out, _ = call("recipe", "validate", recipe)
    assert (code, out) == (0, f"{recipe} is valid: clean,quantize,calibrate,lower-integer\n")
    code, out, err = call("run", recipe, "-o", tmp_path / "a", "--json")
    assert (code, err) == (0, "")
    form = json.loads(out)
    assert form["output"] == str(tmp_path / "a")
    assert form["artifact_bytes"] == sum(path.stat().st_size for path in (tmp_path / "a").rglob("*") if path.is_file())
    code, out, err = call("run", recipe, "-o", tmp_path / "b", "--print-after-change", "--no-cache")
    assert code == 0
    assert "calibrate" in out
    assert "; after quantize" in err
    assert call("run", recipe, "-o", tmp_path / "c", "-q")[1:] == ("", "")
    script = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_pipeline.py", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (script.returncode, "RECIPE" in script.stdout) == (0, True)


def test_quantize_and_plugins(call: Any, bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom bitlower.passes import Pass\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Pass):\n    '''Does nothing.'''\n\n    name = 'mine'\n\n"
        "    def run(self, program):\n        return False\n"
    )
    names = [form["name"] for form in json.loads(call("--plugin", plugin, "passes", "list", "--json")[1])["passes"]]
    assert "mine" in names
    code, out, _ = call(
        "quantize",
        bert,
        "--calibration",
        texts,
        "-o",
        tmp_path / "out",
        "--ignore",
        "*pooler*",
        "--samples",
        8,
        "--json",
    )
    assert code == 0
    assert json.loads(out)["pipeline"] == format_pipeline(standard_passes("W8A8", ["*pooler*"]))


def test_analyze(call: Any, bert: Path, texts: Path, traced: None) -> None:
    code, out, _ = call("analyze", bert, "--calibration", texts, "--json")
    assert code == 0
    form = json.loads(out)
    assert form["sequences"] == 35
    assert any(tensor["path"] == "encoder.layer.0.attention.output.dense" for tensor in form["tensors"])
    assert "kurtosis" in call("analyze", bert, "--calibration", texts)[1]


def test_eval(call: Any, classifier: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("sentence\tlabel\nthe cat\t1\nrain\t0\n")
    code, out, _ = call("eval", classifier, "--task", "classification", "--data", data, "--columns", "0,1", "--json")
    assert (code, "error" in out) == (2, True)  # the header line is no label
    code, out, _ = call("eval", classifier, "--task", "classification", "--data", data, "--json")
    assert (code, json.loads(out)["samples"]) == (0, 2)
    code, out, _ = call("eval", classifier, "--task", "classification", "--data", data, "--beams", 2, "--json")
    assert (code, "classification searches for nothing" in out) == (2, True)
    arguments = ("eval", classifier, "--task", "classification", "--data", data, "--compare", classifier)
    code, out, err = call(*arguments, "--fail-if", "accuracy > 100", "--fail-if", "difference.f1 < 0", "--json")
    assert (code, json.loads(out)["accepted"], "ACCEPT: accuracy is " in err) == (0, True, True)
    code, out, err = call(*arguments, "--fail-if", "accuracy <= 100", "--json")
    assert (code, json.loads(out)["accepted"], "REGRESSION: accuracy is " in err) == (1, False, True)
    assert "bleu was not measured; measured were accuracy, f1" in call(*arguments, "--fail-if", "bleu < 9")[2]
    assert "is no condition" in call("eval", "nowhere", "--task", "classification", "--fail-if", "x")[2]


def test_eval_of_a_masked_language_model(call: Any, save_head: Callable[..., Path], texts: Path) -> None:
    arguments = ("eval", save_head("MaskedLM"), "--task", "fill-mask", "--data", texts, "--seed", 5)
    code, out, notes = call(*arguments, "--max-length", 8)
    assert code == 0
    assert re.search(r"pseudo_perplexity +\S +\d", out)
    assert re.search(r"accuracy +\S +[\d.]+ \S [\d.]+ to [\d.]+ +\S %", out)
    assert "tokens are masked, drawn with seed 5" in notes
    assert "of 40 texts are longer than the model or max_length takes, and are cut" in notes


def test_eval_of_a_language_model(call: Any, llama: Path, story: Path, traced: None) -> None:
    arguments = ("eval", llama, "--task", "text-generation", "--data", story, "--window", 16, "--windows", 2)
    code, out, _ = call(*arguments, "--joiner", r"\n", "--prompt", "the cat", "--new-tokens", 3, "--json")
    form = json.loads(out)
    assert (code, form["windows"], form["stride"], form["tokens_scored"]) == (0, 2, 16, 30)
    assert (form["joiner"], form["runtime"], form["samples"][0]["prompt"]) == ("\n", "Program", "the cat")
    code, _, err = call(*arguments, "--fail-if", "perplexity > 1")
    assert (code, "REGRESSION: perplexity is " in err) == (1, True)
    out = call(*arguments, "--stride", 4)[1]
    assert "2 windows of 16 tokens, stride 4, 19 tokens scored of" in out
    assert "as they are" in out
    out = call("eval", llama, "--task", "text-generation", "--prompt", "rain", "--new-tokens", 3)[1]
    assert "tokens a second" in out
    assert call("eval", llama, "--task", "text-generation")[0] == 2
    assert call("eval", llama, "--task", "text-generation", "--prompt", "rain", "--beams", 2)[0] == 2
    assert call("eval", llama, "--task", "sts-b")[0] == 2


def test_eval_of_two_models(
    call: Any, classifier: Path, llama: Path, story: Path, tmp_path: Path, traced: None
) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("sentence\tlabel\n" + "the cat\t1\nrain\t0\n" * 15)
    arguments = ("eval", classifier, "--task", "classification", "--data", data, "--compare", classifier)
    form = json.loads(call(*arguments, "--json")[1])
    assert form["accuracy"] == form["compare"]["accuracy"]
    low, high = form["intervals"]["accuracy"]
    assert low <= form["accuracy"] <= high
    assert form["differences"]["accuracy"]["verdict"] == "equal"
    assert re.search(r"accuracy +\S +[\d.]+ \S +[\d.]+ \S \+0.00 +\S 0.00 to 0.00 +\S equal +\S %", call(*arguments)[1])
    texts = ("eval", llama, "--task", "text-generation", "--compare", llama)
    out = call(*texts, "--data", story, "--window", 16, "--windows", 2)[1]
    assert re.search(r"95 % interval +\S [\d.]+ to [\d.]+", out)
    assert re.search(r"perplexity .* equal", out)
    code, _, notes = call(*texts, "--prompt", "rain")
    assert (code, "no figure to compare" in notes) == (2, True)


def test_quantize_takes_algorithm_and_formats(
    call: Any, llama: Path, story: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    arguments = ("quantize", llama, "--calibration", story, "--scheme", "W4A16-g16", "--samples", 2, "--max-length", 16)
    code, _, err = call(*arguments, "--algorithm", "rtn", "-o", tmp_path / "a", "--no-cache")
    assert (code, "passes: clean,quantize{scheme=W4A16-g16},rtn,lower-integer\n" in err) == (0, True)
    code, _, err = call(*arguments, "--algorithm", "gptk", "-o", tmp_path / "b")
    assert (code, "unknown algorithm 'gptk'; did you mean 'gptq'" in err) == (2, True)
    code, _, err = call(*arguments, "--format", "gptqv2", "-o", tmp_path / "b")
    assert (code, "unknown format 'gptqv2'; did you mean 'gptq-v2'" in err) == (2, True)


def test_an_output_that_is_not_named_is_called_after_model_and_scheme(
    call: Any, llama: Path, tmp_path: Path, backend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call("quantize", llama, "--scheme", "W4A16-g16", "--no-cache")
    name = f"{llama.name}-w4a16-g16".lower()
    assert (code, (tmp_path / name / "manifest.json").is_file()) == (0, True)
    assert f"the artifact goes to {name}\n" in err
    advice = "there are no calibration data, so weights are rounded to nearest; gptq costs less accuracy"
    assert advice in err
    assert advice in out
    assert "exists already" in call("quantize", llama, "--scheme", "W4A16-g16", "--no-cache")[2]


def test_a_plan_takes_the_line_of_quantize(call: Any, bert: Path, texts: Path, tmp_path: Path) -> None:
    line = (bert, "--calibration", texts, "--scheme", "W8A8", "--samples", 16, "-o", tmp_path / "out", "--seed", 3)
    code, out, _ = call("plan", *line, "--ignore", "pooler", "--cache", tmp_path / "cache", "--json")
    form = json.loads(out)
    assert code == 0
    assert not (tmp_path / "out").exists()
    assert "quantize{ignore=[pooler]}" in form["pipeline"]
    assert {t["bits"] for t in form["tensors"] if t["name"] == "pooler.dense.weight"} == {32}
    assert (tmp_path / "cache" / "traces").is_dir()


def test_a_plan_without_a_cache_keeps_nothing(
    call: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert call("plan", bert, "--no-cache", "-q")[0] == 0
    assert not (tmp_path / "home").exists()


def test_a_plan_of_a_recipe_refuses_what_the_recipe_says(call: Any, bert: Path, texts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {bert}}}\ncalibration: {{data: {texts.name}, samples: 16}}\n"
        "passes: [clean, quantize, calibrate, lower-integer]\nexport: [onnx-qdq]\n"
    )
    code, _, err = call("plan", recipe, "--scheme", "W8A8")
    assert (code, err) == (
        2, "error: --scheme is for a model; a recipe says it itself; leave it out, or edit the recipe\n"
    )  # fmt: skip
    assert call("plan", recipe, "--cache", tmp_path / "cache", "-o", tmp_path / "out", "-q")[0] == 0


def test_what_gptq_noticed_is_shown(
    call: Any, llama: Path, story: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    arguments = ("quantize", llama, "--calibration", story, "--scheme", "W4A16-g16", "--samples", 1, "--max-length", 8)
    code, _, err = call(*arguments, "-o", tmp_path / "a", "--no-cache")
    assert code == 0
    assert "self_attn.q_proj.weight: 8 calibration tokens are few for" in err


def test_verify_asks_the_backend(call: Any, tmp_path: Path, backend: SimpleNamespace) -> None:
    (tmp_path / "manifest.json").write_text('{"backend": "onnx-qdq"}')
    backend.replace(verify=lambda folder: backend.report({"outputs": {"x": {"worst": 1e-6}}}))
    code, out, _ = call("verify", tmp_path)
    assert (code, "outputs.x.worst" in out) == (0, True)

    def broken(folder: Path) -> None:
        raise CheckError("model.onnx was changed")

    backend.replace(verify=broken)
    assert call("verify", tmp_path)[::2] == (1, "error: model.onnx was changed\n")
    (tmp_path / "manifest.json").write_text('{"backend": "onnx-qda"}')
    assert "did you mean 'onnx-qdq'" in call("verify", tmp_path)[2]


def test_unexpected_faults_are_one_line_unless_debugged(
    call: Any, bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace
) -> None:
    def export(*_: Any, **__: Any) -> None:
        raise KeyError("lost")

    backend.replace(export=export)
    arguments = ("quantize", bert, "--calibration", texts, "-o", tmp_path / "out", "-q")
    code, _, err = call(*arguments)
    assert (code, err) == (1, "error: unexpected KeyError: 'lost'; run again with --debug for the traceback\n")
    assert "Traceback" in call(*arguments, "--debug")[2]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    backend.replace(export=interrupted)
    assert call(*arguments)[::2] == (130, "error: interrupted\n")
    assert not list(tmp_path.glob(".out*"))


def test_a_fault_in_a_pass_can_be_replayed(
    call: Any, bert: Path, texts: Path, tmp_path: Path, backend: SimpleNamespace, own_cache: Path
) -> None:
    from bitlower.passes.quantizers.calibrate import Calibrate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibrate, "run", lambda *_: 1 / 0)
        assert call("quantize", bert, "--calibration", texts, "-o", tmp_path / "out")[0] == 1
    code, out, _ = call("replay", own_cache / "reproducer")
    assert (code, out) == (0, "calibrate: this time it did not fail\n")
    assert call("replay", tmp_path)[0] == 2


def test_backends_are_the_folders() -> None:
    assert all((ROOT / "backends" / name.replace("-", "_")).exists() for name in known_backends())
