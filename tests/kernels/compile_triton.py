"""Compiles every Triton kernel for two generations of GPU, which needs none: python -m tests.kernels.compile_triton."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltalab.kernels.triton import RANK, ROW, cross_entropy, dora_norm, rms_norm, swiglu

ARCHITECTURES = (80, 90)


def compiled(kernel, types, constants, warps=4):
    """types: of the arguments, `x:*bf16`, in words."""
    signature = dict(word.split(":") for word in types.split()) | dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    for architecture in ARCHITECTURES:
        source = ASTSource(fn=kernel, signature=ordered, constexprs=fixed)
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
        print(f"sm_{architecture} {kernel.__name__} {constants} {len(made.asm['cubin'])} bytes")


def main():
    for t in ("*bf16", "*fp32"):
        for on in (False, True):
            compiled(
                cross_entropy._rows,
                f"z:{t} targets:*i64 weights:*fp32 losses:*fp32 stride:i32 V:i32 scale:fp32 cap:fp32 smoothing:fp32",
                {"CAPPED": on, "SMOOTHED": on, "GRADED": True, "WEIGHED": on, "TILE": cross_entropy.MOST},
                warps=8,
            )
        compiled(
            swiglu._ahead, f"g:{t} u:{t} h:{t} n:i32 g_row:i32 u_row:i32 h_row:i32", {"TILE": swiglu.MOST}
        )  # fmt: skip
        compiled(
            swiglu._back,
            f"g:{t} u:{t} dh:{t} dg:{t} du:{t} n:i32 g_row:i32 u_row:i32 h_row:i32 dg_row:i32 du_row:i32",
            {"TILE": swiglu.MOST},
        )
        for size in (2048, ROW):
            compiled(
                rms_norm._ahead,
                f"x:{t} w:*fp32 y:{t} scale:*fp32 n:i32 x_row:i32 y_row:i32 eps:fp32 plus:fp32",
                {"WEIGHED": True, "AGAIN": False, "TILE": size},
                warps=rms_norm._warps(size),
            )
            compiled(
                rms_norm._back,
                f"dy:{t} x:{t} w:*fp32 scale:*fp32 dx:{t} dw:*fp32 m:i32 n:i32 dy_row:i32 x_row:i32 dx_row:i32 plus:fp32",
                {"WEIGHED": True, "TRAINED": True, "TILE": size},
                warps=rms_norm._warps(size),
            )
        for rank in (16, RANK):
            compiled(
                dora_norm._squares,
                f"W:{t} A:*fp32 B:*fp32 G:*fp32 found:*fp32 out:i32 n:i32 r:i32 s:fp32 w_row:i32 w_col:i32",
                {"OUT": dora_norm.OUT, "IN": dora_norm.IN, "R": rank},
            )


if __name__ == "__main__":
    main()
