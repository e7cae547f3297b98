"""What each operator computes in, as a table: the operators of traced graphs, by domain and name."""

from enum import StrEnum

import onnx

from runtime.specs import FUNCTION_DOMAIN


class Computes(StrEnum):
    """Where an operator's arithmetic takes place, and what its results are."""

    AS_GIVEN = "as given"
    """In the widest type of its inputs: moving data, adding what is there."""
    NARROW = "narrow"
    """In the stage's narrow type."""
    PRODUCT = "product"
    """In the type of its weight, accumulated wide."""
    WIDE = "wide"
    """In float32, and so are its results; whoever reads them narrows them."""
    WIDE_STREAM = "wide stream"
    """In float32, results in the type of the first input: the stream of hidden states keeps its type."""
    RESIDUAL = "residual"
    """Gated in float32, added in the type of the stream: a float32 copy of the stream would cost its double in memory."""
    BIASED_ATTENTION = "biased attention"
    """In float32; in fp16 its two products are fp16."""
    ATTENTION = "attention"
    """Queries scaled in float32, the rest in the stage's narrow type with sums in float32."""


_OPERATORS: dict[str, dict[Computes, tuple[str, ...]]] = {
    "": {
        Computes.AS_GIVEN: (
            "Add", "Cast", "Concat", "Flatten", "Identity", "Mul", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
        ),
        Computes.PRODUCT: ("Gemm",),
        Computes.WIDE: ("Clip", "Gelu", "LayerNormalization", "RMSNormalization", "Round", "Sigmoid"),
    },
    FUNCTION_DOMAIN: {
        Computes.AS_GIVEN: (
            "AddFrameRows", "FirstChannels", "FoldPixels", "FrameRows", "InterleaveFrames", "UnfoldPixels", "UpsampleNearest",
        ),
        Computes.NARROW: ("CausalConv", "FirstCausalConv", "FrameConv", "PointwiseConv"),
        Computes.PRODUCT: ("Linear", "LinearGelu", "LinearNoBias"),
        Computes.WIDE: (
            "AdaLayerNorm", "AdaLayerNormByRow", "ChannelNorm", "ChannelNormSilu", "FrameColours", "GatedGelu", "QKNorm", "QKNormRope",
            "ZeroPast",
        ),
        Computes.WIDE_STREAM: ("AddAverageDown", "AddDuplicateUp"),
        Computes.RESIDUAL: ("GatedResidual", "GatedResidualByRow"),
        Computes.BIASED_ATTENTION: ("BiasedAttention",),
        Computes.ATTENTION: ("Attention",),
    },
}  # fmt: skip

_RULES = {
    (domain, operator): rule
    for domain, rules in _OPERATORS.items()
    for rule, operators in rules.items()
    for operator in operators
}


def computes(node: onnx.NodeProto) -> Computes | None:
    """The rule of a node's operator; None when there is none."""
    return _RULES.get((node.domain, node.op_type))
