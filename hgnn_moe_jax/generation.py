"""Text from a trained model, token by token, with a key-value cache per expert.

A row of a batch does not depend on the other rows: it has a random key of its own (Sampling.seed
plus its number in the batch) and its own place in the cache. So a batch gives what its prompts
give one by one, and prompt i alone with seed + i gives row i.

Past the context, the window slides: when a row has filled all `max_length` places, its newer half
is read again from place 0 and generation goes on. The uncached model on that window would say the
same.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hgnn_moe_jax import device
from hgnn_moe_jax.data.tokenizers import Tokenizer
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.models.language_model import Caches, LanguageModel, Params
from hgnn_moe_jax.trained import Trained

# The shortest cache and the shortest prompt that are compiled for; longer ones double it.
_SHORTEST = 16
_TAIL = 16  # Tokens that are decoded together.
# What tokenizers decode bytes to that are no characters, such as the first half of one.
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Sampling(NamedTuple):
  """How tokens are chosen.

  Attributes:
    max_tokens: most tokens to generate, at least 1.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: of those, keep the fewest whose probabilities sum to at least p (Holtzman et al. 2020,
      arXiv 1904.09751); 1 keeps all.
    repetition_penalty: logits of tokens that are there already, in the prompt or after it, are
      divided by it where positive, else multiplied (Keskar et al. 2019, arXiv 1909.05858); 1: none.
    stop: generation ends before any of these strings.
    seed: of the random draws.
  """

  max_tokens: int = 100
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  stop: tuple[str, ...] = ()
  seed: int = 0


class Generated(NamedTuple):
  """Attributes:
  prompt: as given.
  text: what follows it, without stop string and end of text.
  tokens: generated ids; an end of text, or the tokens of a stop string, are among them.
  leaders: per token the expert with the largest part in the pooled updates, mean over layers, at
    the place that predicted it.
  ended: why: "end of text", "stop" or "length".
  """

  prompt: str
  text: str
  tokens: list[int]
  leaders: list[int]
  ended: str


class _State(NamedTuple):
  """Of B rows between two tokens.

  Attributes:
    caches: of S slots.
    logits_BV: of the next token, float32.
    leader_B: the expert that led the prediction of it, int32.
    length_B: tokens in the caches, int32.
    seen_BV: bool, tokens of prompt and text.
    key_B: of the rows.
    count: tokens generated, int32 scalar.
  """

  caches: Caches
  logits_BV: jax.Array
  leader_B: jax.Array
  length_B: jax.Array
  seen_BV: jax.Array
  key_B: jax.Array
  count: jax.Array


def generate(
  trained: Trained,
  prompts: Sequence[str],
  sampling: Sampling,
  on_text: Callable[[int, str, int], None] | None = None,
  warn: Callable[[str], None] = lambda text: None,
) -> list[Generated]:
  """Continues every prompt, all in one batch.

  Of a prompt longer than the context only its end is read.

  Args:
    trained: of `trained.load`.
    prompts: one or more, none of them empty.
    sampling: how.
    on_text: called with (row, new text, leading expert of its last token) as soon as more text of a
      row is certain: never half a character, never the beginning of a stop string.
    warn: called with a line about a prompt that is too long.

  Raises:
    UserError: no prompt, an empty one, or a sampling parameter outside its range.
  """
  check(sampling)
  rows = _read_prompts(trained, prompts, sampling, on_text, warn)
  context = trained.config.model.max_length
  slots = _rounded(max(len(row.context) for row in rows) + sampling.max_tokens, context)
  programs = _programs(trained.model)
  state = _start(trained, programs, rows, slots, sampling.seed)
  for _ in range(sampling.max_tokens):
    full = any(len(row.context) == context for row in rows)
    leader_B = np.asarray(state.leader_B)
    act = programs.pick if full else programs.advance
    state, token_B = act(trained.params, state, _chooser(sampling))
    for row, token, leader in zip(rows, np.asarray(token_B), leader_B, strict=True):
      row.add(int(token), int(leader))
    if all(row.ended for row in rows):
      break
    if full:
      for row in rows:
        row.slide(context)
      state = state._replace(**_read_windows(trained, programs, rows, slots))
  return [row.result() for row in rows]


class _Row:
  """One prompt and what is known of its continuation.

  Attributes:
    context: tokens that the model has in the cache, or has to read again.
    ended: why, or "".
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    number: int,
    prompt: str,
    context: list[int],
    stop: tuple[str, ...],
    on_text: Callable[[int, str, int], None] | None,
  ):
    self._tokenizer, self._number, self._on_text = tokenizer, number, on_text
    self._prompt, self._stop = prompt, stop
    self.context, self.ended = context, ""
    # Text that nothing can change any more, the token before the others, and these.
    self._settled, self._before, self._tail = "", context[-1:], list[int]()
    self._tokens: list[int] = []
    self._leaders: list[int] = []
    self._told = ""

  def slide(self, context: int) -> None:
    if len(self.context) > context:
      self.context = self.context[-max(1, context // 2) :]

  def add(self, token: int, leader: int) -> None:
    self.context.append(token)
    if self.ended:  # The others of the batch go on.
      return
    self._tokens.append(token)
    self._leaders.append(leader)
    if token != self._tokenizer.end_of_text:
      self._tail.append(token)
    text = self._text()
    if stops := [at for s in self._stop if (at := text.find(s)) >= 0]:
      self.ended, text = "stop", text[: min(stops)]
    elif token == self._tokenizer.end_of_text:
      self.ended, text = "end of text", text.rstrip(_BROKEN)
    else:
      text = text[: len(text) - _uncertain(text, self._stop)]
    self._tell(text, leader)

  def result(self) -> Generated:
    if not self.ended:
      self.ended = "length"
      self._tell(self._text().rstrip(_BROKEN), self._leaders[-1])
    return Generated(self._prompt, self._told, self._tokens, self._leaders, self.ended)

  def _tell(self, text: str, leader: int) -> None:
    if self._on_text is not None and len(text) > len(self._told):
      self._on_text(self._number, text[len(self._told) :], leader)
    self._told = text

  def _text(self) -> str:
    """Of the generated tokens, of which the last few are decoded again each time.

    After what precedes: some tokenizers drop a first space.
    """
    before = self._tokenizer.decode(self._before)
    text = self._tokenizer.decode(self._before + self._tail)[len(before) :]
    whole = self._settled + text
    if len(self._tail) >= _TAIL and not text.endswith(_BROKEN):
      self._settled, self._before, self._tail = whole, self._tail[-1:], []
    return whole


def _uncertain(text: str, stop: tuple[str, ...]) -> int:
  """How many characters at the end may still change or turn out to begin a stop string."""
  broken = len(text) - len(text.rstrip(_BROKEN))
  begun = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
  return max([broken, *begun])


def _read_prompts(
  trained: Trained,
  prompts: Sequence[str],
  sampling: Sampling,
  on_text: Callable[[int, str, int], None] | None,
  warn: Callable[[str], None],
) -> list[_Row]:
  if not prompts:
    raise UserError("no prompt: give one or more")
  if empty := [n for n, prompt in enumerate(prompts, 1) if not prompt]:
    raise UserError(f"prompt {empty[0]} is empty: give at least one character")
  T, tokenizer = trained.config.model.max_length, trained.tokenizer
  # A stream of documents begins with an end of text, and the model has learned what follows one.
  start = [tokenizer.end_of_text] if trained.config.data.protocol == "packed" else []
  rows = []
  for number, (prompt, ids) in enumerate(zip(prompts, tokenizer.encode(prompts), strict=True)):
    if len(ids) > T:
      warn(f"prompt {number + 1} has {len(ids)} tokens, the context holds {T}: its end is read")
    context = [*start, *(int(i) for i in ids)][-T:]
    if not context:
      raise UserError(f"prompt {number + 1} has no tokens: give text that the tokenizer knows")
    rows.append(_Row(tokenizer, number, prompt, context, sampling.stop, on_text))
  return rows


def check(sampling: Sampling) -> None:
  """Raises UserError if a parameter is outside its range."""
  s = sampling
  ranges = {
    "max_tokens": (s.max_tokens, s.max_tokens >= 1, "at least 1"),
    "temperature": (s.temperature, 0.0 <= s.temperature < math.inf, "at least 0; 0 is greedy"),
    "top_k": (s.top_k, s.top_k >= 0, "at least 0; 0 keeps all tokens"),
    "top_p": (s.top_p, 0.0 < s.top_p <= 1.0, "in (0, 1]; 1 keeps all tokens"),
    "repetition_penalty": (
      s.repetition_penalty,
      0.0 < s.repetition_penalty < math.inf,
      "above 0; 1 is none",
    ),
    "sample_seed": (s.seed, 0 <= s.seed < 2**31, "in [0, 2**31)"),
  }
  for name, (value, holds, cure) in ranges.items():
    if not holds:
      raise UserError(f"--{name}={value}: use a value {cure}")
  if "" in s.stop:
    raise UserError("--stop=: give at least one character")


def _chooser(sampling: Sampling) -> tuple[np.ndarray, ...]:
  """The parameters of `choose` as arrays: another value compiles nothing anew."""
  s = sampling
  floats = (np.asarray(x, np.float32) for x in (s.temperature, s.top_p, s.repetition_penalty))
  return (*floats, np.asarray(s.top_k, np.int32))


class _Programs(NamedTuple):
  """Compiled functions of one model.

  Attributes:
    read: params, empty caches, windows, their lengths -> logits and leader after each row's last
      token, and the caches.
    pick: params, state, chooser -> state that has chosen a token but not read it, the token.
    advance: the same, and the token is read.
  """

  read: Callable[..., tuple[jax.Array, jax.Array, Caches]]
  pick: Callable[..., tuple[_State, jax.Array]]
  advance: Callable[..., tuple[_State, jax.Array]]


@functools.lru_cache(maxsize=8)
def _programs(model: LanguageModel) -> _Programs:
  def read(params: Params, caches: Caches, window_BT: jax.Array, length_B: jax.Array):
    logits_BTV, reading = model.read(params, caches, window_BT, jnp.zeros_like(length_B))
    row_B, last_B = jnp.arange(window_BT.shape[0]), length_B - 1
    leader_B = _leaders(reading.share_LBTE)[row_B, last_B]
    return logits_BTV[row_B, last_B], leader_B, reading.caches

  def pick(params: Params, state: _State, chooser: tuple[jax.Array, ...]):
    del params
    key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.count)
    token_B = jax.vmap(functools.partial(choose, chooser))(state.logits_BV, state.seen_BV, key_B)
    seen_BV = state.seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    return state._replace(seen_BV=seen_BV, count=state.count + 1), token_B

  def advance(params: Params, state: _State, chooser: tuple[jax.Array, ...]):
    state, token_B = pick(params, state, chooser)
    logits_BTV, reading = model.read(params, state.caches, token_B[:, None], state.length_B)
    after = state._replace(
      caches=reading.caches,
      logits_BV=logits_BTV[:, 0],
      leader_B=_leaders(reading.share_LBTE)[:, 0],
      length_B=state.length_B + 1,
    )
    return after, token_B

  options = device.compiler_options()
  compiled = functools.partial(jax.jit, donate_argnums=1, compiler_options=options)
  return _Programs(compiled(read), compiled(pick), compiled(advance))


def _leaders(share_LBTE: jax.Array) -> jax.Array:
  return jnp.argmax(share_LBTE.mean(0), axis=-1).astype(jnp.int32)


def choose(
  chooser: tuple[jax.Array, ...], logits_V: jax.Array, seen_V: jax.Array, key: jax.Array
) -> jax.Array:
  """The next token of one row, int32 scalar.

  Args:
    chooser: temperature, top_p, repetition_penalty and top_k, as in Sampling.
    logits_V: float32.
    seen_V: bool, which tokens the penalty meets.
    key: of this row and place.
  """
  temperature, top_p, penalty, top_k = chooser
  punished_V = jnp.where(logits_V > 0.0, logits_V / penalty, logits_V * penalty)
  logits_V = jnp.where(seen_V, punished_V, logits_V)
  scaled_V = logits_V / jnp.where(temperature > 0.0, temperature, 1.0)
  order_V = jnp.argsort(-scaled_V)
  sorted_V = scaled_V[order_V]
  rank_V = jnp.arange(sorted_V.size)
  kept_V = (rank_V < top_k) | (top_k == 0)
  share_V = jax.nn.softmax(jnp.where(kept_V, sorted_V, -jnp.inf))
  # What lies before a token decides: the first token that reaches p is kept, the first always.
  # The sum of all may be above 1 by rounding.
  kept_V &= (jnp.cumsum(share_V) - share_V < top_p) | (rank_V == 0) | (top_p >= 1.0)
  drawn = jax.random.categorical(key, jnp.where(kept_V, sorted_V, -jnp.inf))
  return order_V[jnp.where(temperature > 0.0, drawn, 0)].astype(jnp.int32)


def _rounded(size: int, largest: int) -> int:
  """The next power of two, so that few shapes are compiled; at most `largest`."""
  return min(largest, max(_SHORTEST, 1 << (size - 1).bit_length()))


def _read_windows(
  trained: Trained, programs: _Programs, rows: list[_Row], slots: int
) -> dict[str, Any]:
  """The fields of a _State that has just read every row's context from place 0."""
  length_B = np.array([len(row.context) for row in rows], np.int32)
  shape = (len(rows), _rounded(int(length_B.max()), slots))
  window_BT = np.full(shape, trained.tokenizer.end_of_text, np.int32)
  for window_T, row in zip(window_BT, rows, strict=True):
    window_T[: len(row.context)] = row.context
  empty = trained.model.init_caches(len(rows), slots)
  logits_BV, leader_B, caches = programs.read(trained.params, empty, window_BT, length_B)
  return {
    "caches": caches,
    "logits_BV": logits_BV,
    "leader_B": leader_B,
    "length_B": jnp.asarray(length_B),
  }


def _start(
  trained: Trained, programs: _Programs, rows: list[_Row], slots: int, seed: int
) -> _State:
  seen_BV = np.zeros((len(rows), trained.tokenizer.vocab_size), bool)
  for seen_V, row in zip(seen_BV, rows, strict=True):
    seen_V[row.context] = True
  seen_BV[:, trained.tokenizer.end_of_text] = False  # It stands before the prompt, not in it.
  return _State(
    **_read_windows(trained, programs, rows, slots),
    seen_BV=jnp.asarray(seen_BV),
    key_B=jnp.stack([jax.random.key(seed + number) for number in range(len(rows))]),
    count=jnp.zeros((), jnp.int32),
  )
