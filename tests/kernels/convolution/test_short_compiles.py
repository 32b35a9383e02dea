"""The short convolution compiles for sm_80 and sm_90 without a GPU, and spills no registers."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
short = pytest.importorskip("retnet.kernels.convolution.short")
shapes_of = pytest.importorskip("retnet.kernels.convolution.geometry")
geometry, registers = shapes_of.geometry, shapes_of.registers

NARROW = ("x", "weight", "recent", "bias", "y", "final", "dy", "dfinal", "dx", "drecent")


def compiled(kernel, constants: dict, capability: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not constants["PACKED"]:
        constants = {**constants, "table": None, "cu_seqlens": None, "first_slot": None}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "cu_seqlens":
            return "*i64"
        if name in ("table", "first_slot"):
            return "*i32"
        return "*bf16" if name in NARROW else "*fp32" if name == "sums" else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})


@pytest.mark.slow
@pytest.mark.parametrize("W", [4, 8])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("absent", [(), ("recent", "bias", "dfinal")], ids=["state", "no state"])
@pytest.mark.parametrize("kernel", [short._forward_kernel, short._backward_kernel], ids=["forward", "backward"])
def test_a_kernel_compiles_and_does_not_spill(kernel, W, absent, packed, capability, tmp_path):
    import triton.backends.nvidia as nvidia

    tile = geometry(W, 8192, 4096, backward=kernel is short._backward_kernel)
    shapes = {
        "UNIT": 8, "C": 4096, "W": W, "BC": tile.channels, "L": tile.segment, "ROWS": tile.rows, "ACTIVATION": "silu",
        "PACKED": packed,
    }  # fmt: skip
    result = compiled(kernel, {**shapes, **{name: None for name in absent if name in kernel.arg_names}}, capability)
    wide = f"ld.global.v{tile.channels // 32 // 2}"
    assert wide in result.asm["ptx"], "rows are not read in wide words"
    assert "st.shared" not in result.asm["ptx"], "rows move between threads"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no disassembler")
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", usage).group(1)) == 0, usage
    assert int(re.search(r"REG:(\d+)", usage).group(1)) <= registers(W, tile.rows, kernel is short._backward_kernel)
