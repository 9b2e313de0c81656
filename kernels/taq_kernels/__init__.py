"""Mixed-bitwidth weight-only GEMM for 4- and 8-bit codes in groups of 128, 64 or 32: layouts, kernels, torch ops.

Needs torch, and on GPUs triton. `packing` defines how codes lie in memory, `reference` is the product in plain torch
and the truth for tests, `gemm` is what runs on a GPU and `cpu` on a CPU, `ops` registers `taq::linear` with torch.
"""
