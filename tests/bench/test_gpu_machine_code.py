"""Counting instructions of machine code, on listings written by hand in nvdisasm's form."""

from __future__ import annotations

import pytest

from bench.gpu_machine_code import Listing, MachineCode, counts_of
from tests.lora_runtime.kernels.fake_gpu import CARDS

LISTING = """
.text._some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LOP3.LUT R2, R2, 0xf, RZ, 0xc0, !PT ;
        /*0030*/              @!P1 LDG.E.128 R4, desc[UR6][R8.64+0x10] ;
.L_x_2:
        /*0040*/                   LDS R3, [R2] ;
        /*0050*/                   LDS.128 R12, [R2+0x10] ;
        /*0060*/                   LDSM.16.M88.4 R16, [R3] ;
        /*0070*/                   FMUL R3, R3, R4 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/              @UP0 BRA `(.L_x_0) ;
.L_x_1:
        /*00c0*/                   ATOMG.E.ADD.STRONG.GPU PT, R0, desc[UR8][R12.64], R3 ;
{merge}
        /*00f0*/                   EXIT ;
.L_x_9:
        /*0100*/                   BRA `(.L_x_9);
"""
LOOP = """.L_x_3:
        /*00d0*/                   LDG.E R4, desc[UR6][R8.64] ;
        /*00e0*/              @!P0 BRA `(.L_x_3) ;"""


def test_the_main_loop_is_the_largest_and_a_pass_is_counted_by_pipe():
    body = Listing(LISTING.format(merge="")).main_loop()
    assert [name for name, _ in body][::9] == ["LOP3.LUT", "BRA"]
    tensor = 64 * 16 * 16 / 2048 / 4
    wavefronts = 1 + 4 + 4
    assert counts_of(body) == {
        "issue": 10, "integer": 1, "shared": wavefronts, "stores": 0, "tensor": tensor,
    }  # fmt: skip


@pytest.mark.parametrize(("merge", "expected"), [("", False), (LOOP, True)])
def test_a_serial_merge_is_a_loop_behind_the_atomic(merge, expected):
    assert Listing(LISTING.format(merge=merge)).loops_after_an_atomic() is expected


@pytest.mark.parametrize(
    ("stores", "sectors"),
    [
        (["STG.E.128"] * 2, 2 * 512 // 32),
        (["STG.E.U16"], 64 // 32),
        (["STG.E.U16"] * 16, 16 * 32),  # every lane of a store in a sector of its own
    ],
)
def test_stores_that_could_not_be_joined_touch_more_sectors(stores, sectors):
    assert counts_of([(name, "") for name in stores])["stores"] == sectors


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(128, 8192, 4, 4), (129, 8192, 4, 3), (64, 72192, 4, 3), (32, 0, 8, 8), (40, 0, 1, 32)],
)
def test_programs_at_once_are_those_of_the_scarcest_resource(registers, shared, warps, expected):
    code = MachineCode(None, registers, 0, shared, warps, 0, 0, {}, 0, False)
    assert code.programs_at_once(CARDS[90]) == expected
