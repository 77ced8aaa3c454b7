"""The settings of a run: every field is checked before anything is written."""

import json

import pytest
from support.messages import refused
from support.tiny import tiny_config

from capibara_eqx.train import RunConfig, setting_types


TYPES = setting_types()
INTEGERS = [name for name, kinds in TYPES.items() if int in kinds]
NUMBERS = [name for name, kinds in TYPES.items() if float in kinds]


def changed(name, value) -> RunConfig:
    """A small run with one setting changed."""
    return tiny_config(**{"text": "folder", name: value})


def test_every_field_survives_json():
    config = tiny_config(
        dropout=0.1, remat="full", dt_rank=3, clip_norm=None, implementation="xla"
    )
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 0},
        {"seed": 2**32 - 1},
        {"implementation": None},
        {"implementation": "reference"},
        {"weight_decay": 0.0},
        {"dt_init_floor": 0.0},
        {"b1": 0.0},
        {"dropout": 1.0},
        {"text": "folder", "pattern": "*.md"},
    ],
    ids=str,
)
def test_the_ends_of_a_range_are_in_it(changes):
    assert tiny_config(**changes).to_dict().items() >= changes.items()


@pytest.mark.errors
class TestErrors:
    @pytest.mark.parametrize("value", [-1, 4.5, True, "4", float("nan")], ids=str)
    @pytest.mark.parametrize("name", INTEGERS)
    def test_integers(self, name, value):
        with refused(f"`{name}` must", str(value)):
            changed(name, value)

    @pytest.mark.parametrize("name", sorted(set(INTEGERS) - {"seed"}))
    def test_sizes(self, name):
        with refused(f"`{name}` must", "positive", "got 0."):
            changed(name, 0)

    @pytest.mark.parametrize(
        "value", [-1.0, float("nan"), float("inf"), 1e39, False, "0.1"], ids=str
    )
    @pytest.mark.parametrize("name", NUMBERS)
    def test_numbers(self, name, value):
        with refused(f"`{name}` must", str(value)):
            changed(name, value)

    @pytest.mark.parametrize("name", ["b1", "b2"])
    def test_decays_below_one(self, name):
        for value in (2.0, 1.0):
            with refused(f"`{name}` must be 0 or greater and below 1", str(value)):
                changed(name, value)
        # As a float32 it is 1, and Adam would divide by zero.
        with refused(f"`{name}`", "below 1", "which is 1 in float32"):
            changed(name, 0.9999999999)

    def test_an_epsilon_that_arrays_hold_as_zero(self):
        for value in (0.0, 1e-40):
            with refused("`eps` must be positive", str(value), "1e-8"):
                changed("eps", value)

    @pytest.mark.parametrize(
        ("name", "value", "fix"),
        [
            ("clip_norm", 0.0, "none on the command line"),
            ("weight_decay", -1, "0 does not decay"),
            ("dt_init_floor", -1, "0 sets no floor"),
            ("warmup_fraction", 100, "not a number of steps"),
            ("accumulation", 0, "1 does not cut"),
            ("accumulation", 3, "divisor"),
            ("checkpoint_every", 0, "saves only the end"),
            ("heldout_fraction", 4, "one byte of 25"),
        ],
    )
    def test_the_likely_fix(self, name, value, fix):
        with refused(f"`{name}`", str(value), fix):
            changed(name, value)

    @pytest.mark.parametrize("value", ["foo", "4.5", 0, -3])
    def test_dt_rank(self, value):
        with refused("`dt_rank`", "'auto' or a positive integer", repr(value)):
            changed("dt_rank", value)

    @pytest.mark.parametrize("value", [-1, 2**32])
    def test_seed(self, value):
        with refused("`seed` must lie between 0 and 4294967295", str(value)):
            changed("seed", value)

    def test_implementation(self):
        with refused("`implementation`", "'reference'", "Did you mean 'xla'?"):
            changed("implementation", "xlaa")

    def test_both_bounds(self):
        with refused("exactly one", "steps=3", "seconds=4"):
            tiny_config(steps=3, seconds=4.0)

    def test_a_pattern_without_a_folder(self):
        with refused("`pattern`", "'*.md'", "`text`", "--text FOLDER"):
            tiny_config(pattern="*.md")

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("text", 3, "text or None"),
            ("pattern", None, "text"),
            ("bias", 1, "true or false"),
            ("scan", "yes", "true or false"),
            ("activation", 3, "text"),
            ("d_model", None, "an integer"),
            ("clip_norm", [1], "a number or None"),
        ],
    )
    def test_from_dict_of_mistyped_values(self, name, value, expected):
        values = tiny_config().to_dict() | {name: value}
        came = f"{value!r} ({type(value).__name__})"
        with refused(f"`{name}` must be {expected}", came):
            RunConfig.from_dict(values)

    def test_from_dict_of_a_value_out_of_range(self):
        with refused("`d_model`", "-4"):
            RunConfig.from_dict(tiny_config().to_dict() | {"d_model": -4})

    @pytest.mark.parametrize("values", [[], None, "text", 3], ids=str)
    def test_from_dict_of_no_object(self, values):
        with refused("object", repr(values), type(values).__name__):
            RunConfig.from_dict(values)

    def test_from_dict_of_unknown_fields(self):
        with refused("Unknown setting 'stepz'", "Did you mean 'steps'"):
            RunConfig.from_dict({"stepz": 4})

    @pytest.mark.parametrize("name", TYPES)
    def test_from_dict_without_a_field(self, name):
        values = tiny_config().to_dict()
        del values[name]
        with refused("missing", f" {name}.", str(len(values))):
            RunConfig.from_dict(values)
