"""The `rtx` and `tensorrt` targets: TensorRT-RTX and TensorRT, two libraries with one API. `build.build_engines` is the way in."""
