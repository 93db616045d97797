"""Schemes: names, long forms, roles, and one clear error for everything else."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec, ScaleConvention, Scheme
from bitlower.ir.quantization.foreign_names import FOREIGN_NAMES, nearest_scheme
from bitlower.ir.quantization.scheme import ACTIVATION_ROLES, FULL_PLACEMENT, LINEAR_PLACEMENT, WEIGHT_ROLES

NAMES = [
    "W8A8",
    "W4A16",
    "W4A16-g128",
    "W4A16-g128-e16",
    "W4A16-g128-e8",
    "W16A8",
    "W16A16",
    "W8A8-full",
    "W8A8-peg6",
    "W8A8-upeg6",
    "W8A8-upeg3-full",
    "W4A8-token",
    "W8A8-asym",
    "W8A8-tensor",
    "W8A8-e4",
    "W8A8-e16",
    "W4A8-g64-asym-token-e4-full",
    "W2A8-tensor-e2-full",
    "8-8-8",
    "2-2-8",
    "2-4-16",
    "16-2-8",
    "4-4-8-static",
]


def _specs():
    grids = st.builds(
        lambda bits, kind: Grid(bits, **kind),
        st.integers(2, 16),
        st.sampled_from(
            [
                {},
                {"restricted": True},
                {"signed": False},
                {"symmetric": False},
                {"signed": False, "symmetric": False},
                {"convention": ScaleConvention.HALF_RANGE},
                {"convention": ScaleConvention.HALF_RANGE_EPS, "restricted": True},
                {"signed": False, "convention": ScaleConvention.OFFSET},
            ]
        ),
    )
    size = st.integers(1, 256)
    granularities = st.one_of(
        st.just(Granularity.per_tensor()),
        st.integers(-2, 2).map(Granularity.per_channel),
        st.builds(Granularity.per_group, size, st.integers(-2, 2)),
        size.map(Granularity.row_group),
        st.just(Granularity.per_token()),
        st.just(Granularity.per_embedding()),
        size.map(Granularity.per_embedding_group),
    )
    return st.builds(QuantSpec, grids, granularities)


specs = _specs()
roles = st.sampled_from((*WEIGHT_ROLES, *ACTIVATION_ROLES))
schemes = st.builds(
    Scheme,
    st.none() | specs,
    st.none() | specs,
    st.none() | specs,
    st.lists(roles, unique=True).map(tuple),
    st.dictionaries(roles, st.none() | specs, max_size=3).map(lambda d: tuple(d.items())),
    st.none() | specs,
)


@given(specs)
def test_a_spec_survives_its_long_form(spec):
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@given(schemes)
def test_a_scheme_survives_its_long_form(scheme):
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@given(schemes)
def test_a_name_says_it_all_or_is_custom(scheme):
    assert scheme.name == "custom" or Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name):
    assert str(Scheme.parse(name)) == name
    assert Scheme.parse(Scheme.parse(name).name) == Scheme.parse(name)


@given(
    st.integers(2, 20),
    st.integers(2, 20),
    st.lists(st.sampled_from(["g32", "asym", "tensor", "token", "peg4", "e4", "e16", "full"]), unique=True, max_size=4),
)
def test_every_name_that_parses_has_an_equal_short_name(weight_bits, activation_bits, suffixes):
    try:
        scheme = Scheme.parse("-".join([f"W{weight_bits}A{activation_bits}", *suffixes]))
    except BitlowerError:
        return
    assert scheme.name != "custom"
    assert Scheme.parse(scheme.name) == scheme


def test_the_order_of_suffixes_does_not_matter():
    assert Scheme.parse("W8A8-e4-tensor") == Scheme.parse("W8A8-tensor-e4")
    assert Scheme.parse("W8A8-e4-tensor").embeddings == QuantSpec(Grid(4), Granularity.per_tensor())
    assert Scheme.parse("W4A8-full-token-asym-g64") == Scheme.parse("W4A8-g64-asym-token-full")


def test_case_does_not_matter():
    assert Scheme.parse(" w4a16-G128 ") == Scheme.parse("W4A16-g128")


def test_the_default_is_w8a8():
    assert Scheme() == Scheme.parse("W8A8") == Scheme.from_dict({})
    assert Scheme().roles == LINEAR_PLACEMENT


def test_what_the_roles_of_w8a8_get():
    scheme = Scheme.parse("W8A8-full")
    weight = QuantSpec(Grid(8), Granularity.per_channel(0))
    activation = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())
    assert scheme.spec("linear-weight") == scheme.spec("embedding-table") == weight
    assert scheme.spec("norm-weight") == QuantSpec(Grid(8), Granularity.per_tensor())
    assert {scheme.spec(role) for role in ACTIVATION_ROLES if not role.endswith("-input")} == {activation}
    assert scheme.spec("linear-input") is None
    assert Scheme().spec("linear-input") == activation
    assert Scheme().spec("residual") is None
    implied = {"linear-input", "position-table", "convolution-weight", "convolution-input"}
    assert set(FULL_PLACEMENT) == {*WEIGHT_ROLES, *ACTIVATION_ROLES} - implied


def test_what_suffixes_change():
    assert Scheme.parse("W4A16-g128").weights.granularity == Granularity.per_group(128)
    assert Scheme.parse("W4A16-g128").activations is None
    assert Scheme.parse("W4A16-g128").embeddings is None
    assert Scheme.parse("W16A8").spec("linear-weight") is None
    assert Scheme.parse("W4A8-token").activations.granularity.dynamic
    assert Scheme.parse("W8A8-peg6").activations.granularity == Granularity.per_embedding_group(6)
    assert Scheme.parse("W8A8-e4").spec("embedding-table").grid == Grid(4)
    assert Scheme.parse("W8A8-asym").weights.grid == Grid(8, signed=False, symmetric=False)
    tensor = Scheme.parse("W8A8-tensor")
    assert tensor.weights.granularity == tensor.embeddings.granularity == Granularity.per_tensor()


def test_what_the_roles_of_quantgpt_get():
    """W-E-A: linears one scale, tables one a row, codes as far down as up; position tables, norms and biases float."""
    scheme = Scheme.parse("2-4-8")
    assert scheme.spec("linear-weight") == QuantSpec(Grid(2, restricted=True), Granularity.per_tensor())
    assert (
        scheme.spec("embedding-table") == scheme.head == QuantSpec(Grid(4, restricted=True), Granularity.per_channel(0))
    )
    assert scheme.spec("position-table") is scheme.spec("norm-weight") is None
    dynamic = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_token())
    assert scheme.spec("linear-input") == dynamic
    assert Scheme.parse("2-4-8-static").spec("linear-input") == Scheme().spec("linear-input")
    assert Scheme.parse("2-4-8-STATIC") == Scheme.parse(" 2-4-8-static ")
    assert Scheme.parse("2-4-16").spec("linear-input") is Scheme.parse("16-4-8").spec("linear-weight") is None
    assert Scheme.parse("2-16-8").spec("embedding-table") is Scheme.parse("2-16-8").head is None


def test_position_tables_go_with_the_others_unless_they_are_named():
    for scheme in (Scheme(), Scheme.parse("W8A8-e4"), Scheme.parse("W4A16"), Scheme.parse("W8A8-full")):
        assert scheme.spec("position-table") == scheme.spec("embedding-table")
    four, none = QuantSpec(Grid(4), Granularity.per_channel(0)), Scheme(roles=("linear-weight",))
    assert Scheme(overrides=(("embedding-table", four),)).spec("position-table") == four
    assert Scheme(overrides=(("position-table", four),)).spec("embedding-table") == Scheme().embeddings
    assert none.spec("position-table") is None
    assert Scheme(roles=("position-table",)).spec("position-table") == Scheme().embeddings
    assert Scheme(roles=("position-table",)).spec("embedding-table") is None


def test_convolutions_go_with_linears_unless_they_are_named():
    for scheme in map(Scheme.parse, ("W8A8", "W4A16", "W8A8-full", "2-2-8")):
        for part in ("weight", "input"):
            assert scheme.spec(f"convolution-{part}") == scheme.spec(f"linear-{part}")
    four = QuantSpec(Grid(4), Granularity.per_channel(0))
    assert Scheme(overrides=(("linear-weight", four),)).spec("convolution-weight") == four
    assert Scheme(overrides=(("convolution-weight", four),)).spec("linear-weight") == Scheme().weights
    assert Scheme(roles=("convolution-input",)).spec("linear-input") is None
    assert Scheme(roles=("convolution-input",)).spec("convolution-input") == Scheme().activations
    assert Scheme.parse("W8A8-peg6").spec("convolution-input") == Scheme().activations


def test_large_heads_have_8_bits_beside_float_activations_unless_the_tables_are_named():
    eight = QuantSpec(Grid(8), Granularity.per_channel(0))
    assert Scheme.parse("W4A16-g128").head == Scheme.parse("W2A16-tensor").head == eight
    assert Scheme.parse("W4A16").spec("embedding-table") is None
    assert Scheme.parse("W4A16-e16").head is None
    assert Scheme.parse("W4A16-e4").head.grid.bits == Scheme.parse("W8A8-e4").head.grid.bits == 4
    assert Scheme.parse("W8A8").head == eight
    assert [Scheme.parse(name).head for name in ("W8A8-e16", "W16A8", "W16A16")] == [None] * 3
    assert Scheme.from_dict({"activations": None, "embeddings": None}).head is None
    assert Scheme.from_dict(Scheme.parse("W4A16").to_dict() | {"overrides": {"embedding-table": None}}).head is None
    assert Scheme.from_dict(Scheme.parse("W4A16").to_dict() | {"roles": ["linear-weight"]}).head is None


def test_an_override_wins_even_with_nothing():
    wide = QuantSpec(Grid(16, signed=False, symmetric=False), Granularity.per_tensor())
    scheme = Scheme(overrides=(("residual", wide), ("linear-input", None)))
    assert scheme.spec("residual") == wide
    assert scheme.spec("linear-input") is None
    assert scheme.name == "custom"


def test_the_long_form_uses_the_names_of_compressed_tensors():
    spec = QuantSpec(Grid(4), Granularity.per_group(128))
    assert spec.to_dict() == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "dynamic": False,
        "group_size": 128,
        "axis": -1,
    }
    assert QuantSpec.from_dict({"num_bits": 4, "strategy": "group", "group_size": 128}) == spec
    assert QuantSpec.from_dict({"num_bits": 8, "strategy": "tensor", "group_size": None}) == QuantSpec(
        Grid(8), Granularity.per_tensor()
    )
    assert QuantSpec.from_dict({"strategy": "token"}).granularity == Granularity.per_token()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("integer", "is not a scheme; examples: W8A8"),
        ("int8", r"is not a scheme; did you mean W8A8 \(static activations\)"),
        ("Q4-K-M", "did you mean W4A16-g32-asym"),
        ("", "is not a scheme"),
        ("W8", "is not a scheme"),
        ("W8A8-", "is not a scheme"),
        ("W1A8", "2 to 16 bits, not 1"),
        ("W8A0", "2 to 16 bits, not 0"),
        ("W8A8-g", "'g' does not fit"),
        ("W8A8-g0", "'g0' does not fit"),
        ("W8A8-pge6", "'pge6' does not fit; known suffixes"),
        ("W8A16-token", "'token' does not fit"),
        ("W16A8-g128", "'g128' does not fit"),
        ("W8A8-full2", "'full2' does not fit"),
        ("W8A8-g64-g128", "two suffixes for one thing"),
        ("W8A8-g64-tensor", "two suffixes for one thing"),
        ("W8A8-token-peg6", "two suffixes for one thing"),
        ("W8A8-e1", "2 to 16 bits, not 1"),
        ("2-2", "is not a scheme"),
        ("2-1-8", "2 to 16 bits, not 1"),
        ("2-2-8-token", "is not a scheme"),
        ("2-2-8" + "8" * 100, "is not a scheme"),
    ],
)
def test_other_names_are_errors(name, words):
    with pytest.raises(BitlowerError, match=words):
        Scheme.parse(name)


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_names_of_other_tools_lead_to_schemes(name):
    meant = re.findall(r"\bW\d+A\d+[\w-]*", nearest_scheme(name.upper().replace("_", "-")))
    assert meant
    for scheme in meant:
        assert str(Scheme.parse(scheme)) == scheme


WRITTEN = r"W\d{1,2}A\d{1,2}(-[a-z]{1,6}\d{0,2}){0,3}|\d{1,2}-\d{1,2}-\d{1,2}(-static)?"


@given(st.text(max_size=20) | st.from_regex(WRITTEN, fullmatch=True))
def test_parse_fails_only_with_its_own_error(name):
    try:
        scheme = Scheme.parse(name)
    except BitlowerError:
        return
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"bits": 8}, "unknown quantization argument 'bits'; did you mean 'num_bits'"),
        ({1: 8}, "unknown quantization argument 1"),
        ({"num_bits": "8"}, "'num_bits' is of type int, not '8'"),
        ({"num_bits": 8.5}, "'num_bits' is of type int"),
        ({"num_bits": True}, "'num_bits' is of type int"),
        ({"num_bits": 32}, "2 to 16 bits"),
        ({"symmetric": "false"}, "'symmetric' is of type bool"),
        ({"symmetric": 1}, "'symmetric' is of type bool"),
        ({"type": "float"}, "unknown type 'float'"),
        ({"type": 8}, "'type' is of type str"),
        ({"strategy": "chanel"}, "unknown strategy 'chanel'; did you mean 'channel'"),
        ({"strategy": ["tensor"]}, "'strategy' is of type str"),
        ({"strategy": "group"}, "size of at least 1"),
        ({"strategy": "group", "group_size": -1}, "group_size of at least 1"),
        ({"strategy": "row_group", "num_groups": 0}, "num_groups of at least 1"),
        (
            {"strategy": "embedding_group", "group_size": 6},
            "takes num_groups, the number.*write num_groups: 6",
        ),
        ({"strategy": "tensor", "num_groups": 6}, "takes no num_groups"),
        ({"strategy": "group", "group_size": 8, "num_groups": 6}, "takes no num_groups"),
        ({"strategy": "group", "group_size": "128"}, "'group_size' is of type int"),
        ({"strategy": "tensor", "group_size": 128}, "takes no group_size"),
        ({"strategy": "tensor", "axis": 1}, "takes no axis"),
        ({"strategy": "channel", "axis": "out"}, "'axis' is of type int"),
        ({"strategy": "tensor", "dynamic": True}, "not supported; per-token scales"),
        ({"strategy": "token", "dynamic": False}, "not supported"),
        ({"scale_convention": "absmax"}, "unknown scale_convention 'absmax'; .*half-range"),
        ({"restricted": True, "type": "uint"}, "restricted"),
        ("int8", "not a mapping"),
        (8, "not a mapping"),
    ],
    ids=str,
)
def test_bad_values_are_named(form, words):
    with pytest.raises(BitlowerError, match=words):
        QuantSpec.from_dict(form)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"weight": {}}, "unknown scheme key 'weight'; did you mean 'weights'"),
        ({"weights": "int8"}, "not a mapping"),
        ({"weights": {"bits": 4}}, "unknown quantization argument 'bits'"),
        ({"roles": "linear-weight"}, "list of names"),
        ({"roles": ["residuals"]}, "unknown role 'residuals'; did you mean 'residual'"),
        ({"overrides": {"residuals": None}}, "unknown role 'residuals'"),
        ({"overrides": ["residual"]}, "not a mapping"),
        (["W8A8"], "not a mapping"),
    ],
    ids=str,
)
def test_bad_schemes_are_named(form, words):
    with pytest.raises(BitlowerError, match=words):
        Scheme.from_dict(form)


@pytest.mark.parametrize("name", ["W8A8-peg6-full", "W8A8-upeg6-full"])
def test_roles_without_an_embedding_axis_are_per_tensor(name):
    scheme = Scheme.parse(name)
    kinds = {role: spec.granularity.kind for role in ACTIVATION_ROLES if (spec := scheme.spec(role))}
    assert {role for role, kind in kinds.items() if kind == "tensor"} == {"scores", "probs", "context", "logits"}
    assert set(kinds.values()) == {"tensor", scheme.activations.granularity.kind}


def test_chosen_groups_have_a_long_form_and_are_for_activations():
    form = {"num_bits": 8, "type": "uint", "symmetric": False, "strategy": "embedding_parts", "num_groups": 6}
    spec = QuantSpec.from_dict(form)
    assert spec.granularity == Granularity.per_embedding_parts(6)
    assert spec == Scheme.parse("W8A8-upeg6").activations
    for broken in ({"weights": form}, {"embeddings": form}, {"overrides": {"linear-weight": form}}):
        with pytest.raises(BitlowerError, match="is for activations, not for weights"):
            Scheme.from_dict(broken)
    with pytest.raises(BitlowerError, match="two suffixes for one thing"):
        Scheme.parse("W8A8-peg6-upeg6")


@pytest.mark.parametrize("text", ["W8A8" + "-g1" * 50_000, "W" + "9" * 5000 + "A8", "W8A8-" + "a" * 100_000])
def test_names_of_any_length_are_refused_at_once(text):
    with pytest.raises(BitlowerError, match="is not a scheme") as refusal:
        Scheme.parse(text)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "form",
    [
        {"weights": {"num_bits": 10**90}},
        {"weights": {"strategy": "group", "group_size": 10**90}},
        {"weights": {"type": "x" * 10**6}},
        {"y" * 10**6: 1},
        {"roles": "z" * 10**6},
        {"roles": ["z" * 10**6]},
        {"overrides": [0] * 10**6},
    ],
)
def test_values_in_messages_are_cut(form):
    with pytest.raises(BitlowerError) as refusal:
        Scheme.from_dict(form)
    assert len(str(refusal.value)) < 700
