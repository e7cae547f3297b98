"""Bodies of the fused operators that exist in typed graphs only, or have another body there: FP8 products, attention on scaled queries.

They are plain ONNX, so that a typed graph runs wherever a backend has the element types; a target may put its own layer in their place.
"""

import onnx
from onnx import parser

from runtime.precision import FP8_MAX
from runtime.specs import FUNCTION_DOMAIN

SCALED_ATTENTION = "ScaledAttention"
"""Attention without a scale of its own: the queries are multiplied before, in float32."""
SCALED_ATTENTION_FP8 = "ScaledAttentionFp8"
"""The same with queries, keys, values and the softmax's weights in FP8, each with a constant scale."""
FP8_WEIGHTS_SCALE = 1 / 256
"""Scale of the softmax's weights in FP8: the greatest, 1, is 256 there."""

# Each row's largest magnitude; of a row of zeros something else, so that nothing is divided by zero.
_LARGEST = """
            wide = Cast <to = 1> (x)
            magnitudes = Abs (wide)
            columns = Constant <value_ints = [1]> ()
            largest = ReduceMax <keepdims = 1> (magnitudes, columns)
            floor = Constant <value_float = 1e-12> ()
            largest_safe = Max (largest, floor)"""

# The row's largest magnitude becomes 448. Q and DQ have a constant scale of 1; both true scales multiply the product in float32.
_FP8_PRODUCT = f"""{_LARGEST}
            limit = Constant <value_float = {FP8_MAX}> ()
            token_scale = Div (largest_safe, limit)
            scaled = Div (wide, token_scale)
            one = Constant <value_float = 1.0> ()
            one_narrow = Cast <to = 16> (one)
            x_fp8 = QuantizeLinear <output_dtype = 17> (scaled, one)
            x_restored = DequantizeLinear (x_fp8, one_narrow)
            weight_restored = DequantizeLinear (weight, one_narrow)
            weight_columns = Transpose <perm = [1, 0]> (weight_restored)
            product_narrow = MatMul (x_restored, weight_columns)
            product = Cast <to = 1> (product_narrow)
            by_token = Mul (product, token_scale)
            by_row = Mul (by_token, weight_scale)"""

# Which tokens take row 0: chosen token by token, so that nothing has an extent that only the value of `num_clean` tells.
_IS_CLEAN = """
            zero = Constant <value_int = 0> ()
            step = Constant <value_int = 1> ()
            count = Shape <end = 1> (x)
            count_scalar = Squeeze (count)
            positions = Range (zero, count_scalar, step)
            is_clean_row = Less (positions, num_clean)
            column = Constant <value_ints = [1]> ()
            is_clean = Unsqueeze (is_clean_row, column)"""

# Rows [N, heads·d] as [N, heads, d]: the shape to give them.
_BY_HEAD = """
            kept = Constant <value_ints = [0]> ()
            rest = Constant <value_ints = [-1]> ()
            heads_value = Constant <value_int: int = @num_heads> ()
            heads = Reshape (heads_value, rest)
            by_head = Concat <axis = 0> (kept, heads, rest)"""

BODIES = {
    "Gate": """
        Gate (x, gate) => (y) {
            y = Mul (x, gate)
        }""",
    "GateByRow": f"""
        GateByRow (x, gate, num_clean) => (y) {{{_IS_CLEAN}
            clean_gate, noisy_gate = Split <axis = 0, num_outputs = 2> (gate)
            own_gate = Where (is_clean, clean_gate, noisy_gate)
            y = Mul (x, own_gate)
        }}""",
    "AdaLayerNormByRow": f"""
        AdaLayerNormByRow <epsilon> (x, shift, scale, num_clean) => (y) {{{_IS_CLEAN}
            one = Constant <value_float = 1.0> ()
            gain = Add (scale, one)
            clean_gain, noisy_gain = Split <axis = 0, num_outputs = 2> (gain)
            clean_shift, noisy_shift = Split <axis = 0, num_outputs = 2> (shift)
            own_gain = Where (is_clean, clean_gain, noisy_gain)
            own_shift = Where (is_clean, clean_shift, noisy_shift)
            width = Shape <start = 1> (x)
            ones = ConstantOfShape <value: tensor = float[1] {{1.0}}> (width)
            normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (x, ones)
            scaled = Mul (normed, own_gain)
            y = Add (scaled, own_shift)
        }}""",
    # Of few rows and a float32 weight: there is no float32 matrix product for Turing (TensorRT-RTX 1.7.1).
    "SumOfProducts": """
        SumOfProducts (x, weight) => (y) {
            weight_axis = Constant <value_ints = [1]> ()
            x_row = Unsqueeze (x, weight_axis)
            products = Mul (x_row, weight)
            columns = Constant <value_ints = [2]> ()
            y = ReduceSum <keepdims = 0> (products, columns)
        }""",
    # Rows divided by their largest magnitude: what would leave fp16's range stays within it, and returns to its size in float32.
    "ScaledProduct": f"""
        ScaledProduct (x, weight) => (y) {{{_LARGEST}
            scaled = Div (wide, largest_safe)
            narrow = CastLike (scaled, weight)
            product_narrow = Gemm <transB = 1> (narrow, weight)
            product = Cast <to = 1> (product_narrow)
            y = Mul (product, largest_safe)
        }}""",
    # Both products in fp16, bias and softmax between them in float32: see SumOfProducts.
    "BiasedAttentionFp16": f"""
        BiasedAttentionFp16 <num_heads> (query, key, value, position_table, position_buckets) => (y) {{{_BY_HEAD}
            query_rows = Reshape (query, by_head)
            key_rows = Reshape (key, by_head)
            value_rows = Reshape (value, by_head)
            query_heads = Transpose <perm = [1, 0, 2]> (query_rows)
            key_columns = Transpose <perm = [1, 2, 0]> (key_rows)
            value_heads = Transpose <perm = [1, 0, 2]> (value_rows)
            table_by_head = Transpose <perm = [1, 0]> (position_table)
            bias = Gather <axis = 1> (table_by_head, position_buckets)
            products = MatMul (query_heads, key_columns)
            products_wide = Cast <to = 1> (products)
            scores = Add (products_wide, bias)
            weights_wide = Softmax <axis = -1> (scores)
            weights = CastLike (weights_wide, value)
            y_heads = MatMul (weights, value_heads)
            y_rows = Transpose <perm = [1, 0, 2]> (y_heads)
            joined = Concat <axis = 0> (kept, rest)
            y = Reshape (y_rows, joined)
        }}""",
    SCALED_ATTENTION_FP8: f"""
        ScaledAttentionFp8 <num_heads, query_scale> (query, key, value) => (y) {{{_BY_HEAD}
            query_unit_wide = Constant <value_float: float = @query_scale> ()
            query_unit = CastLike (query_unit_wide, query)
            one_wide = Constant <value_float = 1.0> ()
            one = CastLike (one_wide, query)
            query_fp8 = QuantizeLinear <output_dtype = 17> (query, query_unit)
            key_fp8 = QuantizeLinear <output_dtype = 17> (key, one)
            value_fp8 = QuantizeLinear <output_dtype = 17> (value, one)
            query_restored = DequantizeLinear (query_fp8, query_unit_wide)
            key_restored = DequantizeLinear (key_fp8, one_wide)
            value_restored = DequantizeLinear (value_fp8, one_wide)
            query_rows = Reshape (query_restored, by_head)
            key_rows = Reshape (key_restored, by_head)
            value_rows = Reshape (value_restored, by_head)
            query_heads = Transpose <perm = [1, 0, 2]> (query_rows)
            key_columns = Transpose <perm = [1, 2, 0]> (key_rows)
            value_heads = Transpose <perm = [1, 0, 2]> (value_rows)
            scores = MatMul (query_heads, key_columns)
            weights = Softmax <axis = -1> (scores)
            weights_unit = Constant <value_float = {FP8_WEIGHTS_SCALE}> ()
            weights_fp8 = QuantizeLinear <output_dtype = 17> (weights, weights_unit)
            weights_restored = DequantizeLinear (weights_fp8, weights_unit)
            y_heads = MatMul (weights_restored, value_heads)
            y_rows = Transpose <perm = [1, 0, 2]> (y_heads)
            joined = Concat <axis = 0> (kept, rest)
            y_wide = Reshape (y_rows, joined)
            y = CastLike (y_wide, query)
        }}""",
    SCALED_ATTENTION: f"""
        ScaledAttention <num_heads> (query, key, value) => (y) {{{_BY_HEAD}
            batch_axis = Constant <value_ints = [0]> ()
            query_rows = Reshape (query, by_head)
            key_rows = Reshape (key, by_head)
            value_rows = Reshape (value, by_head)
            query_heads = Transpose <perm = [1, 0, 2]> (query_rows)
            key_heads = Transpose <perm = [1, 0, 2]> (key_rows)
            value_heads = Transpose <perm = [1, 0, 2]> (value_rows)
            query_b = Unsqueeze (query_heads, batch_axis)
            key_b = Unsqueeze (key_heads, batch_axis)
            value_b = Unsqueeze (value_heads, batch_axis)
            y_b = Attention <scale = 1.0> (query_b, key_b, value_b)
            y_heads = Squeeze (y_b, batch_axis)
            y_rows = Transpose <perm = [1, 0, 2]> (y_heads)
            joined = Concat <axis = 0> (kept, rest)
            y = Reshape (y_rows, joined)
        }}""",
    "LinearFp8": f"""
        LinearFp8 (x, weight, weight_scale, bias) => (y) {{{_FP8_PRODUCT}
            bias_wide = Cast <to = 1> (bias)
            y = Add (by_row, bias_wide)
        }}""",
    "LinearGeluFp8": f"""
        LinearGeluFp8 (x, weight, weight_scale, bias) => (y) {{{_FP8_PRODUCT}
            bias_wide = Cast <to = 1> (bias)
            hidden = Add (by_row, bias_wide)
            y = Gelu <approximate = "tanh"> (hidden)
        }}""",
}
"""ONNX text of every function, by its name; in FP8 the results are float32, for whoever reads them to narrow."""


def function_proto(name: str) -> onnx.FunctionProto:
    """The ONNX function `wanrt::<name>` with its body in standard operators."""
    return parser.parse_function(f'<domain: "{FUNCTION_DOMAIN}", opset_import: ["" : 23]>{BODIES[name]}')
