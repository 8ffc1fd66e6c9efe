"""Figures and a report of runs: `python -m hgnn_moe_jax.analysis RUN [RUN ...]`.

Writes RUN/analysis/report.html and its figures; opens nothing.
"""

from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.analysis import analyze_adaptive_orthogonality
from hgnn_moe_jax.errors import UserError


def main() -> None:
  """The command."""
  baseline = flags.DEFINE_string("baseline", None, "Folder of a run to compare with.")

  def run(argv: list[str]) -> None:
    if len(argv) < 2:
      raise UserError("give the folder of a run: python -m hgnn_moe_jax.analysis runs/quickstart")
    for folder in argv[1:]:
      print(analyze_adaptive_orthogonality(folder, baseline=baseline.value))

  cli.start(run)


if __name__ == "__main__":
  main()
