"""The selective scan compiles for sm_80 and sm_90 without a GPU, and keeps its states in registers."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
forward = pytest.importorskip("retnet.kernels.scan.forward")
inputs = pytest.importorskip("retnet.kernels.scan.inputs")
chain = pytest.importorskip("retnet.kernels.scan.chain")
backward = pytest.importorskip("retnet.kernels.scan.backward")

HALF = ("x", "write", "read", "y", "dy", "dx")
KERNELS = [
    pytest.param(forward._segment_states, {}, id="states of segments"),
    pytest.param(chain._chain_kernel, {"REVERSE": True}, id="joined"),
    pytest.param(forward._outputs, {}, id="outputs"),
    pytest.param(backward._segment_adjoints, {}, id="adjoints of segments"),
    pytest.param(backward._gradients, {"R": backward.RUN}, id="gradients"),
]


def compiled(kernel, constants: dict, capability: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, "table": None, "cu_seqlens": None, "first_slot": None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("T", "tokens") or name.endswith("_stride"):
            return "i32"
        return "*bf16" if name in HALF else "*fp32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kernel", "extra"), KERNELS)
def test_a_kernel_compiles_and_spills_at_most_64_bytes(kernel, extra, capability, tmp_path):
    import triton.backends.nvidia as nvidia

    N, tile = 16, inputs.numbers_per_program(None) // (2 if kernel is backward._gradients else 1)
    shapes = {"D": 1536, "N": N, "BN": N, "BD": tile // N, "L": 32, "PACKED": False}
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(kernel, shapes | extra, capability).asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no disassembler")
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= 64, "registers spill"
