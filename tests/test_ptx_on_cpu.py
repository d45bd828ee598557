"""The PTX that the tests run on a processor: what it computes, and what it objects to."""

import pytest
import torch

from ptx_on_cpu import parse, places_of, run

# Every thread stores its number times three, and reads the one of the thread opposite.
MIRROR = """
.visible .entry mirror(.param .u64 .ptr .global mirror_param_0)
{
    .reg .b32 %r<8>;
    mov.u32 %r1, %tid.x;
    mul.lo.s32 %r2, %r1, 3;     // what others will read
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [ %r3 + 16 ], { %r2 };
    bar.sync 0;
    sub.s32 %r4, 63, %r1;
    shl.b32 %r4, %r4, 2;
    setp.lt.s32 %p1, %r1, 60;
    mov.b32 %r5, -1;
    @%p1 ld.shared.b32 { %r5 }, [ %r4 + 16 ];
    ld.param.b64 %rd1, [mirror_param_0];
    mad.wide.s32 %rd2, %r1, 4, %rd1;
    st.global.b32 [ %rd2 + 0 ], { %r5 };
    ret;
}
"""

# Copies 16 bytes a thread to shared memory and back.
COPY = """
.visible .entry copy(.param .u64 .ptr .global copy_param_0, .param .u64 .ptr .global copy_param_1)
{
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 4;
    ld.param.b64 %rd1, [copy_param_0];
    ld.param.b64 %rd2, [copy_param_1];
    mad.wide.s32 %rd1, %r1, 16, %rd1;
    mad.wide.s32 %rd2, %r1, 16, %rd2;
    setp.lt.s32 %p1, %r1, 30;
    selp.b32 %r3, 16, 0, %p1;
    cp.async.cg.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x10, %r3;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.v4.b32 { %r4, %r5, %r6, %r7 }, [ %r2 + 0 ];
    st.global.v4.b32 [ %rd2 + 0 ], { %r4, %r5, %r6, %r7 };
    ret;
}
"""


def mirror(ptx):
    found = torch.zeros(64, dtype=torch.int32)
    return found, run(ptx, [found], (1,), warps=2, shared=512)


def test_threads_read_what_others_have_stored():
    found, races = mirror(MIRROR)
    wanted = 3 * torch.arange(63, -1, -1, dtype=torch.int32)
    wanted[60:] = -1
    assert torch.equal(found, wanted)
    assert races == 0


def test_no_barrier_is_a_race():
    _, races = mirror(MIRROR.replace("bar.sync 0;", ""))
    assert races > 0


def test_copies_land_when_they_are_waited_for():
    given, found = torch.arange(128.0), torch.zeros(128)
    wanted = torch.where(torch.arange(128) < 120, given, 0.0)
    assert run(COPY, [given, found], (1,), warps=1, shared=512) == 0
    assert torch.equal(found, wanted)
    too_early = COPY.replace("cp.async.wait_group 0;", "")
    run(too_early, [given, found], (1,), warps=1, shared=512)
    assert found.isnan().all()


def test_memory_of_no_tensor():
    with pytest.raises(IndexError, match="no tensor has 16 bytes"):
        run(COPY, [torch.zeros(64), torch.zeros(128)], (1,), warps=1, shared=512)


def test_unknown_instructions():
    with pytest.raises(NotImplementedError, match="brev"):
        mirror(MIRROR.replace("mul.lo.s32 %r2, %r1, 3;", "brev.b32 %r2, %r1;"))


def test_labels_and_guards():
    code, labels = parse(
        ".entry f() {\n$L__BB0_1:\n  @!%p3 bra $L__BB0_1; // again\n  { mov.b32 %r1, {%rs1, %rs2}; }\n ret;\n}"
    )
    assert labels == {"$L__BB0_1": 0}
    assert [one.guard for one in code] == ["!%p3", None, None]
    assert code[1].operands == ("%r1", "{%rs1, %rs2}")


def test_operands_of_products_are_swizzled():
    """By 128 bytes: 16 bytes of a row change places by its number."""
    descriptor = 1 << 62 | (1024 >> 4) << 32 | 2048 >> 4
    places = places_of(descriptor, rows=16, depth=16, size=2, turned=0)
    assert places[0, 0] == 2048
    assert places[3, 0] == 2048 + 3 * 128 + 3 * 16
    assert places[9, 8] == 2048 + 1024 + 128  # the second 16 bytes of row 1 of the next eight
    assert len(set(places.ravel().tolist())) == 256
