"""What run folders say: figures, a report, comparisons. Nothing here is needed to train."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

# Imports wait until they are needed: figures need matplotlib, which is an extra.


def analyze_adaptive_orthogonality(
  run: str | pathlib.Path,
  output_dir: str | pathlib.Path | None = None,
  baseline: str | pathlib.Path | None = None,
) -> pathlib.Path:
  """Draws every figure of a run and writes report.html, which says what had to be left out.

  Args:
    run: a run folder, of a finished run or of one that goes on.
    output_dir: for the figures (PNG, SVG) and the report; RUN/analysis if not given.
    baseline: folder of a run to be compared with.

  Returns:
    The path of report.html.

  Raises:
    UserError: nothing to read there, or matplotlib is missing.
  """
  from hgnn_moe_jax.analysis.analyze import analyze
  from hgnn_moe_jax.analysis.runs import read_run

  folder = pathlib.Path(run)
  output = pathlib.Path(output_dir) if output_dir is not None else folder / "analysis"
  other = None if baseline is None else read_run(pathlib.Path(baseline))
  return analyze(read_run(folder), output, other).path


def compare_orthogonality_approaches(
  runs: Sequence[Mapping[str, Any]],
  output_dir: str | pathlib.Path,
  baseline: str | None = None,
) -> pathlib.Path:
  """Compares approaches, each with one run or one per seed; writes a page, tables and figures.

  Args:
    runs: mappings with "name", the approach, and "run", its folder; a name may come several times,
      with another seed each time.
    output_dir: for comparison.html, .md, .csv, and the figures as PNG and SVG.
    baseline: the name that the others are paired with, seed by seed.

  Returns:
    The path of comparison.md.

  Raises:
    UserError: runs that cannot be read or compared, or matplotlib is missing.
  """
  from hgnn_moe_jax.analysis import compare
  from hgnn_moe_jax.analysis.runs import read_run

  named = [(str(entry["name"]), read_run(pathlib.Path(entry["run"]))) for entry in runs]
  return compare.write(compare.group_runs(named), pathlib.Path(output_dir), baseline)
