"""A checkpoint, its Program and its client at sizes that nothing had before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bitlower.backends.checkpoint import export, verify
from bitlower.backends.checkpoint.verify import client
from bitlower.backends.checkpoint.verify.record import Verification
from bitlower.ir import CheckError, Program

Lowered = Callable[..., Program]
Batches = list[dict[str, torch.Tensor]]
aten = torch.ops.aten
AT = r"at batch 3, sequence 7, which tracing and calibration did not have: "
FAILS = r"^the program itself fails at batch 3, sequence 7, which tracing and calibration did not have: "


@pytest.fixture
def program(lowered: Lowered) -> Program:
    return lowered("llama", "W4A16-g32")


def with_last(program: Program, make: Callable[[torch.fx.Graph, torch.fx.Node], torch.fx.Node]) -> Program:
    """``program`` with what ``make`` makes of its logits in their place."""
    output = program.graph.output_node()
    logits, *others = output.args[0]  # type: ignore[misc]
    with program.graph.inserting_before(output):
        changed = make(program.graph, logits)
    for node in program.graph.nodes:
        node.meta = node.meta or dict(logits.meta)
    output.args = ((changed, *others),)
    program.recompile()
    return program


def by_number(graph: torch.fx.Graph, logits: torch.fx.Node) -> torch.fx.Node:
    """The logits times the number of tokens over 9."""
    count = graph.call_function(
        aten.sum.dim_IntList, (graph.call_function(aten.ones_like.default, (logits,)), [1], True)
    )
    return graph.call_function(aten.mul.Tensor, (logits, graph.call_function(aten.div.Scalar, (count, 9))))


def test_a_program_that_has_the_sizes_of_its_batches_baked_in_is_refused(
    program: Program, prompts: Batches, tmp_path: Path
) -> None:
    """All batches have two rows of nine tokens."""
    wrong = with_last(program, lambda graph, logits: graph.call_function(aten.view.default, (logits, [2, 9, 96])))
    with pytest.raises(CheckError, match=FAILS + r"shape '\[2, 9, 96\]'"):
        export(wrong, tmp_path, batches=prompts)
    assert not (tmp_path / "verification.json").exists()


def test_a_constant_that_was_a_size_is_found_where_every_shape_is_right(
    program: Program, prompts: Batches, tmp_path: Path
) -> None:
    wrong = with_last(program, by_number)
    with pytest.raises(
        CheckError, match=f"^{AT}with the weights of the file, Hugging Face's model gives a logits that is"
    ):
        export(wrong, tmp_path, batches=prompts)


class Wrong(torch.nn.Module):
    """A client that computes something else where there are not nine tokens, or does not run there."""

    def __init__(self, model: Any, *, fails: bool) -> None:
        super().__init__()
        self.model, self.config, self.fails = model, model.config, fails

    def forward(self, **batch: Any) -> Mapping[str, torch.Tensor]:
        right = batch["input_ids"].shape[1] == 9
        if self.fails and not right:
            raise ValueError("nine tokens are needed")
        logits = self.model(**batch)["logits"]
        return {"logits": logits if right else logits.roll(1, -1)}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``spoil(fails=…)``: let clients that are loaded from now on be wrong."""
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("accelerate")
    load = client._load

    def change(*, fails: bool) -> None:
        monkeypatch.setattr(client, "_load", lambda *given: Wrong(load(*given), fails=fails))

    return change


CLIENTS = [
    (False, "transformers loads the checkpoint and gives a logits that is"),
    (True, "transformers cannot run this"),
]


@pytest.mark.parametrize(("fails", "message"), CLIENTS)
def test_a_client_that_is_right_at_the_sizes_of_the_batches_alone_is_refused(
    program: Program, prompts: Batches, tmp_path: Path, spoil: Callable[..., None], fails: bool, message: str
) -> None:
    spoil(fails=fails)
    with pytest.raises(CheckError, match=f"^{AT}{message}"):
        export(program, tmp_path, batches=prompts)


def test_verify_runs_the_client_at_other_sizes(
    program: Program, prompts: Batches, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    summary = export(program, tmp_path, batches=prompts).verification.summary()
    assert (summary["unseen_sizes"], summary["client"]) == ("batch 3, sequence 7", "transformers")
    report = verify(tmp_path).to_dict()
    assert (report["unseen_sizes"], report["client"]) == ("batch 3, sequence 7", "transformers")
    assert report["unseen"] == {"logits": pytest.approx(1, abs=1e-5)}
    json.dumps(report)
    for fails, message in ((False, "the output logits has the cosine"), (True, "transformers cannot run this")):
        spoil(fails=fails)
        with pytest.raises(CheckError, match=f"^{AT}{message}"):
            verify(tmp_path)


def test_what_no_client_read_is_kept_for_one_that_does(lowered: Lowered, prompts: Batches, tmp_path: Path) -> None:
    """Of a format whose reader is not here: the outputs that are recorded are the Program's."""
    program = lowered("llama", "W4A16-g32")
    export(program, tmp_path, batches=prompts, format="gptq-v2")
    unseen = Verification.read(tmp_path).unseen
    cosines = unseen.check(lambda batch: {"logits": program(**batch)["logits"].detach().numpy()})
    assert cosines["logits"] == pytest.approx(1, abs=1e-4)
    report = verify(tmp_path)
    assert (report.client, report.unseen) == ("not run: gptqmodel is not installed", {})
    assert report.unseen_sizes == "batch 3, sequence 7"


def test_the_ends_of_texts_that_are_padded_before_are_run(program: Program, prompts: Batches, tmp_path: Path) -> None:
    """What remained of their beginnings would be padding alone, which nobody looks at."""
    ids = prompts[0]["input_ids"].repeat(1, 3)
    mask = torch.ones_like(ids)
    mask[:, :20] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    recorded = export(program, tmp_path, batches=[batch]).verification.unseen.selftest
    assert recorded is not None
    assert bool(recorded.inputs["attention_mask"].tensor().all())
    assert torch.equal(recorded.inputs["input_ids"].tensor(), ids[[0, 1, 0], -7:])
