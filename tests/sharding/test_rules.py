import copy
import pickle

import pytest
from jax.sharding import PartitionSpec as P

from jdml.sharding import Rules, Without, make_mesh, presets, specs
from jdml.sharding.rules import infer_fsdp


def test_names_axes_tuples_and_none():
    rules = Rules(batch=("data", "fsdp"), embed="fsdp", mlp="model", layers=None)
    assert rules.spec(("batch", None)) == P(("data", "fsdp"), None)
    assert rules.spec(("layers", "embed", "mlp")) == P(None, "fsdp", "model")
    assert rules.spec(()) == P()
    assert rules.spec((("embed", "mlp"), "layers")) == P(("fsdp", "model"), None)
    assert rules.spec((P.UNCONSTRAINED, "mlp")) == P(P.UNCONSTRAINED, "model")


def test_first_match_wins():
    rules = Rules(("embed", "model"), ("embed", "data"), embed="fsdp", mlp="data")
    assert rules.spec(("embed", "mlp")) == P("model", "data")
    assert rules.replace(embed="fsdp").spec(("embed",)) == P("fsdp")
    assert Rules(embed="fsdp").replace(embed="model") == Rules(embed="model")


def test_a_rule_goes_before_the_mesh_axis_of_that_name():
    assert Rules(model="data").spec(("model",), ("data", "model")) == P("data")
    assert Rules().spec(("model",), ("data", "model")) == P("model")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown logical name 'mpl'.*\['embed', 'mlp'\].*mpl="):
        Rules(embed="fsdp", mlp="model").spec(("embed", "mpl"))


@pytest.mark.parametrize("names", [("embed", "mlp"), ("embed", ("batch", "mlp"))])
def test_axis_used_twice(names):
    rules = Rules(embed="model", mlp="model", batch="data")
    with pytest.raises(ValueError, match="'model' is used twice, by dim 0 and dim 1"):
        rules.spec(names)


@pytest.mark.parametrize("axis", [3, ("data", 3), {"data"}, ("data", "data")])
def test_bad_axes(axis):
    with pytest.raises(ValueError, match="'embed'"):
        Rules(embed=axis)


def test_bad_pairs_policies_and_patterns():
    with pytest.raises(ValueError, match="expected pairs"):
        Rules("embed")
    with pytest.raises(ValueError, match="on_indivisible must be one of"):
        Rules(on_indivisible="drop")
    with pytest.raises(ValueError, match="no regular expression"):
        Rules().for_paths({"(": None})
    with pytest.raises(ValueError, match=r"write \('embed',\)"):
        Rules().for_paths({"kernel": "embed"})


def test_activations_have_entries_of_their_own():
    rules = Rules(batch="data", embed="fsdp").for_activations(embed=None, seq="model")
    assert rules.spec(("embed",)) == P("fsdp")
    with pytest.raises(ValueError, match="unknown logical name 'seq'"):
        rules.spec(("seq",))
    assert rules.activations.spec(("batch", "seq", "embed")) == P("data", "model", None)
    assert rules.replace(embed="model").activations.spec(("embed",)) == P("model")


@pytest.mark.parametrize(
    ("seq", "wanted"),
    [
        (None, P("data", None, "model")),
        ("model", P("data", None, "model")),
        ("seq", P("data", "seq", "model")),
        (("seq", "model"), P("data", "seq", "model")),
    ],
)
def test_the_axes_of_a_name_without_those_of_another(seq, wanted):
    rules = presets.tensor().for_activations(seq=seq).activations
    assert rules.spec(("batch", Without("seq", "mlp"), "mlp")) == wanted
    assert rules.spec(("batch", Without("seq", "mlp"), "embed")) == P(*wanted[:2], None)
    with pytest.raises(ValueError, match="unknown logical name 'mpl'"):
        rules.spec((Without("seq", "mpl"),))


def test_frozen_hashable_and_picklable():
    rules = Rules(embed="fsdp").for_paths({"kernel": ("embed",)}).infer_fsdp("data", 4)
    same = Rules(embed="fsdp").for_paths({"kernel": ("embed",)}).infer_fsdp("data", 4)
    assert rules == same
    assert hash(rules) == hash(same)
    assert rules != Rules(embed="fsdp")
    assert rules != same.for_activations(embed=None)
    assert pickle.loads(pickle.dumps(rules)) == copy.deepcopy(rules) == rules
    with pytest.raises(AttributeError):
        rules.table = ()


def test_repr_shows_all_of_it():
    rules = Rules(embed="fsdp", on_indivisible="pad").for_activations(embed=None)
    assert repr(rules) == ("Rules(embed='fsdp', on_indivisible='pad').for_activations(embed=None)")
    assert "infer_fsdp(axis='data', min_size=8)" in repr(infer_fsdp(8, "data"))


WEIGHT = ("layers", "embed", "mlp")
ACTIVATION = ("batch", "seq", "embed")


@pytest.mark.parametrize(
    ("rules", "weight", "activation"),
    [
        (presets.data_parallel(), P(None, None, None), P("data", None, None)),
        (presets.fsdp(), P(None, "fsdp", None), P(("data", "fsdp"), None, None)),
        (presets.fsdp(data=None), P(None, "fsdp", None), P("fsdp", None, None)),
        (presets.tensor(), P(None, None, "model"), P("data", None, None)),
        (presets.fsdp_tensor(), P(None, "fsdp", "model"), P(("data", "fsdp"), None, None)),
        (
            presets.sequence_parallel(presets.tensor()),
            P(None, None, "model"),
            P("data", "model", None),
        ),
        (
            presets.fsdp_tensor(("slice", "data"), "fsdp", None),
            P(None, "fsdp", None),
            P(("slice", "data", "fsdp"), None, None),
        ),
    ],
)
def test_presets(rules, weight, activation):
    assert rules.spec(WEIGHT) == weight
    assert rules.activations.spec(ACTIVATION) == activation


def test_specs_refuses_explicit_axes():
    import jax

    mesh = jax.sharding.Mesh(jax.devices(), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="Auto axes"):
        specs({}, mesh, Rules())
    assert specs({}, make_mesh({"data": 8}), Rules()) == {}
