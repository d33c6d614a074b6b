"""Sample calls under torch.compile on a GPU that is not here: `python -m testing.triton_compile.trace`."""

import json
import logging
import operator
import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
import triton
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from testing import op_samples as samples
from tokenprune_kernels import _triton

from .record import Driver

triton.runtime.driver.set_active(Driver("sm_90"))  # is asked for its target when a kernel's writes are looked for
ops = _triton.namespace()
warned: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("torch._higher_order_ops.triton_kernel_wrap").addHandler(handler)


SIZES = samples.Sizes(batch=3)  # unlike the number of heads
CHANGING = (SIZES.batch, SIZES.tokens, SIZES.rows)  # from call to call; heads and channels are those of the model


def fakes(tensors: list[torch.Tensor], sizes: str, mode: FakeTensorMode) -> list[torch.Tensor]:
    """Tensors of these shapes on a GPU; equal `symbolic` sizes are one symbol, as torch.compile has it."""
    symbol: dict[int, Any] = {}
    for size in CHANGING if sizes == "symbolic" else ():
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK])
        symbol[size] = mode.from_tensor(torch.empty(size), symbolic_context=context).shape[0]
    with mode:
        return [torch.empty([symbol.get(s, s) for s in t.shape], dtype=t.dtype, device="cuda") for t in tensors]


def allocated(node: Node) -> bool:
    if node.target is operator.getitem:
        return node.args[0].target is triton_kernel_wrapper_functional
    return node.op == "call_function" and "empty" in str(node.target)


def traced(op: str, name: str, sizes: str) -> dict[str, Any]:
    call = samples.make(op, name, SIZES)
    given = [n for n, _, _ in samples.tensors(call)]
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    inputs = fakes([t for _, t, _ in samples.tensors(call)], sizes, mode)

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args, kwargs = samples.positional(samples.with_arguments(call, **dict(zip(given, tensors, strict=True))))
            return tuple(samples.outputs(getattr(ops, op)(*args, **kwargs)))

    warned.clear()
    with mode:
        graph = aot_export_module(Module(), tuple(inputs), trace_joint=False)[0].graph
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    kernels = [n for n in nodes if n.target is triton_kernel_wrapper_functional]
    return {
        "kernels": len(kernels),
        "opaque": [str(n.target) for n in nodes if "tokenprune" in str(n.target)],
        "cloned inputs": [
            name for n in kernels for name in n.kwargs["tensors_to_clone"] if not allocated(n.kwargs["kwargs"][name])
        ],
        "written": [len(n.kwargs["tensors_to_clone"]) for n in kernels],
        "symbols": len(shapes.var_to_range),
        "made constant": sorted(int(v) for v in shapes.replacements.values() if v.is_number),
        "warned": warned[:1],
    }


def main() -> None:
    told = {}
    for op, name in json.loads(sys.argv[1]):
        for sizes in ("fixed", "symbolic"):
            try:
                told[f"{op} {name} {sizes}"] = traced(op, name, sizes)
            except Exception as error:
                told[f"{op} {name} {sizes}"] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
