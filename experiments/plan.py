"""Plan a run without training: rounds, H, communication, parameters, memory and hours.

Takes the flags of experiments.train. Reads one example of the dataset and runs no model, unless
--audit is given, or hours are asked for without --step_ms.
"""

import json
from typing import Any

from absl import flags
from absl.flags import FLAGS

from experiments.building.config import Config
from experiments.building.job import build_plan
from experiments.launching.command_line import config_help, define_flags, from_flags, run_command
from experiments.launching.starting import start
from experiments.planning import options
from experiments.planning.auditing import audited
from experiments.planning.figures import plan_figures
from experiments.planning.hours import plan_hours
from experiments.planning.tables import show_plan
from experiments.running.recording import finite
from jaxlocal.errors import unknown

FORMATS = ("text", "json")


def plan(config: Config, hours: options.Options, audit: bool = False) -> dict[str, Any]:
    """All figures of a plan: of the run, of its hours, and of its audit if it is asked for."""
    built = build_plan(config)
    figures = plan_figures(built) | plan_hours(built, hours)
    return figures | ({"audit": audited(built)} if audit else {})


def main() -> int:
    """Print the plan of the run that the flags describe; returns the exit status."""
    config, hours, output = from_flags(FLAGS), options.from_flags(FLAGS), FLAGS.format
    if output not in FORMATS:
        raise unknown("format", output, FORMATS)
    start([config])
    figures = plan(config, hours, FLAGS.audit)
    print(json.dumps(finite(figures), indent=2)) if output == "json" else show_plan(figures)
    return 0


def define_plan_flags(values: flags.FlagValues = FLAGS) -> None:
    """Register the flags of this command."""
    flags.DEFINE_string("format", "text", "Format of the plan: text or json.", flag_values=values)
    flags.DEFINE_boolean(
        "audit",
        False,
        "Compile a round, and print what it sends between this machine's devices.",
        flag_values=values,
    )
    options.define_flags(values)


if __name__ == "__main__":
    define_flags()
    define_plan_flags()
    flags.adopt_module_key_flags(options)
    run_command(main, config_help(__doc__))
