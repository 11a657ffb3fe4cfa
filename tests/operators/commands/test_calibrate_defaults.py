"""What ``calibrate`` does where nothing is said."""

import typer

from operators import __main__ as cli
from operators.tune.calibration_spec import CalibrationSpec


def test_the_defaults_of_calibrate_are_those_of_a_calibration():
    spec = CalibrationSpec(words=("gate",), prompts=("The",))
    command = typer.main.get_command(cli.app).commands["calibrate"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    for name in ("kl_budget", "max_perplexity_ratio", "min_distinct_ratio", "tokens"):
        assert defaults[name] == getattr(spec, name), name
