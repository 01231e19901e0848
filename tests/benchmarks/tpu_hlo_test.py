"""What a TPU program costs, added up by hand from a small one."""

import re
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
HloModule step

%fused (a: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} add(%a, %a)
}

%all-reduce-scatter.1 (a: f32[64]) -> f32[16] {
  %sum = f32[64]{0} all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[16]{0} dynamic-slice(%sum, %i)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %whole = bf16[1024]{0} all-gather(%x), replica_groups=[1,8]<=[8]
  %f = f32[8]{0} fusion(%b), calls=%fused, COST=70
  %k = f32[8]{0} custom-call(%b), custom_call_target="tpu_custom_call", KERNEL
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %f)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: f32[64]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  %fusion.3 = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %moved = f32[100]{0} collective-permute(%q), source_target_pairs={{0,1}}
  ROOT %g = f32[8]{0} fusion(%w), calls=%fused, COST=9
}
"""


@pytest.fixture
def tpu_hlo(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  import tpu_hlo

  yield tpu_hlo
  sys.modules.pop("tpu_hlo")


def test_loops_count_each_time_and_fused_collectives_once(tpu_hlo):
  estimate = r'backend_config={"estimated_cycles":"\1"}'
  kernel = '{"cost_estimate":{"bytes_accessed":"20","flops":"300"}}'
  program = re.sub(r"COST=(\d+)", estimate, PROGRAM)
  found = tpu_hlo.cost(program.replace("KERNEL", kernel), chips=8)
  assert found.cycles == 5 * 70 + 9
  assert found.kernels == [(5, 300, 20)]
  assert found.sent == {
    "all-gather": 5 * 2048 * 7 / 8,
    "reduce-scatter": 256 * 3 / 4,
    "collective-permute": 400,
  }
  assert found.computations == 5
