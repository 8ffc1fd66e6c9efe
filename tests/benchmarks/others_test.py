"""The benchmarks of generation and of input, tiny; the comparison of two result files, by hand."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from benchmarks import compare, data, generation, parts
from hgnn_moe_jax.config import Config, with_fields
from hgnn_moe_jax.errors import UserError


def command(module, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"benchmarks.{module}", *arguments], capture_output=True, text=True
  )


def test_generation_counts_new_tokens_only(tiny_config, monkeypatch):
  """By a clock of its own: what a busy machine adds to two short times can be all there is."""
  now, generate = [0.0], generation.generate

  def read():
    now[0] += 0.001
    return now[0]

  def generate_slowly(*arguments):
    made = generate(*arguments)
    now[0] += 5 + 0.25 * sum(len(g.tokens) for g in made)  # The prompt takes 5 seconds.
    return made

  monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=read))
  monkeypatch.setattr(generation, "generate", generate_slowly)
  config = with_fields(tiny_config(), {"model.max_length": 8})
  result = generation.measure(config, batch=2, rounds=2)
  assert (result["batch"], result["prompt_tokens"]) == (2, 4)
  assert result["tokens_per_second"] == pytest.approx(4)
  assert result["first_token_seconds"] == pytest.approx(5.501)
  assert result["tokens_per_second_uncached"] == pytest.approx(2 / 0.001)
  line = generation.table([{"shape": "tiny", "coupler": "graph", **result}]).splitlines()[-1]
  assert line.startswith("| tiny | graph | 2 |")


def test_a_random_model_is_one_of_its_config(tiny_config):
  trained = generation.random_model(tiny_config())
  assert trained.params["embedding"].shape == (257, 16) and isinstance(trained.config, Config)


def test_input_both_ways(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "_SECONDS", 0.1)
  host, device = data.measure(tmp_path, tokens=4000, batch=4, length=16)
  assert (host["placement"], device["placement"]) == ("host", "device")
  assert host["tokens_per_second"] > 0 and device["tokens_per_second"] > 0
  assert "| 4,000 | 4 x 16 | host |" in data.table([host, device])


BEFORE = {"shape": "small", "coupler": "graph", "sweep": "", "tokens_per_second": 100.0,
          "utilization": 0.4, "compile_seconds": 8.0}  # fmt: skip
AFTER = {**BEFORE, "tokens_per_second": 150.0, "utilization": 0.5, "compile_seconds": 4.0}


def test_ratios_by_hand():
  other = {**AFTER, "coupler": "mean"}
  (row,) = compare.compare([BEFORE], [AFTER, other])
  assert row["name"] == "small graph"
  assert row["ratios"] == {
    "tokens_per_second": 1.5,
    "utilization": 1.25,
    "compile_seconds": 0.5,
  }
  assert "| small graph | 1.500 | 1.250 | 0.500 |" in compare.table([row])


def test_meshes_are_measurements_of_their_own():
  one, other = ({**BEFORE, "devices": 8, "mesh": mesh} for mesh in ([8, 1, 1], [1, 8, 1]))
  rows = compare.compare([one, other], [other, {**one, "utilization": 0.8}])
  assert [row["name"] for row in rows] == ["small graph 8 [1, 8, 1]", "small graph 8 [8, 1, 1]"]
  assert [row["ratios"]["utilization"] for row in rows] == [1.0, 2.0]
  with pytest.raises(UserError, match="small graph: there twice"):
    compare.compare([BEFORE], [BEFORE, AFTER])


def test_parts_have_nothing_to_compare():
  parts_of = {"shape": "small", "coupler": "graph", "parts_milliseconds": {"head": 1.0}}
  assert compare.compare([parts_of], [parts_of]) == []


def test_the_comparing_command(tmp_path):
  files = [tmp_path / "before.json", tmp_path / "after.json"]
  for file, measurement in zip(files, (BEFORE, AFTER), strict=True):
    file.write_text(json.dumps({"measurements": [measurement]}))
  done = command("compare", *map(str, files))
  assert done.returncode == 0 and "| small graph | 1.500 |" in done.stdout


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "nothing: give two files, BEFORE and AFTER"),
    (["a.json", "b.json"], "a.json: no measurements there; give a file that --out has written"),
  ],
)
def test_what_cannot_be_compared(words, message):
  done = command("compare", *words)
  assert done.returncode == 2 and done.stderr == f"error: {message}\n"


def test_parts_of_a_step_by_hand():
  hlo = """
  %fusion.1 = f32[4]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(d)/layers/experts._ffn/dot"}
  %w = (s32[], f32[4]) while(%b), body=%body, metadata={op_name="jit(d)/head/while"}
  ROOT %copy.2 = f32[4]{0} copy(%c)
"""
  found = parts.operations(hlo)
  assert found == {"fusion.1": "jit(d)/layers/experts._ffn/dot", "copy.2": ""}
  assert [parts.part_of(o) for o in found.values()] == ["FFN", "rest"]
  assert parts.table({"FFN": 3.0, "rest": 1.0}).endswith(
    "| FFN | 3.0 | 75.0% |\n| rest | 1.0 | 25.0% |"
  )


def test_every_part_of_a_real_step_is_seen(tiny_config):
  """On this backend, too: names come from the compiled program, times from the profiler."""
  config = tiny_config(**{"adaptive.controller": "adaptive", "orthogonality.weight_strength": 0.0})
  with jax.numpy_dtype_promotion("standard"):
    result = parts.measure(config, 257)
  assert {"attention", "FFN", "coupler", "head and loss", "optimizer", "controller"} <= set(result)
  assert {"orthogonality", "input"} <= set(result) and all(ms > 0 for ms in result.values())


@pytest.mark.parametrize(("host", "wanted"), [("/host:CPU", 2.0), ("/device:GPU:1", 12.0)])
def test_a_gpus_kernels_are_counted_and_not_their_launches(host, wanted):
  """Two steps; kernels of 1 and 3 ms, and 20 ms elsewhere; one instruction is not the step's."""
  event = lambda name, ms: SimpleNamespace(  # noqa: E731
    name="kernel", stats=[("hlo_op", name)], duration_ns=ms * 1e6
  )
  plane = lambda name, *events: SimpleNamespace(  # noqa: E731
    name=name, lines=[SimpleNamespace(events=events)]
  )
  kernels = plane("/device:GPU:0", event("fusion.1", 1), event("dot", 3), event("other", 50))
  profile = SimpleNamespace(planes=[plane(host, event("dot", 20)), kernels])
  names = {"fusion.1": "jit(step)/layers/coupler/mul", "dot": "jit(step)/layers/coupler/dot"}
  assert parts.by_part(profile, names, steps=2) == {"coupler": wanted}
