"""The experts' weight matrices, as penalties and analyses compare them."""

import jax
import jax.numpy as jnp

from hgnn_moe_jax.layout import FREE, constrain, on_mesh, shards, share_out

# How the axes behind [L, E] are split over a mesh, see `layout.constrain`.
Axes = tuple[str | tuple[str, ...] | None, ...]
_BOTH = ("model", "expert")


def matrices(layers: dict, target: str, stored: bool = False) -> dict[str, jax.Array]:
  """The experts' weight matrices by role, D second last: {role: w_LEDK}.

  Args:
    layers: the stacked parameters of `expert.ExpertBlocks`, leading axes [L, E].
    target: "ffn_input" (K = F), "ffn_output" (transposed, K = F), "attention" (two roles: joint
      queries, keys and values with K = 3 N H, and the output projection transposed, K = N H), or
      "combined" (all four). Roles are never mixed: their matrices do different work.
    stored: for products of entries, whose order is the same for all experts and else of no matter:
      leave the two sides of a matrix in the order in which they lie in memory, and on a mesh give
      each device a part of every expert's matrix.
  """
  ffn_in, ffn_out = layers["ffn_in_kernel"], layers["ffn_out_kernel"]
  qkv, out = layers["qkv_kernel"], layers["out_kernel"]
  if stored:
    roles = {
      "ffn_input": _shared(ffn_in, (FREE, "model"), (FREE, _BOTH)),
      "ffn_output": _shared(ffn_out, ("model", FREE), (_BOTH, FREE)),
      "attention_input": _joint(_shared_heads(qkv)),
      "attention_output": _shared(out, ("model", FREE), (_BOTH, FREE)),
    }
  else:
    # Whole matrices, of each device's own experts.
    ffn_in, ffn_out, qkv, out = (share_out(w, (1,)) for w in (ffn_in, ffn_out, qkv, out))
    roles = {
      "ffn_input": ffn_in,
      "ffn_output": jnp.swapaxes(ffn_out, -1, -2),
      "attention_input": _joint(qkv),
      "attention_output": jnp.swapaxes(out, -1, -2),
    }
  chosen = {"attention": ("attention_input", "attention_output"), "combined": tuple(roles)}
  return {role: roles[role] for role in chosen.get(target, (target,))}


def _joint(w: jax.Array) -> jax.Array:
  """[L, E, D, ...] -> [L, E, D, K]."""
  return w.reshape(*w.shape[:3], -1)


def _shared(w: jax.Array, declared: Axes, *steps: Axes) -> jax.Array:
  """w [L, E, ...], of which each device gets a part, for all experts.

  To bring the whole matrices of eight devices together would move eight times as much.

  Args:
    w: the experts' matrices.
    declared: how the axes behind E are split where w lies, and where its gradient comes back.
    steps: how they are split then. Each step moves one axis of the mesh: several at once make the
      partitioner bring whole arrays together.
  """
  w = constrain(w, None, "expert", *declared)
  for axes in steps:
    w = constrain(w, None, None, *axes)
  return w


def _shared_heads(w_LEDSNH: jax.Array) -> jax.Array:
  """`_shared` by heads or, where these are too few, by their width.

  The axis that is split becomes the first one behind D: the joint axis is split in the same places.
  """
  if not on_mesh():
    return w_LEDSNH
  declared = (FREE, None, "model", None)
  if w_LEDSNH.shape[4] % shards(*_BOTH) == 0:
    return jnp.moveaxis(_shared(w_LEDSNH, declared, (FREE, None, _BOTH, None)), 4, 3)
  steps = (FREE, None, "model", "expert"), (FREE, None, None, ("expert", "model"))
  return jnp.moveaxis(_shared(w_LEDSNH, declared, *steps), 5, 3)
