"""Figures and a report of runs: `python -m hgnn_moe_jax.analysis RUN [RUN ...]`.

Writes RUN/analysis/report.html and its figures; opens nothing. What a report has to leave out is
told there and on stderr. A run that cannot be read does not keep the others from being done: the
command tells it and ends with status 2.
"""

import pathlib
import sys

from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.analysis.runs import read_run
from hgnn_moe_jax.errors import UserError


def main() -> None:
  """The command."""
  baseline = flags.DEFINE_string("baseline", None, "Folder of a run to compare with.")

  def run(argv: list[str]) -> None:
    if len(argv) < 2:
      raise UserError("give the folder of a run: python -m hgnn_moe_jax.analysis runs/quickstart")
    from hgnn_moe_jax.analysis.analyze import analyze  # Figures need matplotlib, an extra.

    cli.keep_compiled()
    other = None if baseline.value is None else read_run(pathlib.Path(baseline.value))
    status = 0
    for folder in map(pathlib.Path, argv[1:]):
      try:
        read = read_run(folder)
        report = analyze(read, folder / "analysis", other)
      except UserError as error:
        _tell("error", str(error))
        status = error.exit_status
        continue
      for reason in report.left_out:
        _tell("left out", f"{folder}: {reason}")
      print(report.path)
    sys.exit(status)

  cli.start(run)


def _tell(kind: str, text: str) -> None:
  """One line on stderr."""
  print(f"{kind}:", *text.split(), file=sys.stderr)


if __name__ == "__main__":
  main()
