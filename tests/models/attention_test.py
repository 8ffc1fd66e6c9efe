import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hgnn_moe_jax import device
from hgnn_moe_jax.models import attention

SHAPE = (2, 5, 3, 4)  # B, T, G, H


def _normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _inputs(scale=1.0):
  return tuple(scale * _normal(seed, *SHAPE) for seed in range(3))


def _naive(q_BTGH, k_BTGH, v_BTGH):
  """Query by query and key by key, float64."""
  out = np.zeros(q_BTGH.shape)
  B, T, G, H = q_BTGH.shape
  for b in range(B):
    for g in range(G):
      for t in range(T):
        score = [q_BTGH[b, t, g] @ k_BTGH[b, s, g] / H**0.5 for s in range(t + 1)]
        weight = np.exp(np.array(score) - max(score))
        out[b, t, g] = sum(weight[s] * v_BTGH[b, s, g] for s in range(t + 1)) / weight.sum()
  return out


@pytest.fixture(scope="module")
def attend():
  """(q, k, v), cotangent -> output and the three gradients."""

  def both(inputs, cotangent):
    out, pull = jax.vjp(lambda a: attention.causal_attention(*a), inputs)
    return out, pull(cotangent)[0]

  return jax.jit(both)


def test_two_tokens_by_hand():
  # One head, H = 4, so scores are divided by 2. Token 0 sees itself: v_0 = (1, 0, 0, 0). Token 1:
  # scores q k_0 / 2 = 2 ln 3 / 2 = ln 3 and q k_1 / 2 = 0, weights 3/4 and 1/4.
  q = np.zeros((1, 2, 1, 4), np.float32)
  k, v = q.copy(), q.copy()
  q[0, 1, 0, 0], k[0, 0, 0, 0] = 2, np.log(3)
  v[0, 0, 0, 0], v[0, 1, 0, 1] = 1, 8
  out = jax.jit(attention.causal_attention)(q, k, v)
  np.testing.assert_allclose(out[0, :, 0], [[1, 0, 0, 0], [0.75, 2, 0, 0]], rtol=1e-6)


def test_attention_matches_naive_loops(attend, assert_slopes):
  inputs, cotangent = _inputs(), _normal(3, *SHAPE)
  out, gradients = attend(inputs, cotangent)
  np.testing.assert_allclose(out, _naive(*inputs), rtol=1e-5, atol=1e-6)
  assert_slopes(lambda a: np.sum(cotangent * _naive(*a)), inputs, gradients)


def test_later_tokens_are_exactly_unseen(attend):
  inputs, t = _inputs(), 2
  cotangent = np.zeros(SHAPE, np.float32)
  cotangent[0, t] = 1
  out, gradients = attend(inputs, cotangent)
  changed = tuple(np.where(np.arange(5)[None, :, None, None] > t, 7 - a, a) for a in inputs)
  again, _ = attend(changed, cotangent)
  np.testing.assert_array_equal(again[:, : t + 1], out[:, : t + 1])
  assert np.all(again[:, t + 1 :] != out[:, t + 1 :])
  for gradient in gradients:
    assert not np.any(gradient[:, t + 1 :]) and not np.any(gradient[1])
  assert np.all(np.any(gradients[2][0, : t + 1], axis=(1, 2)))


def test_large_scores_do_not_overflow(attend):
  # Scores of about 1e5: their exponentials are beyond float32, the softmax is one key.
  inputs = _inputs(300.0)
  out, gradients = attend(inputs, _normal(3, *SHAPE))
  np.testing.assert_allclose(out, _naive(*inputs), rtol=1e-4, atol=1e-3)
  assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_stays_bfloat16_and_close():
  inputs = tuple(jnp.asarray(a, jnp.bfloat16) for a in _inputs())
  out = jax.jit(attention.causal_attention)(*inputs)
  assert out.dtype == jnp.bfloat16
  wanted = _naive(*(np.asarray(a, np.float64) for a in inputs))
  np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=0.03)


def _rotated(x_H, position):
  x_BTGH = jnp.asarray(x_H).reshape(1, 1, 1, -1)
  return np.asarray(attention.rotate(x_BTGH, jnp.array([[position]])))[0, 0, 0]


def test_rotation_by_hand():
  # H = 4: pairs (0, 2) at frequency 1 and (1, 3) at 10000^-1/2 = 1/100. Position 3 turns the first
  # by 3 radians and the second by 0.03.
  turned = _rotated(np.array([1, 1, 0, 0], np.float32), 3)
  wanted = [np.cos(3), np.cos(0.03), np.sin(3), np.sin(0.03)]
  np.testing.assert_allclose(turned, wanted, rtol=1e-6)
  x_H = _normal(0, 8)
  np.testing.assert_array_equal(_rotated(x_H, 0), x_H)


def test_scores_depend_on_relative_position_only():
  q_H, k_H = _normal(0, 8), _normal(1, 8)
  score = lambda p, s: _rotated(q_H, p) @ _rotated(k_H, s)  # noqa: E731
  for shift in (1, 7, 100):
    np.testing.assert_allclose(score(5 + shift, 3 + shift), score(5, 3), rtol=1e-4, atol=1e-4)
  assert abs(score(5, 3) - score(5, 4)) > 0.1 and abs(score(5, 3) - score(3, 5)) > 0.1


@pytest.mark.parametrize(
  ("recent", "dtype", "length", "head_dim", "fused"),
  [
    (True, jnp.bfloat16, 4, 64, True),
    (True, jnp.bfloat16, 4, 128, True),
    (True, jnp.bfloat16, 4, 12, False),
    (True, jnp.bfloat16, 4, 256, False),
    (True, jnp.bfloat16, 5, 64, False),
    (True, jnp.float32, 4, 64, False),
    (False, jnp.bfloat16, 4, 64, False),
  ],
)
def test_the_fused_kernel_is_used_where_it_exists(
  recent, dtype, length, head_dim, fused, monkeypatch
):
  calls = []
  monkeypatch.setattr(device, "has_ampere_kernels", lambda: recent)
  monkeypatch.setattr(
    jax.nn, "dot_product_attention", lambda q, k, v, **how: calls.append(how) or q
  )
  x_BTGH = jnp.ones((1, length, 2, head_dim), dtype)
  assert attention.causal_attention(x_BTGH, x_BTGH, x_BTGH).shape == x_BTGH.shape
  assert calls == ([{"is_causal": True, "implementation": "cudnn"}] if fused else [])
