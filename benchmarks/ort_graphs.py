"""Stage graphs as a user of ONNX Runtime's CUDA provider would write them: its own fused operators, all in one element type.

The graphs are this project's; only the bodies of the fused functions change, to operators that the provider has kernels for in bf16.
Decomposed attention is no choice: at 32,760 tokens one head's scores are 4 GiB.
"""

import onnx
from onnx import helper, inliner, parser

from export.functions import function_proto
from export.trace import ONNX_DTYPES
from runtime.specs import FUNCTION_DOMAIN, DType

_CONTRIB = "com.microsoft"
_BODIES = {
    "LinearGelu": """
        LinearGelu (x, weight, bias) => (y) {
            hidden = com.microsoft.FusedMatMul <transB = 1> (x, weight)
            y = com.microsoft.FastGelu (hidden, bias)
        }""",
    "AdaLayerNorm": """
        AdaLayerNorm <epsilon> (x, shift, scale) => (y) {
            one = Constant <value_float = 1.0> ()
            one_like = CastLike (one, scale)
            gain = Add (scale, one_like)
            gain_row = Squeeze (gain)
            shift_row = Squeeze (shift)
            y = LayerNormalization <axis = -1, epsilon: float = @epsilon> (x, gain_row, shift_row)
        }""",
    "QKNorm": """
        QKNorm <epsilon> (x, weight) => (y) {
            y = SimplifiedLayerNormalization <axis = -1, epsilon: float = @epsilon> (x, weight)
        }""",
    "QKNormRope": """
        QKNormRope <epsilon, num_heads> (x, weight, rope_cos, rope_sin) => (y) {
            normed = SimplifiedLayerNormalization <axis = -1, epsilon: float = @epsilon> (x, weight)
            batch_axis = Constant <value_ints = [0]> ()
            normed_b = Unsqueeze (normed, batch_axis)
            first_position = Constant <value_ints = [0]> ()
            rotated = com.microsoft.RotaryEmbedding <interleaved = 1> (normed_b, first_position, rope_cos, rope_sin)
            y = Squeeze (rotated, batch_axis)
        }""",
    "Attention": """
        Attention <num_heads> (query, key, value) => (y) {
            batch_axis = Constant <value_ints = [0]> ()
            query_b = Unsqueeze (query, batch_axis)
            key_b = Unsqueeze (key, batch_axis)
            value_b = Unsqueeze (value, batch_axis)
            y_b = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads> (query_b, key_b, value_b)
            y = Squeeze (y_b, batch_axis)
        }""",
}


def contributed_graph(graph: onnx.ModelProto, dtype: DType) -> onnx.ModelProto:
    """A stage's graph with ONNX Runtime's contributed operators, all of its floating-point tensors in `dtype`.

    Inlined here: onnxruntime 1.32 crashes on a function with `SimplifiedLayerNormalization` in it, an operator ONNX does not know.

    Raises:
        ValueError: it holds what has a type of its own, such as a float constant.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    names = [function.name for function in model.functions]
    del model.functions[:]
    model.functions.extend(_function(name) for name in names)
    if all(imported.domain != _CONTRIB for imported in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    if any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in model.graph.initializer):
        raise ValueError("the graph holds float constants")
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = ONNX_DTYPES[dtype]
    inlined: onnx.ModelProto = inliner.inline_local_functions(model)
    return inlined


def _function(name: str) -> onnx.FunctionProto:
    if name not in _BODIES:
        return function_proto(name)
    imports = f'opset_import: ["" : 23, "{_CONTRIB}" : 1]'
    return parser.parse_function(f'<domain: "{FUNCTION_DOMAIN}", {imports}>{_BODIES[name]}')
