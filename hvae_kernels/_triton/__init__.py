"""What the ops' Triton rooms share. Importable without Triton and without a GPU."""
