"""The kernels, interpreted, against sums in float64; the head with them; and that Triton takes
them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from hgnn_moe_jax import device, sharding
from hgnn_moe_jax.models import head, head_kernels

N, D, V = 256, 128, 384
BF16 = jnp.dtype(jnp.bfloat16)


def _case():
  rng = np.random.default_rng(0)
  x, kernel = (jnp.asarray(rng.standard_normal((size, D)), jnp.bfloat16) for size in (N, V))
  target = jnp.asarray(rng.integers(0, 300, N), jnp.int32).at[:2].set(jnp.asarray([0, 299]))
  return x, kernel, target, jnp.asarray(np.resize([1, 0, 0.25], N), jnp.float32)


def _exact(x, kernel, target, weight, vocab_size):
  """Sums of exponentials in logarithms, and what goes backward, in float64."""
  x, kernel, weight = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, kernel, weight))
  logit = x @ kernel[:vocab_size].T
  log_total = np.log(np.exp(logit - logit.max(1, keepdims=True)).sum(1)) + logit.max(1)
  error = np.exp(logit - log_total[:, None])
  error[np.arange(N), target] -= 1
  return log_total, np.pad(error * weight[:, None], ((0, 0), (0, V - vocab_size)))


@pytest.mark.parametrize("vocab_size", [300, V])
def test_against_float64(vocab_size):
  x, kernel, target, weight = _case()
  log_total, error = _exact(x, kernel, target, weight, vocab_size)
  assert head_kernels.fits(x, kernel)
  found = head_kernels.log_totals(x, kernel, vocab_size, interpret=True)
  np.testing.assert_allclose(found, log_total, rtol=1e-6)
  errors = head_kernels.errors(x, kernel, vocab_size, found, target, weight, interpret=True)
  assert errors.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(errors.astype(jnp.float32)), error, rtol=2**-8 + 1e-5, atol=1e-9
  )


@pytest.mark.parametrize(
  ("rows", "columns", "depth", "dtype"),
  [
    (200, V, D, BF16),
    (N, 300, D, BF16),
    (N, V, 96, BF16),
    (N, V, 320, BF16),
    (N, V, D, jnp.dtype(jnp.float32)),
  ],
)
def test_others_are_refused(rows, columns, depth, dtype):
  x, kernel = (jax.ShapeDtypeStruct((size, depth), dtype) for size in (rows, columns))
  assert not head_kernels.fits(x, kernel)


def test_they_lower_for_a_gpu(lowered_for_gpu):
  x, kernel = (jax.ShapeDtypeStruct((size, 256), jnp.bfloat16) for size in (4096, 50304))

  def both(x, kernel, target, weight):
    log_total = head_kernels.log_totals(x, kernel, 50257)
    return head_kernels.errors(x, kernel, 50257, log_total, target, weight)

  of_rows = [jax.ShapeDtypeStruct((4096,), dtype) for dtype in (jnp.int32, jnp.float32)]
  text = lowered_for_gpu(both, x, kernel, *of_rows)
  assert "_totals_kernel" in text and "_errors_kernel" in text


def test_the_head_computes_the_same_with_them(monkeypatch):
  """Of 300 tokens, filled up to 384, and 200 rows in chunks of 128."""
  x, kernel, target, weight = _case()
  x, target, weight = x[:200].astype(jnp.float32), target[:200], weight[:200]
  kernel_DV = kernel[:300].T.astype(jnp.float32)

  def run():
    def loss(x, kernel_DV, weight):
      return head.linear_cross_entropy(x, kernel_DV, target, weight, 128, BF16)

    both = lambda *a: (loss(*a), *jax.value_and_grad(loss, (0, 1, 2))(*a))  # noqa: E731
    return jax.jit(both)(x, kernel_DV, weight)

  plain, value, gradients = run()
  monkeypatch.setattr(device, "has_hopper_kernels", lambda: True)
  monkeypatch.setattr(head, "_ALIGNMENT", {})
  for name in ("log_totals", "errors"):
    kernel_of = getattr(head_kernels, name)
    monkeypatch.setattr(head_kernels, name, functools.partial(kernel_of, interpret=True))
  found = run()
  np.testing.assert_allclose(found[:2], (plain, value), rtol=1e-5)
  for one, other in zip(found[2], gradients, strict=True):
    assert one.shape == other.shape
    assert np.linalg.norm(one - other) < 2e-3 * np.linalg.norm(other)
  monkeypatch.setattr(head_kernels, "errors", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run()


@pytest.mark.parametrize(("mesh", "taken"), [((4, 2, 1), True), ((2, 2, 2), False)])
def test_on_a_mesh_that_splits_the_vocabulary_they_are_not_used(mesh, taken):
  x, kernel, *_ = _case()
  on = AbstractMesh(mesh, sharding.AXES, axis_types=sharding.AXIS_TYPES)
  with jax.sharding.use_abstract_mesh(on):
    assert head_kernels.fits(x, kernel) == taken
