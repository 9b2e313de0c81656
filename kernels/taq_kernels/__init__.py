"""Mixed-bitwidth weight-only GEMM for 4- and 8-bit codes in groups of 128: layouts, reference, kernels, torch ops.

Needs torch alone. `packing` defines how codes lie in memory, `reference` is the product in plain torch and the
truth for tests, `cpu` is what runs on a CPU, `ops` registers `taq::linear` with torch.
"""
