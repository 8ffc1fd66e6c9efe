"""The benchmark of training steps: operations counted by hand, measurements that are complete."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.flops import matmul_flops
from hgnn_moe_jax.config import Config, with_fields


@pytest.fixture(autouse=True)
def _optax_promotes():
  with jax.numpy_dtype_promotion("standard"):
    yield


def test_products_are_counted_wherever_they_stand():
  a, b = jnp.ones((4, 5)), jnp.ones((5, 5))
  once = 2 * 4 * 5 * 5
  assert matmul_flops(jnp.matmul, a, b) == once
  assert matmul_flops(jax.jit(lambda a, b: jnp.tanh(a @ b) + a @ b), a, b) == 2 * once
  turns = lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=3)[0]  # noqa: E731
  assert matmul_flops(jax.checkpoint(turns), a, b) == 3 * once
  branches = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a)  # noqa: E731
  assert matmul_flops(branches, a, b) == once
  batched = lambda a, b: jnp.einsum("bij,bjk->bik", a[None], b[None])  # noqa: E731
  assert matmul_flops(batched, a, b) == once
  assert matmul_flops(jnp.add, a, a) == 0


def test_a_loop_of_unknown_length_is_refused():
  loop = lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, a)  # noqa: E731
  with pytest.raises(ValueError, match="unknown length"):
    matmul_flops(loop, jnp.ones((2, 2)))


def test_the_forward_pass_by_hand():
  """D 16, L 2, E 3, B 4, T 16, V 64, without messages: every product of the model, and no other."""
  fields, V = train_step.SHAPES["tiny"]
  config = with_fields(Config(), {**fields, "model.coupler": "mean", "training.steps": 1})
  D, L, E, tokens, T = 16, 2, 3, 4 * 16, 16
  block = 12 * D * D  # queries, keys, values; output; FFN of four times the width
  attention = 2 * T * D  # scores and mixing, the masked half included
  spread = D  # x for every expert, written as a product
  pooled = D  # their mean, written as a product
  per_layer = tokens * E * (block + attention + spread + pooled)
  # Gains and biases of the norms, folded into the kernels: once per step, not per token.
  folded = E * (3 * D * D + 4 * D * D)
  gates = L * tokens * E  # equal ones, averaged over tokens for Aux
  head = tokens * D * V
  wanted = 2 * (L * (per_layer + folded) + gates + head)
  assert train_step.forward_flops(config, V) == wanted
  # A token that has selected one expert of E passes one feed-forward network, and the router.
  sparse = with_fields(config, {"model.selected_experts": 1})
  fed, routers = 2 * 4 * D * D, D * E
  wanted += 2 * L * tokens * (routers - (E - 1) * fed)
  assert train_step.forward_flops(sparse, V) == wanted


def test_a_measurement(command, tmp_path):
  out = tmp_path / "result.json"
  cache = jax.config.jax_compilation_cache_dir
  status, printed, _ = command(
    train_step.main,
    "--shape=tiny",
    *("--sweep=model.num_layers=1", "--sweep=training.batch_size=2"),
    *("--rounds=3", f"--out={out}"),
  )
  assert status == 0 and jax.config.jax_compilation_cache_dir == cache
  result = json.loads(out.read_text())
  (one,) = result["measurements"]
  name = "num_layers=1,batch_size=2"
  assert f"| tiny | graph | {name} | {1000 * one['seconds_per_step']:.1f} |" in printed
  tokens = 2 * 16
  assert one["tokens_per_second"] * one["seconds_per_step"] == pytest.approx(tokens)
  assert one["matmul_flops_per_second"] * one["seconds_per_step"] == pytest.approx(
    one["matmul_flops"]
  )
  assert 0.0 < one["utilization"] < 1.0
  # A medium-sized state, and at least what parameters and two moments take.
  assert one["peak_memory_bytes"] > 3 * 4 * one["parameters"]
  assert one["compile_seconds_cached"] < one["compile_seconds"]
  assert result["device"]["platform"] == "cpu"


class Clock:
  """Stands still but for the programs that it times, which take as long as they are told to."""

  def __init__(self):
    self.now, self.order = 0.0, []

  def __call__(self):
    return self.now

  def program(self, name, durations):
    durations = iter(durations)

    def run(state, feed, n):
      self.order.append(name)
      self.now += float(n) * next(durations)
      return state, None

    return run


def test_taken_in_turn(monkeypatch):
  """Ratios are medians within a round, whatever the machine does between rounds; turns rotate."""
  clock, (fields, V) = Clock(), train_step.SHAPES["tiny"]
  config = with_fields(Config(), {**fields, "training.steps": 1})
  state = types.SimpleNamespace(params={"w": np.zeros(3)})
  # The machine is four times slower in the second round.
  # A timing of the second is of two dispatches.
  durations = {"first": [1.0, 4.0, 1.0], "second": [1.0, 3.0, 8.0, 8.0, 2.0, 4.0]}
  programs = [
    train_step.Program(config, V, clock.program(name, times), state, None, [9.0, 0.5])
    for name, times in durations.items()
  ]
  programs[1].dispatches = 2
  waiting = iter(programs)
  monkeypatch.setattr(train_step, "prepare", lambda *_: next(waiting))
  monkeypatch.setattr(train_step, "_memory", lambda compiled: 1)
  monkeypatch.setattr(train_step, "timed", lambda product: 0.5)
  monkeypatch.setattr(train_step, "time", types.SimpleNamespace(perf_counter=clock))
  first, second = train_step.measure([config, config], V, rounds=3)
  assert clock.order == ["first", *["second"] * 4, "first", "first", *["second"] * 2]
  assert [first[f"time_to_first{end}"] for end in ("_low", "", "_high")] == [1.0, 1.0, 1.0]
  assert [second[f"time_to_first{end}"] for end in ("_low", "", "_high")] == [2.0, 2.0, 2.5]
  assert (first["seconds_per_step"], second["seconds_per_step"]) == (1.0, 3.0)
  named = {"shape": "tiny", "coupler": "graph", "sweep": ""}
  heading, line, *rows = train_step.table([{**named, **first}, {**named, **second}]).splitlines()
  assert heading.count("|") == line.count("|") == rows[0].count("|") == rows[1].count("|") == 11
  assert rows[0].endswith("| 9.0 (0.5) | 1.00 [1.00, 1.00] |")
  assert rows[1].endswith("| 9.0 (0.5) | 2.00 [2.00, 2.50] |")


@pytest.mark.parametrize(
  ("backend", "times", "dtype"), [("cpu", 1, "float32"), ("gpu", 3, "bfloat16")]
)
def test_the_peak_is_a_product_or_some_in_a_row(backend, times, dtype, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(train_step, "_PEAK_CPU", (16, 1))
  monkeypatch.setattr(train_step, "_PEAK_ACCELERATOR", (16, 3))
  call, flops = train_step.peak_product()
  results = call()
  assert [(r.shape, r.dtype) for r in results] == [((16, 16), dtype)] * times
  assert flops == times * 2 * 16**3


def test_turns_want_something_to_compare(command):
  status, _, said = command(train_step.main, "--shape=tiny", "--in_turn")
  assert status == 2 and said.startswith("error: --in_turn: nothing to compare; give a --sweep")


@pytest.mark.parametrize("in_turn", [False, True])
def test_an_option_of_the_compiler_is_one_more_measurement(in_turn, command, monkeypatch, tmp_path):
  asked, option = [], "xla_llvm_disable_expensive_passes=true"

  def measure(configs, vocab_size, rounds, cached, options):
    layers = [config.model.num_layers for config in configs]
    asked.append(list(zip(layers, options, strict=True)))
    return [{k: v for k, v in recorded().items() if k != "sweep"}] * len(configs)

  monkeypatch.setattr(train_step, "measure", measure)
  status, *_ = command(
    train_step.main,
    *("--shape=tiny", "--sweep=model.num_layers=1,2", f"--compiler_option={option}"),
    *(f"--in_turn={in_turn}", f"--out={tmp_path / 'result.json'}"),
  )
  wanted = [(n, o) for n in (1, 2) for o in ({}, {"xla_llvm_disable_expensive_passes": True})]
  assert status == 0
  assert asked == ([wanted] if in_turn else [[one] for one in wanted])
  found = json.loads((tmp_path / "result.json").read_text())["measurements"]
  names = [f"num_layers={n}{more}" for n in (1, 2) for more in ("", f",{option}")]
  assert [m["sweep"] for m in found] == names


def test_each_program_is_compiled_with_its_own_options(monkeypatch):
  compiled, (fields, V) = [], train_step.SHAPES["tiny"]
  config = with_fields(Config(), {**fields, "training.steps": 1})

  class Enough(Exception):
    pass

  def compile_seconds(lowered, cached, options):
    compiled.append(options)
    if len(compiled) == 2:
      raise Enough
    return (lambda state, feed, n: (state, None)), [1.0]

  monkeypatch.setattr(train_step, "compile_seconds", compile_seconds)
  monkeypatch.setattr(train_step, "dispatch_of", lambda *_: (None, None, None))
  with pytest.raises(Enough):
    train_step.measure([config] * 2, V, 3, options=[{}, {"xla_one": "1"}])
  assert compiled == [{}, {"xla_one": "1"}]


def test_the_compiler_is_told_its_options():
  lowered = lambda: jax.jit(lambda x: x + 1).lower(jnp.ones(()))  # noqa: E731
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_none'"):
    train_step.compile_seconds(lowered, False, {"xla_none": True})


@pytest.mark.parametrize(
  ("option", "wanted"),
  [
    ("xla_cpu_fast", "give NAME=VALUE, without"),
    ("xla_none=1", "INVALID_ARGUMENT: No such compile option: 'xla_none'; use one of XLA's"),
    ("xla_gpu_autotune_level=high", "'high' is not a valid int32 value.; use one of XLA's"),
  ],
)
def test_an_option_that_xla_does_not_have(command, option, wanted):
  status, _, said = command(train_step.main, "--shape=tiny", f"--compiler_option={option}")
  assert status == 2 and said.startswith(f"error: --compiler_option={option}: ") and wanted in said


@pytest.mark.parametrize("cached", [False, True])
def test_the_second_compilation_can_be_left_out(cached):
  lowered = lambda: jax.jit(lambda x: x + 1).lower(jnp.ones(()))  # noqa: E731
  _, seconds = train_step.compile_seconds(lowered, cached)
  assert len(seconds) == 1 + cached


def recorded():
  """A measurement that was made."""
  file = pathlib.Path(train_step.__file__).parent / "results" / "small_cpu.json"
  return json.loads(file.read_text())["measurements"][0]


def test_a_table_without_the_second_compilation_or_any():
  one = recorded()
  without = train_step.table([{**one, "compile_seconds_cached": None}])
  assert without.endswith(f"| {one['compile_seconds']:.1f} |")
  neither = train_step.table([{**one, "compile_seconds": None, "compile_seconds_cached": None}])
  assert neither.endswith(" | - |")


def test_a_timing_takes_half_a_second(monkeypatch):
  """A dispatch of 8 steps of 25 ms, so three of them; the first of all is not timed."""
  clock, (fields, V) = Clock(), train_step.SHAPES["tiny"]
  config = with_fields(Config(), {**fields, "training.steps": 1})
  program = clock.program("one", [9.0, 0.025, 0.025, 0.035, 0.025])
  monkeypatch.setattr(train_step, "time", types.SimpleNamespace(perf_counter=clock))
  monkeypatch.setattr(train_step, "dispatch_of", lambda *_: (None, None, None))
  monkeypatch.setattr(train_step, "compile_seconds", lambda *_: (program, [1.0]))
  prepared = train_step.prepare(config, V, cached=False)
  assert (prepared.dispatches, len(clock.order)) == (3, 2)
  assert train_step.advance(prepared) == pytest.approx(8 * (0.025 + 0.035 + 0.025))
