"""The `rtx` and `tensorrt` targets at run time: two libraries with one API, over the device and the weights of `runtime.backends.cuda`."""
