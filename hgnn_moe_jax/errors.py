"""What a user can get wrong or run into, told in one line with the cure.

`main` prints the message without a traceback and exits with `exit_status`. Everything else that is
raised is a defect of this project and keeps its traceback.
"""


class UserError(Exception):
  """A mistake in what the user gave: a flag, a config field, a file. Exit status 2."""

  exit_status = 2


class ConfigError(UserError):
  """A config field with a value that cannot work.

  Args:
    field: dotted name as it stands on the command line, e.g. `model.num_heads`.
    value: what it was set to.
    cure: what to set instead, as an imperative clause.
  """

  def __init__(self, field: str, value: object, cure: str):
    super().__init__(f"config.{field}={value!r}: {cure}")
    self.field, self.value, self.cure = field, value, cure


class NonFiniteError(UserError):
  """Training produced an infinity or NaN; the last good checkpoint is kept. Exit status 3."""

  exit_status = 3


class Preempted(UserError):
  """The process was asked to stop and has saved its state. Exit status 75.

  75 is EX_TEMPFAIL of sysexits.h, "try again": a launcher can tell a run that saved itself and
  wants to be continued from one that was killed (143) or failed (1, 2, 3).
  """

  exit_status = 75
