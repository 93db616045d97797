"""The parameters of `qat`: what presets say, the text form, and how long it trains."""

from __future__ import annotations

from dataclasses import replace

from bitlower.passes import format_pipeline, parse_pipeline
from bitlower.passes._machinery.losses import Losses
from bitlower.passes.training._optimizer import Rates
from bitlower.passes.training.qat import Qat

RATES = Rates((("weights", 1e-3), ("re:.*layer\\.0\\..*", 0.0)))


def test_presets_say_what_is_left_out():
    published = Qat(preset="bondarenko").settings
    assert (published.parametrization, published.gradient_scale, published.edge) == ("scale", "plain", "after-rounding")
    assert Qat(preset="bondarenko", parametrization="log").settings.parametrization == "log"
    assert [loss.name for loss in Qat(preset="quantgpt").objective.losses] == ["logits", "token-contrast"]
    assert [role for role, rate in Qat(preset="ranges").rates.rates if rate] == ["scales", "zero-points"]
    assert dict(Qat(preset="bondarenko", learning_rate=Rates((("norms", 0.0),))).rates.rates)["norms"] == 0


def test_parameters_print_and_parse():
    pass_ = Qat(losses=Losses.from_list(["logits", {"hidden": {"weight": 0.5}}]), learning_rate=RATES, epochs=2.0)
    assert parse_pipeline(format_pipeline([pass_])) == (pass_,)
    assert pass_.training_steps(7) == 14
    assert replace(pass_, accumulate=2).training_steps(7) == 14
    assert Qat(steps=5, accumulate=3).training_steps(7) == 15
    assert Qat(steps=250).training_evaluations(7) == 4
    assert Qat(steps=250, evaluate_every=25).training_evaluations(7) == 11
    assert Qat(epochs=2, evaluate_every=7).training_evaluations(7) == 3
