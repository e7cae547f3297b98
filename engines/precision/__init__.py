"""Traced float32 graphs → strongly typed graphs in bf16, fp16 or fp8: `typed.typed_graph`. Which tensors narrow is `runtime.precision`'s."""
