import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax.models import head

D = 4
F32 = jnp.dtype(jnp.float32)


def _case(num_rows, vocab_size, seed=0):
  """(x, kernel, weights) and targets; weights of 0, 1 and in between."""
  rng = np.random.default_rng(seed)
  x_ND = rng.standard_normal((num_rows, D)).astype(np.float32)
  kernel_DV = rng.standard_normal((D, vocab_size)).astype(np.float32)
  weight_N = np.resize([1, 0, 1, 0.25], num_rows).astype(np.float32)
  target_N = rng.integers(vocab_size, size=num_rows).astype(np.int32)
  target_N[:2] = 0, vocab_size - 1
  return (x_ND, kernel_DV, weight_N), target_N


def _naive(x_ND, kernel_DV, weight_N, target_N):
  logit_NV = x_ND @ kernel_DV
  total = 0.0
  for logit_V, weight, target in zip(logit_NV, weight_N, target_N, strict=True):
    top = logit_V.max()
    total += weight * (np.log(np.sum(np.exp(logit_V - top))) + top - logit_V[target])
  return total


@pytest.fixture(scope="module")
def loss():
  """(arguments, targets, rows) -> loss without gradient, loss with it, gradients."""

  def run(arguments, target_N, rows, dtype=F32, factor=1.0):
    def plain(arguments):
      x_ND, kernel_DV, weight_N = arguments
      summed = head.linear_cross_entropy(x_ND, kernel_DV, target_N, weight_N, rows, dtype)
      return factor * summed

    return jax.jit(lambda a: (plain(a), *jax.value_and_grad(plain)(a)))(arguments)

  return run


# Chunks of one row, of a size that does not divide N, that does, of all rows, and of more.
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(10, 11), (7, 30)])
@pytest.mark.parametrize("rows", [1, 3, 5, 7, 10, 16])
def test_loss_and_gradients_match_the_naive_sum(rows, num_rows, vocab_size, loss, assert_slopes):
  arguments, target_N = _case(num_rows, vocab_size)
  # A factor: what lies behind the loss scales its gradients.
  plain, value, gradients = loss(arguments, target_N, rows, factor=2.5)
  wanted = 2.5 * _naive(*(np.asarray(a, np.float64) for a in arguments), target_N)
  np.testing.assert_allclose([plain, value], wanted, rtol=1e-6)
  assert_slopes(lambda a: 2.5 * _naive(*a, target_N), arguments, gradients)


# Columns of tokens that do not exist are added to the first and the last.
@pytest.mark.parametrize("vocab_size", [11, 128, 130])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_accelerators_find_the_same(vocab_size, scale, loss, monkeypatch):
  (x_ND, kernel_DV, weight_N), target_N = _case(10, vocab_size)
  arguments = (scale * x_ND, kernel_DV, weight_N)
  expected = loss(arguments, target_N, 4)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  found = loss(arguments, target_N, 4)
  assert found[2][1].shape == (D, vocab_size)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), found, expected)
  wanted = _naive(*(np.asarray(a, np.float64) for a in arguments), target_N)
  np.testing.assert_allclose(found[:2], wanted, rtol=1e-5)


def test_one_pass_over_logits_of_any_size():
  logit_nV = np.array([[1, 2, 3], [-1e4, 0, 1e4], [5, 5, 5], [-3e38, 1, -3e38]], np.float32)
  top_n, total_n = head._top_and_total(jnp.asarray(logit_nV))
  np.testing.assert_array_equal(top_n, [3, 1e4, 5, 1])
  np.testing.assert_allclose(total_n, [1 + np.exp(-1) + np.exp(-2), 1, 3, 1], rtol=1e-6)


def test_two_tokens_by_hand(loss):
  # V = 3, logits = x kernel = (ln 2, 0, 0) for both rows: softmax (1/2, 1/4, 1/4). Targets 0 and 2
  # with weights 1 and 3: ln 2 + 3 ln 4 = 7 ln 2. d/dx_0 = (1/2 - 1) ln 2; kernel's gradient:
  # row 0 (-1/2, 1/4, 1/4), row 1 3 (1/2, 1/4, -3/4), x = 1: sum (1, 1, -2).
  arguments = (
    np.ones((2, 1), np.float32),
    np.log(np.array([[2, 1, 1]], np.float32)),
    np.array([1, 3], np.float32),
  )
  plain, value, (grad_ND, grad_DV, grad_N) = loss(arguments, np.array([0, 2], np.int32), 2)
  np.testing.assert_allclose([plain, value], 7 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(grad_ND[:, 0], [-np.log(2) / 2, 1.5 * np.log(2)], rtol=1e-6)
  np.testing.assert_allclose(grad_DV[0], [1, 1, -2], rtol=1e-6)
  np.testing.assert_allclose(grad_N, [np.log(2), np.log(4)], rtol=1e-6)


def test_tokens_of_weight_zero_have_no_gradient_and_do_not_count(loss):
  arguments, target_N = _case(10, 11)
  _, value, (grad_ND, grad_DV, grad_N) = loss(arguments, target_N, 3)
  masked = arguments[2] == 0
  assert masked.sum() == 3 and not np.any(grad_ND[masked])
  # Their own loss is still the gradient by the weight.
  assert np.all(grad_N > 0)
  x_ND = np.where(masked[:, None], 50.0, arguments[0]).astype(np.float32)
  changed = np.where(masked, 5, target_N).astype(np.int32)
  _, again, (_, grad_again_DV, _) = loss((x_ND, *arguments[1:]), changed, 3)
  assert again == value
  np.testing.assert_array_equal(grad_again_DV, grad_DV)


def test_large_logits_do_not_overflow(loss):
  (x_ND, kernel_DV, weight_N), target_N = _case(7, 11)
  arguments = (100 * x_ND, 100 * kernel_DV, weight_N)
  _, value, gradients = loss(arguments, target_N, 4)
  wanted = _naive(*(np.asarray(a, np.float64) for a in arguments), target_N)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_products_accumulate_in_float32(loss):
  arguments, target_N = _case(10, 30)
  exact = loss(arguments, target_N, 4)
  rough = loss(arguments, target_N, 4, dtype=jnp.dtype(jnp.bfloat16))
  np.testing.assert_allclose(rough[1], exact[1], rtol=0.02)
  for one, other in zip(rough[2], exact[2], strict=True):
    assert one.dtype == jnp.float32
    np.testing.assert_allclose(one, other, atol=0.05)


# 2^21 entries per chunk on CPU: 2^21 / 3000 = 699.1 -> 512 rows; 2^21 / 2048 = 1024 exactly;
# never less than 256; never more than there are.
@pytest.mark.parametrize(
  ("num_rows", "vocab_size", "rows"),
  [
    *((4096, 3000, 512), (4096, 2048, 1024), (4096, 2**20, 256)),
    *((100, 50257, 100), (10, 2**20, 10), (256, 50257, 256)),
    # Nearly equal parts: 2 of 384, 3 of 384, 5 of 256 rows.
    *((600, 3000, 384), (1025, 3000, 384), (1030, 50257, 256)),
  ],
)
def test_chunk_rows(num_rows, vocab_size, rows, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  assert head.chunk_rows(num_rows, vocab_size) == rows


def test_logits_never_exist_whole():
  arguments, target_N = _case(64, 30)

  def plain(x_ND, kernel_DV, weight_N):
    return head.linear_cross_entropy(x_ND, kernel_DV, target_N, weight_N, 8, F32)

  text = str(jax.make_jaxpr(jax.grad(plain, argnums=(0, 1, 2)))(*arguments))
  assert "f32[8,30]" in text and "[64,30]" not in text and "[8,8,30]" not in text
