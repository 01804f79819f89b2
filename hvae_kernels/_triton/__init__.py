"""What the Triton kernels of several ops share. Importable without Triton and without a GPU."""
