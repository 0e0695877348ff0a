"""Sparse linear layers in Triton, for NVIDIA GPUs. Depends on torch and triton alone; knows nothing of checkpoints.

    reference.py   every op as a sentence of plain torch: what the kernels must equal
    mask24.py      the two largest of every four           pack24.py    2:4 in the order of the sparse tensor core
    mma24.py       2:4, M = 1…32, sparse tensor core       select24.py  2:4, M = 1, portable
    join24.py      2:4, any M, portable                    split24.py   unstructured as 2:4 and a small residual
    bitmask.py     unstructured, M = 1…32, fewest bytes    sell.py     unstructured, M = 1…4, few instructions
    nested.py      small integers and steps, M = 1…8
    expert_gemv.py dense experts of a mixture, 1…8 tokens
    stacked.py     q, k, v or gate, up of the same inputs as one weight, by any of the kernels for linear layers
    absorb.py      the columns of one block of SparseGPT, one after the other
    selftest.py    is a kernel right on this device?

Importing this package imports neither torch nor triton: each op is a module of its own.
"""
