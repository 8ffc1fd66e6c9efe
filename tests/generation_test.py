"""Generation: the cached model against the uncached one, rows against batches, choices by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgnn_moe_jax import generation
from hgnn_moe_jax.config import Config
from hgnn_moe_jax.data.tokenizers import ByteTokenizer
from hgnn_moe_jax.errors import UserError
from hgnn_moe_jax.generation import Sampling, choose, generate
from hgnn_moe_jax.models import language_model
from hgnn_moe_jax.models.attention import KeyValueCache
from hgnn_moe_jax.models.language_model import LanguageModel, Reading
from hgnn_moe_jax.trained import Trained

V, END = ByteTokenizer.vocab_size, ByteTokenizer.end_of_text
CONTEXT = 16


@pytest.fixture(scope="module")
def trained(random_params):
  """A real model of two experts with random parameters, on bytes."""
  config = Config()
  m = config.model
  m.embed_dim, m.num_layers, m.num_heads, m.num_experts = 8, 2, 2, 2
  m.ffn_multiplier, m.coupler_layers, m.max_length, m.compute_dtype = 2, 1, CONTEXT, "float32"
  config.data.tokenizer = "bytes"
  model = language_model.build(m, V, lambda updates_EBTD, weights_BT: None)
  params = random_params(jax.eval_shape(model.init, jax.random.key(0)))
  return Trained(config, model, params, ByteTokenizer(), 0, {})


def _scripted(table, context=64, protocol="lines"):
  """A model whose next token after id i is table[i], with certainty; expert 1 leads before "b"."""

  def init_caches(rows, slots):
    shape = (rows, 1, slots, 1)
    return (KeyValueCache(jnp.zeros(shape), jnp.zeros(shape)),)

  def read(params, caches, inputs_BT, start_B):
    following = np.arange(V)
    for before, after in table.items():
      following[before] = after
    next_BT = jnp.asarray(following)[inputs_BT]
    second_BT = (next_BT == ord("b")).astype(jnp.float32)
    share_LBTE = jnp.stack([1.0 - second_BT, second_BT], -1)[None]
    return 50.0 * jax.nn.one_hot(next_BT, V), Reading(caches, share_LBTE)

  fields = dict.fromkeys(LanguageModel._fields) | {"init_caches": init_caches, "read": read}
  config = Config()
  config.model.max_length, config.data.protocol = context, protocol
  return Trained(config, LanguageModel(**fields), {}, ByteTokenizer(), 0, {})


def _spell(text):
  """A table that spells `text`, whose bytes all differ, again and again."""
  ids = list(text.encode())
  assert len(set(ids)) == len(ids)
  return dict(zip(ids, [*ids[1:], ids[0]], strict=True))


@pytest.mark.parametrize("protocol", ["packed", "lines"])
def test_greedy_text_is_the_uncached_models_across_slides(trained, protocol, monkeypatch):
  monkeypatch.setattr(trained.config.data, "protocol", protocol)
  tokens = 2 * CONTEXT + 5
  context = [END] * (protocol == "packed") + list(b"abc")
  logits = jax.jit(trained.model.logits)
  wanted = []
  for _ in range(tokens):
    padded = np.full((1, CONTEXT), END, np.int32)
    padded[0, : len(context)] = context
    wanted.append(int(jnp.argmax(logits(trained.params, padded)[0, len(context) - 1])))
    context.append(wanted[-1])
    if len(context) > CONTEXT:
      context = context[-CONTEXT // 2 :]
    if wanted[-1] == END:
      break
  (one,) = generate(trained, ["abc"], Sampling(max_tokens=tokens, temperature=0.0))
  assert one.tokens == wanted
  assert len(wanted) > CONTEXT  # It did slide.


def test_a_batch_is_its_prompts_one_by_one(trained):
  prompts = ["a", "a long one past all", "abcdefg"]  # The second fills the context from the start.
  sampling = Sampling(max_tokens=2 * CONTEXT, temperature=0.7, top_p=0.9, seed=3)
  batch = generate(trained, prompts, sampling, warn=lambda line: None)
  assert len({tuple(one.tokens) for one in batch}) == 3
  for row, together in enumerate(batch):
    alone = generate(trained, [prompts[row]], sampling._replace(seed=3 + row))
    assert alone == [together]


def test_the_seed_decides(trained):
  once, again, other = (
    generate(trained, ["abc"], Sampling(max_tokens=12, seed=seed))[0].tokens for seed in (1, 1, 2)
  )
  assert once == again != other


def test_every_place_has_a_draw_of_its_own():
  """Where all tokens are equally likely, the same draw everywhere would repeat one token."""
  model = _scripted({})
  read = model.model.read
  flat = lambda *args: (jnp.zeros_like(read(*args)[0]), read(*args)[1])  # noqa: E731
  model = model._replace(model=model.model._replace(read=flat))
  one, two = generate(model, ["a", "a"], Sampling(max_tokens=30))
  assert len(set(one.tokens)) > 20
  assert one.tokens != two.tokens


def test_shapes_are_shared(trained):
  """Another prompt, temperature or seed compiles nothing."""
  programs = generation._programs(trained.model)
  generate(trained, ["abc"], Sampling(max_tokens=5, temperature=0.5))
  sizes = [p._cache_size() for p in programs]
  generate(trained, ["xy"], Sampling(max_tokens=6, top_k=3, top_p=0.5, seed=9))
  assert [p._cache_size() for p in programs] == sizes


def test_leaders_and_end_of_text():
  model = _scripted({ord("a"): ord("b"), ord("b"): ord("c"), ord("c"): END})
  (one,) = generate(model, ["a"], Sampling())
  assert one == ("a", "bc", [ord("b"), ord("c"), END], [1, 0, 0], "end of text")


def test_packed_prompts_follow_an_end_of_text():
  heard = []
  model = _scripted({}, protocol="packed")
  read = model.model.read

  def listen(params, caches, inputs_BT, start_B):
    jax.debug.callback(lambda ids: heard.append(ids[0, :3].tolist()), inputs_BT)
    return read(params, caches, inputs_BT, start_B)

  generate(model._replace(model=model.model._replace(read=listen)), ["ab"], Sampling(max_tokens=1))
  jax.effects_barrier()
  assert heard[0] == [END, ord("a"), ord("b")]


@pytest.mark.parametrize(
  ("stop", "text", "ended"),
  [
    ((), "bcdabcdabc", "length"),
    (("da",), "bc", "stop"),
    (("cd", "bcd"), "", "stop"),  # The earliest counts, not the first given.
    (("dab", "x"), "bc", "stop"),
    (("cx",), "bcdabcdabc", "length"),
  ],
)
def test_stop_strings(stop, text, ended):
  pieces = []
  model = _scripted(_spell("abcd"))
  sampling = Sampling(max_tokens=10, temperature=0.0, stop=stop)
  (one,) = generate(model, ["a"], sampling, lambda row, new, leader: pieces.append(new))
  assert (one.text, one.ended) == (text, ended)
  assert "".join(pieces) == text  # Nothing had to be taken back.


def test_characters_of_several_bytes_are_never_told_in_halves():
  table = _spell("aé") | {ord("é".encode()[-1:]): ord("a")}
  pieces = []
  (one,) = generate(
    _scripted(table), ["a"], Sampling(max_tokens=4), lambda row, new, leader: pieces.append(new)
  )
  assert pieces == ["é", "a"]
  assert one.text == "éa"  # The last token is half a character: it is not told at all.
  assert len(one.tokens) == 4


@settings(max_examples=60, deadline=None)
@given(
  ids=st.lists(st.sampled_from([*range(95, 103), *range(200, 258), END]), max_size=80),
  stop=st.sampled_from([(), ("ab",), ("é", "ccc")]),
)
def test_text_piece_by_piece_is_the_text_of_all_tokens(ids, stop):
  """Only the last tokens are decoded again; letters, and bytes that are halves of characters."""
  tokenizer = ByteTokenizer()
  ids = [i for i in ids if i < V]
  row = generation._Row(tokenizer, 0, "p", [ord("p")], stop, None)
  for count, token in enumerate(ids, 1):
    row.add(token, 0)
    if row.ended:
      break
    wanted = tokenizer.decode([i for i in ids[:count] if i != END])
    assert row._told == wanted[: len(wanted) - generation._uncertain(wanted, stop)]
  if ids:
    told = row.result().text
    wanted = tokenizer.decode([i for i in ids if i != END]).rstrip(generation._BROKEN)
    assert wanted.startswith(told) and (row.ended != "length" or told == wanted)


def test_a_character_across_the_border_of_settled_text():
  """Sixteen tokens are decoded together, or as many more as a character needs."""
  row = generation._Row(ByteTokenizer(), 0, "p", [ord("p")], (), None)
  for token in ("a" + "é" * 30).encode():
    row.add(token, 0)
  assert row.result().text == "a" + "é" * 30


def test_long_text_is_not_decoded_again_and_again():
  """What a token costs does not grow: at most so many are decoded for each."""
  counted = []

  class Counting(ByteTokenizer):
    def decode(self, ids):
      counted.append(len(ids))
      return super().decode(ids)

  row = generation._Row(Counting(), 0, "p", [ord("p")], (), None)
  for _ in range(500):
    row.add(ord("a"), 0)
  assert max(counted) <= 20 and row.result().text == 500 * "a"


def test_rows_that_are_done_wait_for_the_others():
  table = _spell("abc") | {ord("x"): END}
  calls = []
  one, two = generate(
    _scripted(table), ["x", "a"], Sampling(max_tokens=5), lambda row, new, _: calls.append(row)
  )
  assert (one.text, one.tokens, one.ended) == ("", [END], "end of text")
  assert (two.text, two.ended) == ("bcabc", "length")
  assert set(calls) == {1}


def test_of_a_long_prompt_the_end_is_read():
  told = []
  model = _scripted(_spell("abcd"), context=4)
  (one,) = generate(model, ["dcbabc"], Sampling(max_tokens=3), warn=told.append)
  assert one.text == "dab"
  assert told == ["prompt 1 has 6 tokens, the context holds 4: its end is read"]


def _chosen(logits, seen=(), temperature=1.0, top_k=0, top_p=1.0, penalty=1.0, draws=400):
  chooser = (*map(jnp.float32, (temperature, top_p, penalty)), jnp.int32(top_k))
  seen_V = np.isin(np.arange(len(logits)), seen)
  one = lambda key: choose(chooser, jnp.asarray(logits, jnp.float32), jnp.asarray(seen_V), key)  # noqa: E731
  return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws)))


def test_temperature_zero_takes_the_maximum():
  assert set(_chosen([0.1, 2.0, 1.9, -1.0], temperature=0.0)) == {1}
  # The penalty halves 2.0 and doubles -0.5: the maximum is another token.
  assert set(_chosen([2.0, 1.9, -0.5], seen=[0, 2], temperature=0.0, penalty=2.0)) == {1}
  assert set(_chosen([-1.0, -1.5], seen=[0], temperature=0.0, penalty=2.0)) == {1}


def test_the_end_of_text_before_the_prompt_is_not_penalised():
  """It is neither in the prompt nor after it, so a penalty leaves its logit as it was."""
  heard = []
  model = _scripted({ord("a"): END}, protocol="packed")
  start = generation._start

  def listen(*args):
    state = start(*args)
    heard.append(np.asarray(state.seen_BV))
    return state

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(generation, "_start", listen)
    (one,) = generate(model, ["ba"], Sampling(repetition_penalty=2.0, temperature=0.0))
  assert np.flatnonzero(heard[0][0]).tolist() == [ord("a"), ord("b")]
  assert one.ended == "end of text" and len(one.tokens) == 1


def test_top_p_of_one_keeps_all():
  """The float32 sum of many shares passes 1 before the last of them."""

  def lost(seed):
    logits = np.random.default_rng(seed).standard_normal(50_257).astype(np.float32)
    share_V = jax.nn.softmax(-jnp.sort(-logits))
    return logits if bool((jnp.cumsum(share_V) - share_V >= 1.0).any()) else None

  logits = next(found for seed in range(99) if (found := lost(seed)) is not None)
  chooser = (*(jnp.float32(x) for x in (1.0, 1.0, 1.0)), jnp.int32(0))
  seen_V = jnp.zeros(logits.size, bool)
  with pytest.MonkeyPatch.context() as patch:
    kept = []
    patch.setattr(jax.random, "categorical", lambda key, x: kept.append(x) or jnp.int32(0))
    choose(chooser, jnp.asarray(logits), seen_V, jax.random.key(0))
  assert np.isfinite(np.asarray(kept[0])).all()


def test_draws_follow_the_softmax():
  logits, temperature = np.array([0.0, 1.0, 2.0]), 2.0
  wanted = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  counts = np.bincount(_chosen(logits, temperature=temperature, draws=20_000), minlength=3)
  # Five standard deviations of a share of 20,000 draws.
  np.testing.assert_allclose(counts / 20_000, wanted, atol=5 * math.sqrt(0.25 / 20_000))


@settings(max_examples=25, deadline=None)
@given(
  logits=st.lists(st.integers(-40, 40), min_size=6, max_size=6, unique=True),
  top_k=st.integers(0, 6),
  top_p=st.sampled_from([0.05, 0.3, 0.6, 0.9, 1.0]),
)
def test_only_the_nucleus_is_drawn(logits, top_k, top_p):
  logits = np.array(logits) / 10
  order = np.argsort(-logits)[: top_k or None]
  share = np.exp(logits[order]) / np.exp(logits[order]).sum()
  size = int(np.searchsorted(np.cumsum(share), top_p - 1e-6)) + 1
  kept = set(order[:size].tolist())
  drawn = set(_chosen(logits, top_k=top_k, top_p=top_p).tolist())
  assert drawn <= kept
  # A token with a twentieth of what is kept is missing from 400 draws once in 10^9 times.
  frequent = order[:size][share[:size] >= 0.05 * share[:size].sum()]
  assert drawn >= set(frequent.tolist())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"max_tokens": 0}, "--max_tokens=0: use a value at least 1"),
    ({"temperature": -1.0}, "--temperature=-1.0: use a value at least 0"),
    ({"temperature": math.nan}, "--temperature=nan"),
    ({"top_k": -1}, "--top_k=-1"),
    ({"top_p": 0.0}, r"--top_p=0.0: use a value in \(0, 1\]"),
    ({"repetition_penalty": 0.0}, "--repetition_penalty=0.0"),
    ({"seed": -1}, "--sample_seed=-1"),
    ({"stop": ("",)}, "--stop=: give at least one character"),
  ],
)
def test_bad_sampling(changes, message):
  with pytest.raises(UserError, match=message):
    generate(_scripted({}), ["a"], Sampling(**changes))


@pytest.mark.parametrize(
  ("prompts", "message"), [([], "no prompt: give"), (["a", ""], "prompt 2 is empty")]
)
def test_bad_prompts(prompts, message):
  with pytest.raises(UserError, match=message):
    generate(_scripted({}), prompts, Sampling())
