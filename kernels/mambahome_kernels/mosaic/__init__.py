"""What Pallas Mosaic GPU kernels share: the device, tracing, the interpreter, the batch on a mesh."""
