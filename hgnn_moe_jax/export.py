"""Weights for elsewhere: `python -m hgnn_moe_jax.export RUN --output=FOLDER`.

Writes model.safetensors, card.json and, where it is needed, tokenizer.json; see `trained`.
"""

import pathlib

from absl import flags

from hgnn_moe_jax import cli
from hgnn_moe_jax.errors import UserError


def main() -> None:
  """The command."""
  output = flags.DEFINE_string(
    "output", None, "Folder to write; exported/NAME of the run folder if not given."
  )
  overwrite = flags.DEFINE_boolean("overwrite", False, "Replace an earlier export.")
  checkpoint = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which one to export.")

  def run(argv: list[str]) -> None:
    if len(argv) != 2:
      raise UserError("give one run folder: python -m hgnn_moe_jax.export runs/quickstart")
    from hgnn_moe_jax import trained

    model = trained.load(argv[1], checkpoint.value)
    name = pathlib.Path(argv[1]).resolve().name
    print(trained.export(model, output.value or pathlib.Path("exported", name), overwrite.value))

  cli.start(run)


if __name__ == "__main__":
  main()
