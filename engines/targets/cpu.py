"""The `cpu` target: a stage's graph made ready for ONNX Runtime's CPU provider.

Functions are inlined by ONNX Runtime itself, except attention: the standard operator materialises the [heads, N, N] scores there
(1.3 GiB at 4,096 tokens and 12 heads against 0.5 GiB), so it becomes the contributed one, which tiles.
"""

import onnx
from onnx import helper

from runtime.specs import FUNCTION_DOMAIN, StageSpec

CONTRIB_DOMAIN = "com.microsoft"


def build_engine(graph: onnx.ModelProto, stage: StageSpec) -> bytes:
    """The engine file of `stage` for the CPU: an ONNX model without weights."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    _lower_attention(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _lower_attention(model: onnx.ModelProto) -> None:
    """Replace the body of `wanrt::Attention` by ONNX Runtime's tiled multi-head attention."""
    for function in model.functions:
        if (function.domain, function.name) != (FUNCTION_DOMAIN, "Attention"):
            continue
        for node in function.node:
            if node.op_type == "Attention":
                node.op_type, node.domain = "MultiHeadAttention", CONTRIB_DOMAIN
                heads = next(attribute for attribute in node.attribute if attribute.name == "q_num_heads")
                heads.name = "num_heads"
                del node.attribute[:]
                node.attribute.append(heads)
        function.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
        model.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
