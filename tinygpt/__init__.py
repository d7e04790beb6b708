"""Everything that is not the model itself.

An import has no side effect. The first model, run or command prepares tinygrad for this machine; a
script that compiles kernels before that calls `tinygpt.device.prepare()`.
"""
