"""Collectives read off HLO text: a program written by hand, and one that XLA partitions."""

import pytest

from benchmarks.collectives import Collective, collectives

LOOP = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %r = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %r)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[16,4] {
  %w = (s32[], f32[8,4]) while(%init), condition=%condition, body=%body, CONFIG
  %y = f32[8,4]{1,0} get-tuple-element(%w), index=1
  %s = (bf16[1,4]{1,0}, bf16[2,4]{1,0}) all-gather-start(%y), replica_groups={{0,1},{2,3}}, dim
  %d = bf16[2,4] all-gather-done(%s)
  %t = ((f32[8]{0}, bf16[4]), (f32[4]{0}, /*index=1*/bf16[2]), u32[]) reduce-scatter-start(%y, %z)
  %u = (f32[4], bf16[2]) reduce-scatter-done(%t)
  %v = (f32[3]{0}, f32[5]{0}) all-reduce-start(%y, %z), replica_groups={{0,1}}, to_apply=%add
  %q = ((f32[6,2]), f32[6,2]) all-to-all-start(%y), replica_groups={{0,1}}, dimensions={0}
  %alone = f32[4] all-reduce(%y), replica_groups={{0},{1}}, to_apply=%add
  ROOT %p = f32[16,4]{1,0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"3"}}'


def test_a_program_by_hand():
  found = collectives(LOOP.replace("CONFIG", KNOWN), num_devices=8)
  assert found == [
    Collective("all-reduce", devices=4, span=4, bytes=8 * 4 * 4, times=3),
    Collective("all-gather", devices=2, span=2, bytes=2 * 4 * 2, times=1),
    Collective("reduce-scatter", devices=8, span=8, bytes=4 * 4, times=1),
    Collective("reduce-scatter", devices=8, span=8, bytes=2 * 2, times=1),
    Collective("all-reduce", devices=2, span=2, bytes=3 * 4, times=1),
    Collective("all-reduce", devices=2, span=2, bytes=5 * 4, times=1),
    Collective("all-to-all", devices=2, span=2, bytes=6 * 2 * 4, times=1),
    Collective("collective-permute", devices=2, span=2, bytes=16 * 4 * 4, times=1),
  ]


def test_a_loop_of_unknown_length_is_refused_or_given_a_length():
  unknown = LOOP.replace("CONFIG", "")
  with pytest.raises(ValueError, match="unknown length communicates"):
    collectives(unknown, num_devices=8)
  assert [c.times for c in collectives(unknown, num_devices=8, turns=5)] == [5] + [1] * 7
  known = LOOP.replace("CONFIG", KNOWN)
  assert collectives(known, num_devices=8, turns=5) == collectives(known, num_devices=8)


@pytest.mark.parametrize(
  ("groups", "devices", "span"),
  [
    ("replica_groups=[2,4]<=[8]", 4, 4),  # {0,1,2,3}, {4,5,6,7}
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 5),  # {0,4}, {1,5}, ...
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", 2, 3),  # {0,2}, {1,3}, ...
    ("replica_groups={{0,3,6},{1,4,7}}", 3, 7),
    ("source_target_pairs={{0,0},{1,2},{6,2}}, channel_id=3", 2, 5),
    ("channel_id=1", 8, 8),
    ("replica_groups={}, to_apply=%add", 8, 8),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add", 4, 4),  # {0,1,2,3}, ...
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 2, 5),  # {0,4}, ...
    # Along b, one of 2 in c: the columns of [[0,1,2,3], [4,5,6,7]] are c's.
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", 4, 4),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", 2, 5),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([8]) {'a','c'}", 4, 6),  # {0,1,4,5}
    ("replica_groups=mesh['a'=8] {'a':(1)4}, to_apply=%add", 4, 7),  # {0,2,4,6}
    ("replica_groups=mesh['a'=8] {'a':(2)4}", 4, 4),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", 2, 3),  # {0,2}
    # Device 4 i + 2 j + k stands in row (k, j) and column i.
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(2,1,0)) {'a':(2)2}", 2, 3),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(2,1,0)) {'a':(1)2,'b'}", 4, 6),
  ],
)
def test_who_talks_to_whom(groups, devices, span):
  line = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4] all-reduce(%x), {groups}\n}}"
  assert collectives(line, num_devices=8) == [Collective("all-reduce", devices, span, 16, 1)]


@pytest.mark.parametrize(
  "groups",
  [
    "replica_groups=@groups",
    "replica_groups=mesh['a'=8] {'b'}",
    "replica_groups=mesh['a'=8] {'a',a}",
  ],
)
def test_groups_in_words_that_are_not_known_are_refused(groups):
  """They were once taken for all devices, and a link within a node for the network."""
  line = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  ROOT %r = f32[4] all-reduce(%x), {groups}\n}}"
  with pytest.raises(ValueError, match="groups of devices that are not understood: , replica_gr"):
    collectives(line, num_devices=8)


PARTITIONED = """
%body (p: bf16[8,4]) -> bf16[8,4] {
  %r = bf16[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %d = bf16[2,4]{1,0} dynamic-slice(%r, %i, %zero), dynamic_slice_sizes={2,4}
  %whole = f32[5]{0} all-reduce(%y), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  %part = f32[2]{0} dynamic-slice(%whole, %i), dynamic_slice_sizes={2}
  %other = f32[3]{0} add(%z, %whole)
  ROOT %g = bf16[16]{0} all-gather(%d), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: bf16[16]) -> bf16[16] {
  %a = bf16[4,6]{1,0} all-to-all(%x), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %h = f32[7]{0} all-gather(%b), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
  %j = bf16[7]{0} all-gather(%c), channel_id=6, replica_groups=[2,4]<=[8], dimensions={0}
}
"""


@pytest.mark.parametrize(
  ("shape", "kind", "counted"),
  [
    # As it was asked for: in bfloat16, and each device takes a quarter of the sum.
    ("f32[8,4]", "all-reduce", [("reduce-scatter", 2 * 32 // 4)]),
    ("f32[4,8]{0,1}", "all-reduce", [("reduce-scatter", 2 * 32 // 4)]),
    # A sum that is needed whole, too; one nobody asked for; several in one.
    ("f32[5]", "all-reduce", [("all-reduce", 20)]),
    ("f32[6]", "all-reduce", [("all-reduce", 24)]),
    (
      "(f32[5], f32[8,4], f32[5])",
      "all-reduce",
      [("all-reduce", 20), ("reduce-scatter", 16), ("all-reduce", 20)],
    ),
    ("f32[16]", "all-gather", [("all-gather", 32)]),
    # Two of this size, in two types.
    ("f32[7]", "all-gather", [("all-gather", 28)]),
    # Written as the pieces for four devices.
    ("(f32[1,6], f32[1,6], f32[1,6], f32[1,6])", "all-to-all", [("all-to-all", 48)]),
  ],
)
def test_what_the_partitioner_asked_for_counts(shape, kind, counted):
  head = "ENTRY %main (x: f32[4]) -> f32[4] {"
  line = f"{head}\n  ROOT %r = {shape} {kind}(%x), replica_groups=[2,4]<=[8]\n}}"
  found = collectives(line, num_devices=8, partitioned=PARTITIONED)
  assert found == [Collective(k, 4, 4, size, 1) for k, size in counted]


@pytest.mark.parametrize(
  ("kind", "sent"),
  [
    ("all-reduce", 2 * 3 / 4 * 100),
    ("all-gather", 3 / 4 * 100),
    ("reduce-scatter", 3 * 100),
    ("all-to-all", 3 / 4 * 100),
    ("collective-permute", 100),
  ],
)
def test_bytes_sent_by_rings_of_four(kind, sent):
  assert Collective(kind, devices=4, span=4, bytes=100, times=1).sent == sent
  assert Collective(kind, devices=4, span=9, bytes=100, times=5).sent == 5 * sent
