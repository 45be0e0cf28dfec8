"""What is read from the text of a compiled program."""

from train.program import Traffic, collectives, kernels

# Two loops, one in the other, as the TPU compiler writes them: 3 x 4 runs of the innermost body.
NESTED = """
HloModule jit_step, is_scheduled=true

%inner_body.1 (p.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x.1 = bf16[2,16]{1,0} get-tuple-element(%p.1), index=1
  %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%x.1), channel_id=1, dimensions={0}
  %k.1 = (f32[4]{0}, f32[4]{0}) custom-call(%x.1), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/delta_rule_forward/pallas_call"}
}

%inner_condition.1 (p.2: (s32[], bf16[8,16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4)
  %p.2 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.2 = pred[] compare(%i.2, %constant.1), direction=LT
}

%outer_body.1 (p.3: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.3 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %while.3 = (s32[], bf16[8,16]{1,0}) while(%p.3), condition=%inner_condition.1, body=%inner_body.1
  %y.3 = f32[16]{0} fusion(%p.3), kind=kLoop, calls=%all-reduce-scatter.7
  %v.3 = bf16[2,4]{1,0} copy(%p.3)
  %start.3 = (bf16[2,4]{1,0}, bf16[2,4]{1,0}) collective-permute-start(%v.3), channel_id=5
  %done.3 = bf16[2,4]{1,0} collective-permute-done(%start.3)
}

%all-reduce-scatter.7 (p.4: f32[64]) -> f32[16] {
  %p.4 = f32[64]{0} parameter(0)
  %all-reduce.4 = f32[64]{0} all-reduce(%p.4), channel_id=9, to_apply=%add.1
  ROOT %slice.4 = f32[16]{0} dynamic-slice(%all-reduce.4, %p.4), dynamic_slice_sizes={16}
}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_computation.1 (p.5: bf16[8]) -> bf16[32] {
  %p.5 = bf16[8]{0} parameter(0)
  %all-gather.5 = bf16[32]{0} all-gather(%p.5), channel_id=30, dimensions={0}
}

%async_collective_fusion.2 (p.6: bf16[8]) -> bf16[32] {
  %p.6 = bf16[8]{0} parameter(0)
  %all-gather.6 = bf16[32]{0:S(1)} all-gather(%p.6), channel_id=30, dimensions={0}
}

ENTRY %main.9 (p.7: bf16[8]) -> f32[] {
  %p.7 = bf16[8]{0} parameter(0)
  %tuple.7 = (s32[], bf16[8,16]{1,0}) tuple(%p.7)
  %while.7 = (s32[], bf16[8,16]{1,0}) while(%tuple.7), condition=%c.1, body=%outer_body.1, \
backend_config={"known_trip_count":{"n":"3"}}
  %f.7 = bf16[32]{0} fusion(%p.7), kind=kCustom, calls=%fused_computation.1
  %f.8 = bf16[32]{0} fusion(%p.7), kind=kCustom, calls=%async_collective_fusion.2
  %z.1 = f32[100]{0} parameter(1)
  %z.2 = f32[] parameter(2)
  %all-reduce.7 = (f32[100]{0}, f32[]) all-reduce(%z.1, %z.2), channel_id=31, to_apply=%add.1
}
"""


def test_loops_count_as_often_as_they_run():
    assert kernels(NESTED) == {"delta_rule_forward": 12}
    found = collectives(NESTED)
    assert found["collective-permute"] == Traffic(3, 3 * 2 * 4 * 2)


def test_a_collective_spread_over_fusions_counts_once():
    assert collectives(NESTED)["all-gather"] == Traffic(12 + 1, 12 * 8 * 16 * 2 + 32 * 2)


def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
    assert collectives(NESTED)["reduce-scatter"] == Traffic(3, 3 * 64 * 4)


def test_all_operands_of_a_combined_collective_count():
    assert collectives(NESTED)["all-reduce"] == Traffic(1, 404)


def test_a_program_of_one_device_has_none():
    assert collectives("ENTRY %main.1 (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0)\n}") == {}
